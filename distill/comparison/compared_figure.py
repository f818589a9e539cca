"""A figure of a student in a comparison, with its difference to that of the first student."""

from collections.abc import Iterable
from dataclasses import dataclass

from distill.statistics.over_runs import OverRuns

OVERALL = "overall"
"""The entry that stands for all entries of the mapping together."""
WITHOUT = "without interchange"
"""The kind of figures on the rows as they are."""
TRAINED, UNTRAINED, ALL = "mean of kinds trained on", "mean of kinds not trained on", "mean of all kinds"
"""The kinds that stand for several together."""
MEANS = (TRAINED, UNTRAINED, ALL)

LABELS = {
    "accuracy": "accuracy",
    "agreement": "agreement with the teacher",
    "base_kl": "KL to the teacher",
    "iia": "IIA",
    "effective": "effective IIA",
    "normalized": "normalized IIA",
    "kl": "KL of counterfactuals",
    "correlation": "correlation of shifts",
    "error": "error of counterfactuals",
}
"""The figures of a comparison, as tables and pictures call them."""
OF_KINDS = ("iia", "effective", "normalized", "kl", "correlation", "error")
LOWER_IS_NEARER = ("base_kl", "kl", "error")
"""Figures that are lower for a student that is nearer to its teacher."""


@dataclass(frozen=True)
class ComparedFigure:
    """A figure of a student, with its difference to that of the first student, over the same pairs.

    Attributes:
        figure: its name: "accuracy", "agreement", "base_kl" of the rows as they are; "iia", "effective", "normalized",
            "kl", "correlation" of a kind of interchange, or of real-valued answers "error" and "correlation".
        kind: the kind of interchange; "without interchange"; or the mean of several kinds.
        entry: the entry of the mapping, or "overall".
        student: the name of the student.
        value: the figure, over the runs of this student.
        difference: the figure minus that of the first student; None for the first.
        trained: whether the student, in any of its runs, was trained on this kind; None where it is not known.
    """

    figure: str
    kind: str
    entry: str
    student: str
    value: OverRuns
    difference: OverRuns | None = None
    trained: bool | None = None


def group_of(trained: Iterable[bool | None]) -> str:
    """Return whether any of some students was trained on a kind, as the name of the mean of all kinds like it."""
    known = [each for each in trained if each is not None]
    return (TRAINED if any(known) else UNTRAINED) if known else ALL
