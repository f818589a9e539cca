"""Where two models answer differently: which rows, which classes, which slices of the data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from distill.auditing.answers import Compared
from distill.auditing.behaviour import share_among
from distill.data.rows import Rows
from distill.errors import DistillError
from distill.statistics.intervals import Share
from interventions import shown

SHOWN_ROWS, SHOWN_CHARACTERS = 20, 300
MOST_VALUES = 1000
"""The most different values of a column that are slices."""
Slices = str | Sequence[Any] | Mapping[str, Sequence[Any]] | None


@dataclass(frozen=True)
class RowDifference:
    """A row on which two models answer far apart.

    Attributes:
        row: its number, from 0.
        divergence: the mean divergence of its answers.
        changed: how many of its answers are of another class.
        answers: how many it has.
        text: the row as text, cut; empty where there is no tokenizer.
        label: the name of the right class; empty for tokens, and where it is not known.
        original, compressed: the answers of both with their probabilities; empty for tokens and other kinds.
    """

    row: int
    divergence: float
    changed: int
    answers: int
    text: str = ""
    label: str = ""
    original: str = ""
    compressed: str = ""


@dataclass(frozen=True)
class Confusion:
    """Answers that moved from one class to another.

    Attributes:
        original, compressed: the names of the classes that the two models answer.
        count: how many answers.
        share: of those that the original gives this class.
    """

    original: str
    compressed: str
    count: int
    share: float


@dataclass(frozen=True)
class Slice:
    """The rows that have one value in a column.

    Attributes:
        value: the value, as text.
        rows: how many rows.
        divergence: the mean divergence of their answers.
        agreement: the share of answers of one class; None for answers that are no classes.
    """

    value: str
    rows: int
    divergence: float
    agreement: Share | None


@dataclass(frozen=True)
class Differences:
    """The rows, classes and slices where two models answer differently.

    Attributes:
        rows: the rows with the largest divergence, the largest first.
        confusions: classes that became others, the most frequent first.
        column: the name of the column by which the rows are sliced; "" without one.
        slices: of each of its values, the worst first.
    """

    rows: tuple[RowDifference, ...] = ()
    confusions: tuple[Confusion, ...] = ()
    column: str = ""
    slices: tuple[Slice, ...] = ()


@dataclass(frozen=True, eq=False)
class Naming:
    """Names of classes, and texts of rows.

    Attributes:
        classes: the names of the classes; None numbers them.
        show: turns a row into text; None shows its number alone.
    """

    classes: Sequence[str] | None = None
    show: Callable[[dict[str, Tensor]], str] | None = None

    def name(self, number: int) -> str:
        """Return the name of a class."""
        known = self.classes is not None and 0 <= number < len(self.classes)
        return self.classes[number] if known and self.classes is not None else str(number)

    def text(self, row: dict[str, Tensor]) -> str:
        """Return a row as text, cut."""
        return "" if self.show is None else " ".join(self.show(row).split())[:SHOWN_CHARACTERS]


def differences_of(
    found: Compared, rows: Rows, naming: Naming, slices: tuple[str, Sequence[str]] | None
) -> Differences:
    """Return where the answers differ.

    Args:
        found: the answers.
        rows: the data.
        naming: how classes and rows are written.
        slices: the name of a column, and its value in each row as text.
    """
    column, values = ("", []) if slices is None else slices
    confusions = _confusions(found, naming.name)
    return Differences(_farthest(found, rows, naming), confusions, column, _sliced(found, values))


def sliced_by(
    slices: Slices, rows: Rows, column: Callable[[str], list[str]] | None = None
) -> tuple[str, list[str]] | None:
    """Return the name of a column and its value in each row as text.

    Args:
        slices: the name of a column, a value for each row, or both, {name: values}; None is no column.
        rows: the data.
        column: reads a column of the file that the rows come from.

    Raises:
        DistillError: a column that does not exist or has too many values, or another number of values than of rows.
    """
    if slices is None:
        return None
    if isinstance(slices, str):
        name, values = slices, _column(slices, rows, column)
    else:
        given = slices if isinstance(slices, Mapping) else {"slice": slices}
        if len(given) != 1:
            raise DistillError(f"slices names {len(given)} columns; name one: slices={{'topic': […]}}.")
        ((name, found),) = given.items()
        if isinstance(found, bytes | str):
            raise DistillError(f"slices={shown(slices)} is no list; give a value for each row: slices=[…].")
        values = [str(each) for each in found]
    if len(values) != len(rows):
        raise DistillError(
            f"slices={shown(slices)} has {len(values)} values and the data {len(rows)} rows; give one for each row."
        )
    if len(set(values)) > MOST_VALUES:
        raise DistillError(
            f"slices={shown(slices)} has {len(set(values))} different values in {len(rows)} rows, and at most "
            f"{MOST_VALUES} make slices; choose a column of groups."
        )
    return name, values


def _column(name: str, rows: Rows, column: Callable[[str], list[str]] | None) -> list[str]:
    """Return a column of rows, or of the file that they come from, as texts."""
    values = rows.table.get(name)
    if values is not None:
        if not isinstance(values, Tensor) or values.ndim != 1:
            raise DistillError(
                f"slices={name!r} is a column with several values a row, which makes no slices; choose one with one "
                "value, or give a value for each row: slices=[…]."
            )
        names = rows.classes if name == "labels" else None
        numbers = values.tolist()
        return [names[each] if names is not None and 0 <= each < len(names) else str(each) for each in numbers]
    if column is not None:
        return column(name)
    raise DistillError(
        f"slices={name!r} is no column of the data, which has {', '.join(rows.columns)}; name one of these, or give a "
        "value for each row: slices=[…]."
    )


def _row_means(found: Compared) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Return for each row the mean divergence of its answers, how many changed, and how many there are."""
    sums = torch.zeros(3, found.rows, dtype=torch.float64)
    for row, values in zip(sums, (found.divergence, found.differs, torch.ones(len(found.row))), strict=True):
        row.index_add_(0, found.row, values.double())
    return sums[0] / sums[2].clamp(min=1), sums[1], sums[2]


