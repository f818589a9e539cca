"""Students compared over the same pairs: differences of figures with intervals, a table, a picture, a sentence."""
