"""Read and replace the internals of any torch model, unmodified.

`describe(model)` lists what can be addressed, `run` and `record` read activations, `intervene` replaces them around
ordinary calls, `interchange` returns the counterfactual run of a base and a source, and `sweep` measures one
counterfactual for each location and position.

>>> import torch
>>> from interventions import Zero, intervene
>>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
>>> with intervene(net, module="1", op=Zero()) as handle:
...     output = net(torch.ones(3, 4))
>>> torch.equal(output, net[2].bias.expand(3, 2)), handle.firings
(True, {Location(module='1'): 1})
"""

from typing import TYPE_CHECKING

from interventions.public_names import import_when_used

if TYPE_CHECKING:
    from interventions import exceptions as exceptions
    from interventions import metrics
    from interventions.analysis.attention_maps import attention_map
    from interventions.analysis.averages import mean_of
    from interventions.analysis.collect import collect
    from interventions.analysis.collected import Collected
    from interventions.analysis.grids import Grid
    from interventions.analysis.path_sweeps import sweep_paths
    from interventions.analysis.paths import path_patch
    from interventions.analysis.plots import Picture, heat_map
    from interventions.analysis.result import Result, data_frame, plain_data
    from interventions.analysis.sweeps import sweep
    from interventions.arguments import checking
    from interventions.attribution.attribution_patch import attribution_patch
    from interventions.attribution.circuits import Circuit, circuit
    from interventions.attribution.edge_attribution import edge_attribution
    from interventions.attribution.edges import Edges
    from interventions.attribution.heads import heads
    from interventions.describe import describe
    from interventions.editing.bake import bake
    from interventions.editing.directions import Direction, ablate_direction, direction, everywhere
    from interventions.editing.knockout import Knockout, knockout
    from interventions.errors import InterventionError
    from interventions.execution.deferring import deferring_head
    from interventions.execution.origins import Stored
    from interventions.execution.requests import Handle
    from interventions.execution.run import Activations, Run
    from interventions.execution.stamps import trusting, unchanged
    from interventions.host_copies import keep_on_host, on_host
    from interventions.interchanges import interchange, intervene
    from interventions.lenses.fit_lens import fit_lens
    from interventions.lenses.logit_lens import Lens, logit_lens
    from interventions.lenses.probe import Probes, probe
    from interventions.lenses.tuned_lens import TunedLens
    from interventions.locations import SITES, Location, as_location
    from interventions.metrics import Metric, kl, log_probability, logit_difference, normalized, probability
    from interventions.models.answers import Answers, UnknownAnswer, answering, logits_of, rule_of, unanswered
    from interventions.models.architectures import Architecture, architecture
    from interventions.models.overrides import register_blocks
    from interventions.models.places import Place
    from interventions.models.stacks import Stack
    from interventions.models.wrappers import Model
    from interventions.names import in_one_line, label, printable, printed, shown
    from interventions.operators import Add, Interpolate, Mean, Mixup, Noise, Swap, Zero
    from interventions.positions import Selection, select
    from interventions.renames import renamed, renamed_in
    from interventions.runs import record, run, run_to
    from interventions.saving.saving import Saved, load, save
    from interventions.subspaces import PCA, BoundlessRotation, Mask, Rotation, SparseCoder, Subspace
    from interventions.version import __version__ as __version__

