"""What happens around the steps of a training: evaluations, the best state, early stopping, callbacks and trackers."""
