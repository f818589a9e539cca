"""Ensembles, noisy teachers, and teachers on other machines with a cache of their answers."""
