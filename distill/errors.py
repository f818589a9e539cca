"""The one exception type of `distill`, and what raises it for settings of wrong types and ranges."""

from collections.abc import Iterable
from difflib import get_close_matches
from math import inf

from interventions import checking, in_one_line


class DistillError(ValueError):
    """What was asked of `distill` cannot be done; the message, one line, names the way out."""

    __str__ = in_one_line(ValueError.__str__)


checked = checking(DistillError)


class NothingToMeasure(DistillError):
    """An interchange accuracy that would say nothing under this mapping."""


class Unreachable(DistillError):
    """A teacher that runs elsewhere did not answer, however often it was asked."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that names the nearest of what is known, or nothing; it stands behind a name that is not."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def refuse_unless_positive(asked: str, **settings: float | None) -> None:
    """Refuse a setting of `asked` that is not above 0 and finite; None is left.

    >>> refuse_unless_positive("KD", temperature=0.0)
    Traceback (most recent call last):
    distill.errors.DistillError: KD(temperature=0.0) is not above 0 and finite; use e.g. KD(temperature=1.0).
    """
    for name, value in settings.items():
        if value is not None and not 0 < value < inf:
            raise DistillError(
                f"{asked}({name}={value}) is not above 0 and finite; use e.g. {asked}({name}={_like(value, '1')})."
            )


def refuse_negative(asked: str, **settings: float | None) -> None:
    """Refuse a setting of `asked` that is below 0 or infinite; None is left."""
    for name, value in settings.items():
        if value is not None and not 0 <= value < inf:
            raise DistillError(
                f"{asked}({name}={value}) is not 0 or more and finite; use e.g. {asked}({name}={_like(value, '0')})."
            )


def _like(value: float, number: str) -> str:
    return number if isinstance(value, int) else f"{number}.0"
