"""The training loop, what it is given, its schedule and checkpoints, and the folder of a run."""
