"""What a training could gain, measured before hours are spent on it."""
