"""Rows of data, tasks, files, pairs of tokenizers, and the record of the rows that a network was trained on."""
