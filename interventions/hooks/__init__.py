"""Hooks and replaced methods on a user's model, which read and write its activations, and their removal."""
