"""A generalist with specialists for some of its classes, and how these are trained."""
