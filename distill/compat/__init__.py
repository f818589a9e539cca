"""The command lines of the original programs, mapped onto `fit`; see docs/compat.md."""
