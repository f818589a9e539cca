"""The version of both packages, as the distribution that holds them was installed under it."""

from importlib import metadata

DISTRIBUTION = "causal-distillation"


def installed_version(distribution: str = DISTRIBUTION) -> str:
    """Return the version of an installed distribution; "0+unknown" of packages that are only on the path.

    >>> installed_version("no distribution of this name")
    '0+unknown'
    """
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "0+unknown"


__version__ = installed_version()
