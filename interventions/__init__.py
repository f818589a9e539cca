"""Read and replace the internals of any torch model, unmodified.

>>> import torch
>>> from interventions import Zero, intervene
>>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
>>> with intervene(net, module="1", op=Zero()) as handle:
...     output = net(torch.ones(3, 4))
>>> torch.equal(output, net[2].bias.expand(3, 2)), handle.firings
(True, {Location(module='1'): 1})
"""

from interventions.architectures import Architecture, Place, Stack, architecture
from interventions.averages import mean_of
from interventions.descriptions import describe
from interventions.errors import InterventionError
from interventions.interchanges import Handle, interchange, intervene
from interventions.locations import SITES, Location, as_location
from interventions.operators import Add, Interpolate, Mean, Mixup, Noise, Swap, Zero
from interventions.positions import Selection, select
from interventions.runs import Activations, Run, record, run, run_to

__all__ = [
    "SITES",
    "Activations",
    "Add",
    "Architecture",
    "Handle",
    "Interpolate",
    "InterventionError",
    "Location",
    "Mean",
    "Mixup",
    "Noise",
    "Place",
    "Run",
    "Selection",
    "Stack",
    "Swap",
    "Zero",
    "architecture",
    "as_location",
    "describe",
    "interchange",
    "intervene",
    "mean_of",
    "record",
    "run",
    "run_to",
    "select",
]
