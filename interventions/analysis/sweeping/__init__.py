"""The parts of a sweep: one batch, several of them, what is cut along with their examples, and checkpoints."""