__all__ = [
    "PCA",
    "SITES",
    "Activations",
    "Add",
    "Answers",
    "Architecture",
    "BoundlessRotation",
    "Circuit",
    "Collected",
    "Direction",
    "Edges",
    "Grid",
    "Handle",
    "Interpolate",
    "InterventionError",
    "Knockout",
    "Lens",
    "Location",
    "Mask",
    "Mean",
    "Metric",
    "Mixup",
    "Model",
    "Noise",
    "Picture",
    "Place",
    "Probes",
    "Result",
    "Rotation",
    "Run",
    "Saved",
    "Selection",
    "SparseCoder",
    "Stack",
    "Stored",
    "Subspace",
    "Swap",
    "TunedLens",
    "UnknownAnswer",
    "Zero",
    "ablate_direction",
    "answering",
    "architecture",
    "as_location",
    "attention_map",
    "attribution_patch",
    "bake",
    "checking",
    "circuit",
    "collect",
    "data_frame",
    "deferring_head",
    "describe",
    "direction",
    "edge_attribution",
    "everywhere",
    "fit_lens",
    "heads",
    "heat_map",
    "import_when_used",
    "in_one_line",
    "interchange",
    "intervene",
    "keep_on_host",
    "kl",
    "knockout",
    "label",
    "load",
    "log_probability",
    "logit_difference",
    "logit_lens",
    "logits_of",
    "mean_of",
    "metrics",
    "normalized",
    "on_host",
    "path_patch",
    "plain_data",
    "printable",
    "printed",
    "probability",
    "probe",
    "record",
    "register_blocks",
    "renamed",
    "renamed_in",
    "rule_of",
    "run",
    "run_to",
    "save",
    "select",
    "shown",
    "sweep",
    "sweep_paths",
    "trusting",
    "unanswered",
    "unchanged",
]

_NAMES = {
    "interventions": "exceptions metrics",
    "interventions.analysis.attention_maps": "attention_map",
    "interventions.analysis.averages": "mean_of",
    "interventions.analysis.collect": "collect",
    "interventions.analysis.collected": "Collected",
    "interventions.analysis.grids": "Grid",
    "interventions.analysis.path_sweeps": "sweep_paths",
    "interventions.analysis.paths": "path_patch",
    "interventions.analysis.plots": "Picture heat_map",
    "interventions.analysis.result": "Result data_frame plain_data",
    "interventions.analysis.sweeps": "sweep",
    "interventions.arguments": "checking",
    "interventions.attribution.attribution_patch": "attribution_patch",
    "interventions.attribution.circuits": "Circuit circuit",
    "interventions.attribution.edge_attribution": "edge_attribution",
    "interventions.attribution.edges": "Edges",
    "interventions.attribution.heads": "heads",
    "interventions.describe": "describe",
    "interventions.editing.bake": "bake",
    "interventions.editing.directions": "Direction ablate_direction direction everywhere",
    "interventions.editing.knockout": "Knockout knockout",
    "interventions.errors": "InterventionError",
    "interventions.execution.deferring": "deferring_head",
    "interventions.execution.origins": "Stored",
    "interventions.execution.requests": "Handle",
    "interventions.execution.run": "Activations Run",
    "interventions.execution.stamps": "trusting unchanged",
    "interventions.host_copies": "keep_on_host on_host",
    "interventions.interchanges": "interchange intervene",
    "interventions.lenses.fit_lens": "fit_lens",
    "interventions.lenses.logit_lens": "Lens logit_lens",
    "interventions.lenses.probe": "Probes probe",
    "interventions.lenses.tuned_lens": "TunedLens",
    "interventions.locations": "Location SITES as_location",
    "interventions.metrics": "Metric kl log_probability logit_difference normalized probability",
    "interventions.models.answers": "Answers UnknownAnswer answering logits_of rule_of unanswered",
    "interventions.models.architectures": "Architecture architecture",
    "interventions.models.overrides": "register_blocks",
    "interventions.models.places": "Place",
    "interventions.models.stacks": "Stack",
    "interventions.models.wrappers": "Model",
    "interventions.names": "in_one_line label printable printed shown",
    "interventions.operators": "Add Interpolate Mean Mixup Noise Swap Zero",
    "interventions.positions": "Selection select",
    "interventions.public_names": "import_when_used",
    "interventions.renames": "renamed renamed_in",
    "interventions.runs": "record run run_to",
    "interventions.saving.saving": "Saved load save",
    "interventions.subspaces": "BoundlessRotation Mask PCA Rotation SparseCoder Subspace",
    "interventions.version": "__version__",
}
"""The public names by the modules that define them, which are imported when a name is first used."""


if not TYPE_CHECKING:  # type checkers take any name from a module that has one
    __getattr__ = import_when_used(__name__, _NAMES, {"normalised": "interventions.normalized"})


def __dir__() -> list[str]:
    """List the public names alone, without those of submodules."""
    return sorted(__all__)
