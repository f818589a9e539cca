"""Where things are in a model: its blocks, sites and axes, and exceptions to the structure."""
