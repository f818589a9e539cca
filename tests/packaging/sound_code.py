"""Code of a user, in which mypy --strict finds no error when the packages have types. It is read, and not run."""

import torch

import distill
import interventions
from distill import KD, FitResult
from interventions import Location, Run, Zero, intervene


def use() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    run: Run = interventions.run(net, torch.ones(1, 4))
    with intervene(net, module="1", op=Zero()) as handle:
        net(torch.ones(1, 4))
    firings: int = handle.firings[Location(module="1")] + 1
    result: FitResult = distill.fit(net, net, data="pvr", objective=[KD(2.0)], steps=2)
    version: str = distill.__version__ + interventions.__version__
    print(run.logits, firings, result.student, version)
