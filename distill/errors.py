"""The one exception type of `distill`."""

from collections.abc import Iterable
from difflib import get_close_matches

from interventions import checking, in_one_line


class DistillError(ValueError):
    """What was asked of `distill` cannot be done; the message, one line, names the way out."""

    __str__ = in_one_line(ValueError.__str__)


class NothingToMeasure(DistillError):
    """An interchange accuracy that would say nothing under this mapping."""


class Unreachable(DistillError):
    """A teacher that runs elsewhere did not answer, however often it was asked."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that names the nearest of what is known, or nothing; it stands behind a name that is not."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


checked = checking(DistillError)
