"""`distill audit`: a compressed model against its original, with a page that says whether and where they differ."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from distill.auditing.audit import audit
from distill.auditing.layers import SEARCH
from distill.auditing.page import save_page
from distill.cli.loading import warnings_as_notes
from distill.data.files import rows_of
from distill.data.tables import read
from distill.errors import DistillError
from distill.models.numbering import numbered_as
from distill.models.pretrained import load_model, load_tokenizer
from distill.processes import from_first
from distill.storage.locks import claim
from distill.tasks.loading import names
from distill.tasks.named import length_for
from distill.training.progress import console_of
from distill.training.run_folder import refuse_used


@dataclass(frozen=True)
class AuditOptions:
    """The settings of an audit: columns of the file, the mapping, and how much is measured."""

    text: str | None = None
    label: str | None = None
    slice_by: str | None = None
    mapping: str | None = None
    max_length: int | None = None
    examples: int = 256
    pairs: int = 500
    seed: int = 0

    def blocks(self) -> dict[int, int] | str | None:
        """Return the mapping, {block of the original: block of the compressed model}, or "search"; None by default."""
        if self.mapping is None or self.mapping == SEARCH:
            return self.mapping
        sides = [entry.split("~") for entry in self.mapping.split()]
        if not sides or not all(len(each) == 2 and all(side.isdigit() for side in each) for each in sides):
            raise DistillError(
                f"--mapping {self.mapping!r} is not of blocks; write original~compressed with spaces between: "
                "--mapping '0~0 3~1', or --mapping search."
            )
        blocks = {int(above): int(below) for above, below in sides}
        if len(blocks) < len(sides):
            raise DistillError(f"--mapping {self.mapping!r} names a block of the original twice; name each once.")
        return blocks


def run_audit(original: str, compressed: str, data: str, options: AuditOptions, output: Path | None = None) -> Path:
    """Compare a saved model with its original, print what was found, and return the path of the page.

    Args:
        original, compressed: folders of saved models, or their names on the hub.
        data: a file of texts, or the name of a task.
        options: the settings.
        output: a new folder; by default `runs/audit-N` with the first number that is free.
    """
    console, blocks = console_of(), options.blocks()
    if output is not None:
        from_first(lambda: refuse_used(output))
    one, other = load_model(original), load_model(compressed)
    with warnings_as_notes(console):
        rows, slices = _rows(data, original, one, options)
    result = audit(
        one,
        other,
        rows,
        mapping=blocks,
        slices=slices,
        examples=options.examples,
        pairs=options.pairs,
        seed=options.seed,
    )
    console.print(str(result), markup=False, highlight=False)

    def save() -> Path:
        folder = claim(lambda number: Path("runs") / f"audit-{number}") if output is None else output
        return save_page(result, folder, f"{Path(compressed).name} against {Path(original).name}")

    report = from_first(save)
    console.print(f"report: {report}", markup=False, highlight=False, soft_wrap=True)
    return report


def _rows(data: str, original: str, model: nn.Module, options: AuditOptions) -> tuple[Any, Any]:
    """Return the rows of a file, or the name of a task, and the values by which they are sliced."""
    if data in names():
        return data, options.slice_by
    columns, length = {"text": options.text, "label": options.label}, length_for(model, options.max_length)
    rows = numbered_as(rows_of(data, load_tokenizer(original), length, **columns), model)
    if options.slice_by is None:
        return rows, None
    table = read(data)
    if options.slice_by not in table[0]:
        raise DistillError(
            f"--slice {options.slice_by!r} is no column of {data}, which has {', '.join(table[0])}; name one."
        )
    return rows, {options.slice_by: [row.get(options.slice_by) for row in table]}
