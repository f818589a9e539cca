"""Publishing of a student: its model card, and the upload to a hub."""
