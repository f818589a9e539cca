"""Write the summaries of `docs/reference/*.md` anew: `python docs/reference_entries.py`.

A page lists public names as "- `interventions.run`: summary"; which page a name is on is decided by hand, and the
summary is the first sentence of its docstring. The site shows the whole documentation in place of an entry.
"""

import inspect
import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

PAGES = Path(__file__).resolve().parent / "reference"
MODULES = (
    "interventions",
    "interventions.metrics",
    "distill",
    "distill.objectives",
    "distill.losses",
    "distill.networks",
    "distill.tasks",
    "distill.metrics",
)
ENTRY = re.compile(r"^- `([\w.]+)`:.*$", re.MULTILINE)


def public_names() -> dict[str, object]:
    """Return {the shortest path of each public name: what it names}, without modules, and without a name twice."""
    found: dict[tuple[int, str], tuple[str, object]] = {}
    for module in MODULES:
        whole = import_module(module)
        for name in whole.__all__:
            value = getattr(whole, name)
            if not isinstance(value, ModuleType):
                found.setdefault((id(value), name), (f"{module}.{name}", value))
    return dict(found.values())


def summary(name: str, value: object) -> str:
    """Return the first sentence of a docstring, on one line; of a value or type alias, that it is one."""
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        return "a value or type of the package."
    opening = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.) ", opening, maxsplit=1)[0]


def renewed(page: str, names: dict[str, object]) -> str:
    """Return a page with the summary of each of its entries; an entry that is no public name is left as it is."""
    return ENTRY.sub(
        lambda entry: f"- `{entry[1]}`: {summary(entry[1], names[entry[1]])}" if entry[1] in names else entry[0], page
    )


if __name__ == "__main__":
    sys.path.insert(0, str(PAGES.parents[1]))
    public = public_names()
    for path in sorted(PAGES.glob("*.md")):
        path.write_text(renewed(path.read_text(encoding="utf-8"), public), encoding="utf-8")
