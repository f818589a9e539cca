"""Embedded causal models, with whose variables networks are trained or aligned."""
