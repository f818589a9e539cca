"""The training loop, its schedule and checkpoints, and the folder of a run."""
