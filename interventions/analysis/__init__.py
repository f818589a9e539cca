"""Sweeps, path patching, means of activations, grids and pictures."""
