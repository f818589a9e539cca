"""The one exception type of the package."""

from interventions.names import in_one_line


class InterventionError(ValueError):
    """A request that cannot be carried out: what was asked, why it fails, the actual value, and the way out as code."""

    __str__ = in_one_line(ValueError.__str__)
