"""The verbs of `interventions` on models of nnsight: on this machine, served, or remote.

What is done in a run stands on the model as edits of nnsight, so that the user's own traces carry it wherever they go
(`edits`, `visits`, `hook_points`). Our own verbs run several traces as one job (`jobs`), and all that travels does so
as text and data (`packing`). Nothing here is imported until a model of nnsight is passed.
"""

from interventions.tracing.hosts import backend
from interventions.tracing.inputs import load
from interventions.tracing.operations import operations_listed
from interventions.tracing.sweeps import measured
from interventions.tracing.verbs import interchange, intervene, record, run, run_to

__all__ = ["backend", "interchange", "intervene", "load", "measured", "operations_listed", "record", "run", "run_to"]
