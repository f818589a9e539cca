"""Models of the user: their inputs, answers, mode, precision, classes, padding and head."""