def _farthest(found: Compared, rows: Rows, naming: Naming) -> tuple[RowDifference, ...]:
    """Return the rows with the largest divergence that is not 0."""
    mean, changed, count = _row_means(found)
    order = [row for row in torch.argsort(mean, descending=True, stable=True)[:SHOWN_ROWS].tolist() if mean[row] > 0]
    single = found.reading.kind == "classes" and not found.reading.at_tokens
    at = {row: i for i, row in enumerate(found.row.tolist())} if single else {}
    return tuple(
        RowDifference(
            row, float(mean[row]), int(changed[row]), int(count[row]), naming.text(rows[row]),
            *(_answers_at(found, at[row], naming.name) if single else ("", "", "")),
        )
        for row in order
    )  # fmt: skip


def _answers_at(found: Compared, i: int, name: Callable[[int], str]) -> tuple[str, str, str]:
    """Return label and answers of a row, with their probabilities, as texts."""
    label = int(found.label[i])
    one, other = (
        f"{name(int(chosen[i]))} {float(sure[i]):.3f}"
        for chosen, sure in ((found.one, found.sure), (found.other, found.other_sure))
    )
    return name(label) if label >= 0 else "", one, other


def _confusions(found: Compared, name: Callable[[int], str]) -> tuple[Confusion, ...]:
    """Return the classes that became others, the most frequent first."""
    differs = found.differs
    if not bool(differs.any()):
        return ()
    moved, counts = torch.stack([found.one[differs], found.other[differs]], 1).unique(dim=0, return_counts=True)
    order = torch.argsort(counts, descending=True, stable=True)[:SHOWN_ROWS]
    given = {int(one): int((found.one == one).sum()) for one in moved[order, 0].unique()}
    return tuple(
        Confusion(name(one), name(other), count, count / given[one])
        for (one, other), count in zip(moved[order].tolist(), counts[order].tolist(), strict=True)
    )


def _sliced(found: Compared, values: Sequence[str]) -> tuple[Slice, ...]:
    """Return the figures of the rows of each value, the worst agreement first."""
    slices = []
    numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
    of_row = torch.tensor([numbers[value] for value in values])
    for value, number in numbers.items():
        mine = of_row[found.row] == number
        if not bool(mine.any()):
            continue
        agreement = None
        if found.reading.kind == "classes":
            agreement = share_among(found, ~found.differs[mine], found.row[mine])
        slices.append(Slice(value, int((of_row == number).sum()), float(found.divergence[mine].mean()), agreement))
    return tuple(sorted(slices, key=lambda each: (each.agreement.value if each.agreement else 0.0, -each.divergence)))
