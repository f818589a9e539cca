"""Runs of a model: their inputs, activations and recordings, and the writes of an intervention."""
