"""Rows, tasks as data, files of one's own, two tokenizers on one text, and which rows were trained on."""
