"""The command line `distill`: `main` reads it, and each command is a file of its name."""
