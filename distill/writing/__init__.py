"""Rows that a model writes: on-policy distillation, sequence-level distillation, and mixtures of both with the data."""
