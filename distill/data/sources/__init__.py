"""Data that is read when it is used: columns whose rows lie on disk, or are made by an object of the user."""
