"""The one exception type of `distill`."""

from interventions import printed


class DistillError(ValueError):
    """What was asked of `distill` cannot be done; the message, one line, names the way out."""

    __str__ = printed(ValueError.__str__)


class NothingToMeasure(DistillError):
    """An interchange accuracy that would say nothing under this mapping."""


class Unreachable(DistillError):
    """A teacher that runs elsewhere did not answer, however often it was asked."""
