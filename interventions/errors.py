"""The one exception type of the package."""

from interventions.names import printed


class InterventionError(ValueError):
    """A request that cannot be carried out: what was asked, why it fails, the actual value, and the way out as code."""

    __str__ = printed(ValueError.__str__)
