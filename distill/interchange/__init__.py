"""Interchanges: mappings between two models, sources, positions, and the swap itself."""
