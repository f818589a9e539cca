"""The options of commands: declared once in groups, read from the call or a file."""
