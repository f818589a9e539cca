"""The command line `distill`."""
