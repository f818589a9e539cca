"""What a user's model is called with and what it answers: its inputs, mode, precision, classes and head."""
