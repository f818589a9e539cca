"""The functions of `interventions` on models of nnsight: on this machine, on a vLLM engine, or on another machine.

The reads and writes of an open block are put on the model as edits of nnsight, so that the user's own traces carry them
to wherever they run (`edits`, `visits`, `hook_points`). `run`, `interchange` and `sweep` make several traces as one job
(`jobs`, `plans`, `sessions`). Code is sent to another machine as source text, and the rest as data (`packing`). Nothing
here is imported until a model of nnsight is passed.
"""

from interventions.tracing.hosts import backend
from interventions.tracing.inputs import load
from interventions.tracing.operations import operations_listed
from interventions.tracing.sweeps import measured
from interventions.tracing.verbs import interchange, intervene, record, run, run_to

__all__ = ["backend", "interchange", "intervene", "load", "measured", "operations_listed", "record", "run", "run_to"]
