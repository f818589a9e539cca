"""`register`: where the blocks are, for model types in which the structure misleads; see `models/overrides.py`."""

from interventions.models.overrides import register

__all__ = ["register"]
