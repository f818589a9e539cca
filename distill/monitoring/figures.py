"""The figures by which evaluations of one training are compared, and which of them is the best.

Of values v_1, v_2, … the best is the first v_i that no other one is better than: lower for perplexity, divergence and
error, higher for shares. A value that is no number, or is missing, is never better.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from math import isnan, nan
from typing import Any

from distill.errors import DistillError
from distill.training.progress import Record
from interventions import shown

LOWER = ("perplexity", "kl", "mse", "error")
HIGHER = ("accuracy", "micro_f1", "macro_f1", "exact_match", "pearson", "spearman", "agreement", "iia")
BY_DEFAULT = ("perplexity", "accuracy", "micro_f1", "mse", "kl", "iia", "error")
"""The first of these that an evaluation has is the one to compare by, where none is named."""


def check_figure(name: Any) -> None:
    """Raise DistillError for what is neither True, False nor the name of a figure."""
    if isinstance(name, bool) or name is None or name in (*LOWER, *HIGHER):
        return
    near = get_close_matches(str(name), (*LOWER, *HIGHER), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise DistillError(
        f"save_best={shown(name)} is no figure of an evaluation; {hint}use one of {', '.join((*LOWER, *HIGHER))}, or "
        "True for the first of them that there is."
    )


def figure_to_compare(wanted: Any, found: Mapping[str, float]) -> str | None:
    """Return the name of the figure that evaluations are compared by; None where none of those found can be."""
    return wanted if isinstance(wanted, str) else next((name for name in BY_DEFAULT if name in found), None)


def best_step(records: Sequence[Record], figure: str | None) -> int | None:
    """Return the step whose evaluation is the best; None where no evaluation has the figure as a number.

    >>> records = [Record(n, 4, 0.0, {}, 0.1, {"kl": value}) for n, value in enumerate((nan, 2.0, 1.0, 1.0), 1)]
    >>> best_step(records, "kl"), best_step(records, "accuracy")
    (3, None)
    """
    best, at = nan, None
    for record in records:
        value = nan if record.evaluation is None or figure is None else record.evaluation.get(figure, nan)
        if not isnan(value) and (at is None or (value < best if figure in LOWER else value > best)):
            best, at = value, record.step
    return at


def evaluations_since(records: Sequence[Record], step: int | None) -> int:
    """Return how many evaluations there were after a step; all of them where it is None."""
    return sum(each.evaluation is not None and each.step > (step or 0) for each in records)
