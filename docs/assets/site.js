// Formulas, and tables that are filtered by what is typed. Material swaps the page without a reload, hence document$.
function filterTable(holder) {
  const rows = [...holder.querySelectorAll("tbody tr")];
  const input = document.createElement("input");
  const count = document.createElement("output");
  input.type = "search";
  input.placeholder = holder.dataset.filter;
  input.setAttribute("aria-label", holder.dataset.filter);
  count.setAttribute("aria-live", "polite");
  const show = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length}`;
  };
  input.addEventListener("input", show);
  const bar = document.createElement("p");
  bar.className = "filter";
  bar.append(input, count);
  holder.prepend(bar);
  show();
}

document$.subscribe(() => {
  renderMathInElement(document.body, {
    delimiters: [
      { left: "\\[", right: "\\]", display: true },
      { left: "\\(", right: "\\)", display: false },
    ],
  });
  document.querySelectorAll("div[data-filter]:not(:has(.filter))").forEach(filterTable);
});
