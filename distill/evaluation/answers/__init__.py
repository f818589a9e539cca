"""The answers of models on held-out rows: beside their labels, and of a student beside those of its teacher."""
