"""`register`, as the version before called it: it is `interventions.register_blocks`."""

from interventions.renames import renamed_in

__getattr__ = renamed_in(__name__, register="interventions.register_blocks")
