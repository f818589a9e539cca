"""The exceptions of `distill`, and the checks that raise them for settings of wrong types and ranges."""

from collections.abc import Iterable
from difflib import get_close_matches
from math import inf

from interventions import checking, in_one_line


class DistillError(ValueError):
    """A request that `distill` cannot carry out; the message, one line, names the way out."""

    __str__ = in_one_line(ValueError.__str__)


checked = checking(DistillError)


class NothingToMeasure(DistillError):
    """A mapping under which an interchange accuracy would be meaningless."""


class OtherProcessFailed(DistillError):
    """A training that ended since another of its processes failed, or is gone."""


class Unreachable(DistillError):
    """A teacher on another machine that did not answer, after all retries."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean …?)" with the known name that is closest to an unknown one, or an empty text."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def refuse_unless_positive(owner: str, **settings: float | None) -> None:
    """Raise DistillError for a setting of `owner` that is not above 0 and finite; None passes.

    >>> refuse_unless_positive("KD", temperature=0.0)
    Traceback (most recent call last):
    distill.errors.DistillError: KD(temperature=0.0) is not above 0 and finite; use e.g. KD(temperature=1.0).
    """
    for name, value in settings.items():
        if value is not None and not 0 < value < inf:
            raise DistillError(
                f"{owner}({name}={value}) is not above 0 and finite; use e.g. {owner}({name}={_like(value, '1')})."
            )


def refuse_negative(owner: str, **settings: float | None) -> None:
    """Raise DistillError for a setting of `owner` that is below 0 or infinite; None passes."""
    for name, value in settings.items():
        if value is not None and not 0 <= value < inf:
            raise DistillError(
                f"{owner}({name}={value}) is not 0 or more and finite; use e.g. {owner}({name}={_like(value, '0')})."
            )


def _like(value: float, number: str) -> str:
    return number if isinstance(value, int) else f"{number}.0"
