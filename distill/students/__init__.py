"""Students made from a teacher's layers, or from part of its width."""
