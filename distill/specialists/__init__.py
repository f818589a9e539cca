"""A generalist with specialists for some of its classes, and how they are trained."""
