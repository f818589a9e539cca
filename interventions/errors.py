"""The one exception type of the package."""

from interventions.names import in_one_line


class InterventionError(ValueError):
    """A request that cannot be carried out.

    The message names the request, why it fails, the actual value or shape, and what to write instead.

    >>> from interventions import Location
    >>> Location(site="logits", layer=3)
    Traceback (most recent call last):
    interventions.errors.InterventionError: site 'logits' has no layer, and layer=3 was given; write
    Location(site='logits').
    """

    __str__ = in_one_line(ValueError.__str__)
