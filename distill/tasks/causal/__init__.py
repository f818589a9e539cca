"""Embedded causal models, whose variables a network may be trained to compute."""
