"""Teachers of several networks, noisy ones, and teachers elsewhere, with what is kept of their answers."""
