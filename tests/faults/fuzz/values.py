"""Values that somebody hands over by mistake, each made anew whenever it is asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from distill import CausalModel, Rows
from interventions import Location, Zero


class Planted(Exception):
    """Raised by code of the user: it passes as it is."""


class Nothing(nn.Module):
    """A network that forgets to return."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, *args: Any, **kwargs: Any) -> None:
        return None


class Raising(nn.Module):
    """A network with a fault of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, *args: Any, **kwargs: Any) -> None:
        raise Planted("the network's own")


def raising(*args: Any, **kwargs: Any) -> None:
    """Raise an error of the user."""
    raise Planted("the function's own")


def nothing(*args: Any, **kwargs: Any) -> None:
    """Return nothing."""


def hooked() -> nn.Module:
    """Return a network with a hook of the user that raises."""
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    network[0].register_forward_hook(raising)
    return network


def meta() -> nn.Module:
    """Return a network without values."""
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def spoilt() -> nn.Module:
    """Return a network whose weights are NaN."""
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.constant_(network[0].weight, torch.nan)
    return network


def causal() -> CausalModel:
    """Return a causal model."""
    return CausalModel({"x": range(3)}, {"y": lambda x: x}, "y", encode=lambda values: values["x"][:, None].float())


PLAIN: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "False": lambda: False,
    "0": lambda: 0,
    "1": lambda: 1,
    "-1": lambda: -1,
    "7": lambda: 7,
    "huge": lambda: 10**30,
    "-huge": lambda: -(10**30),
    "0.5": lambda: 0.5,
    "1.0": lambda: 1.0,
    "2.5": lambda: 2.5,
    "-0.5": lambda: -0.5,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "-inf": lambda: -float("inf"),
    "complex": lambda: 1 + 2j,
    "numpy int": lambda: np.int64(1),
    "numpy float": lambda: np.float64(0.5),
    "empty text": lambda: "",
    "text": lambda: "nonsense",
    "digits": lambda: "3",
    "control text": lambda: "a\x1b[31m\nb",
    "bytes": lambda: b"nonsense",
    "path": lambda: Path("nowhere/at/all"),
    "[]": list,
    "[None]": lambda: [None],
    "[1]": lambda: [1],
    "[-9]": lambda: [-9],
    "[text]": lambda: ["nonsense"],
    "[nan]": lambda: [float("nan")],
    "nested": lambda: [[1], [[2]]],
    "()": lambda: (),
    "(1, 2, 3)": lambda: (1, 2, 3),
    "{}": dict,
    "{text: 1}": lambda: {"nonsense": 1},
    "{1: None}": lambda: {1: None},
    "set": lambda: {1, 2},
    "range": lambda: range(2, 5),
    "slice": lambda: slice(None, None, 0),
    "generator": lambda: (each for each in (1, 2)),
    "object": lambda: object(),
    "type": lambda: int,
    "function": lambda: nothing,
    "raising function": lambda: raising,
    "draws": lambda: torch.Generator().manual_seed(0),
}
TENSORS: dict[str, Callable[[], Any]] = {
    "scalar tensor": lambda: torch.tensor(1.0),
    "empty tensor": lambda: torch.empty(0),
    "empty rows": lambda: torch.empty(0, 4),
    "floats": lambda: torch.randn(2, 4, generator=torch.Generator().manual_seed(0)),
    "odd shape": lambda: torch.ones(5, 3, 2),
    "nan tensor": lambda: torch.full((2, 4), torch.nan),
    "inf tensor": lambda: torch.full((2, 4), torch.inf),
    "whole tensor": lambda: torch.ones(2, 4, dtype=torch.int64),
    "huge whole tensor": lambda: torch.full((2, 4), 2**62),
    "bool tensor": lambda: torch.ones(2, 4, dtype=torch.bool),
    "bytes tensor": lambda: torch.ones(2, 4, dtype=torch.uint8),
    "complex tensor": lambda: torch.ones(2, 4, dtype=torch.complex64),
    "half tensor": lambda: torch.ones(2, 4, dtype=torch.float16),
    "meta tensor": lambda: torch.ones(2, 4, device="meta"),
    "sparse tensor": lambda: torch.eye(4).to_sparse(),
    "array": lambda: np.ones((2, 4)),
    "array of objects": lambda: np.array([None, "a"], dtype=object),
}
NETWORKS: dict[str, Callable[[], Any]] = {
    "identity": nn.Identity,
    "empty network": nn.Sequential,
    "linear": lambda: nn.Linear(4, 4),
    "training network": lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 4)).train(),
    "returns None": Nothing,
    "raising network": Raising,
    "raising hook": hooked,
    "meta network": meta,
    "nan network": spoilt,
    "class of network": lambda: nn.Linear,
    "causal model": causal,
}
NOUNS: dict[str, Callable[[], Any]] = {
    "far layer": lambda: Location(99),
    "no such module": lambda: Location(module="nowhere.at.all"),
    "far dims": lambda: Location(module="0", dims=[10**6]),
    "operator": Zero,
    "rows": lambda: Rows({"x": torch.ones(4, 4), "labels": torch.zeros(4, dtype=torch.int64)}),
    "no columns": lambda: {"x": []},
    "ragged table": lambda: {"x": torch.ones(4, 4), "labels": torch.zeros(3, dtype=torch.int64)},
    "nan table": lambda: {"x": torch.full((4, 4), torch.nan), "labels": torch.zeros(4, dtype=torch.int64)},
}
WRONG: dict[str, Callable[[], Any]] = PLAIN | TENSORS | NETWORKS | NOUNS
