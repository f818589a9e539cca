"""Accuracy, interchange accuracy with its controls and intervals, probes, similarity, training paths."""
