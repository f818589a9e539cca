"""The audit of a compressed model against its original: answers, where they differ, and the parts that changed."""
