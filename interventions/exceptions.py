"""The former home of `interventions.register_blocks`, under its former name `register`."""

from interventions.renames import renamed_in

__getattr__ = renamed_in(__name__, register="interventions.register_blocks")
