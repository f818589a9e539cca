"""Find locations in a model: its blocks, sites and axes, and the model types whose structure misleads."""
