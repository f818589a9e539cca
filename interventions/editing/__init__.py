"""Directions, attention edges that are cut, and interventions that are written into the weights."""
