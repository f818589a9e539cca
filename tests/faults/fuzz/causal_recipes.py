"""Right calls of causal models, of their methods, and of what trains and aligns networks with them."""

from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import distill
from distill import CausalModel, Schedule, objectives
from interventions import Location, Rotation
from tests.distill.wired import SUM, TOKENS, Reader, turned
from tests.faults.fuzz.attack import Recipe
from tests.faults.fuzz.training_recipes import FUNCTIONS

QUIET = Console(quiet=True)
HIDDEN = Location(module="hidden")
PART = Location(module="hidden", dims=[0, 1])


def draws() -> torch.Generator:
    """Return a generator."""
    return torch.Generator().manual_seed(0)


def values() -> dict[str, Tensor]:
    """Return inputs of `SUM`."""
    return {name: torch.tensor([0, 1, 2, place]) for place, name in enumerate("abc")}


def settings() -> dict[str, Any]:
    """Return what `SUM` is made of."""
    return {
        "inputs": {name: range(3) for name in "abc"},
        "mechanisms": {"inner": lambda a, b: a + b, "answer": lambda inner, c: (inner + c) % 3},
        "output": "answer",
        "encode": lambda values: torch.stack([values[name] for name in "abc"], 1).float(),
        "decode": None,
        "sample": None,
        "domains": {"answer": range(3)},
        "positions": {"end": lambda values: values["a"] * 0},
    }


def made(**given: Any) -> Any:
    """Make a causal model and use all of it."""
    model = CausalModel(**given)
    drawn = model.sample(4, draws())
    model.answers(model.run(drawn))
    model.encode(drawn)
    model.decode(torch.zeros(4, 3), drawn)
    if "end" in model.positions:
        model.select("end", drawn)
    return model.pairs(4, model.variables[-1], draws(), effective=None)


def of_domain(domain: Any) -> Any:
    """Make the causal model with another domain of an input."""
    given = settings()
    return made(**given | {"inputs": given["inputs"] | {"c": domain}})


def of_mechanism(mechanism: Any) -> Any:
    """Make the causal model with another last mechanism."""
    given = settings()
    return made(**given | {"mechanisms": given["mechanisms"] | {"answer": mechanism}})


def of_position(position: Any) -> Any:
    """Make the causal model with another position."""
    return made(**settings() | {"positions": {"end": position}})


def subspace() -> dict[str, Location]:
    """Return a mapping of the inner variable to a direction."""
    return {"inner": Location(module="hidden", subspace=Rotation(1))}


def aligned(**given: Any) -> Any:
    """Learn an alignment."""
    return distill.align(console=QUIET, **given)


def searched(**given: Any) -> Any:
    """Search an alignment."""
    return distill.search_alignment(console=QUIET, **given)


def fitted(**given: Any) -> Any:
    """Train a network to compute as the causal model."""
    return distill.fit(SUM, turned(), {"inner": PART}, console=QUIET, steps=1, **given)


def trained(objective: Any, mapping: Any = None) -> Any:
    """Train a network by an objective on the causal model."""
    mapping = {"inner": PART} if mapping is None else mapping
    schedule = Schedule(steps=1, batch_size=4)
    return list(distill.steps(SUM, turned(), mapping, objective=objective, schedule=schedule))


def weighed(weight: Any) -> Any:
    """Align with a weight of the one term."""
    return aligned(causal_model=SUM, network=turned(), mapping=subspace(), weights={"das": weight}, steps=1,
                   batch_size=4, pairs=0)  # fmt: skip


TABLE = "choice"
COMMON = {"weights": "None|{}", "steps": "count", "batch_size": "count", "lr": "None|positive", "seed": "seed",
          "coldest": "positive", "answers": f"None|{FUNCTIONS}"}  # fmt: skip

RECIPES = [
    Recipe(
        "distill.CausalModel", made, settings,
        {"inputs": "choice", "mechanisms": "choice", "output": "choice", "encode": "identity|empty network",
         "decode": "None", "sample": "None", "domains": "choice", "positions": "None|{}"},
    ),
    Recipe(
        "distill.CausalModel(domain)", of_domain, lambda: {"domain": range(3)},
        {"domain": "[1]|[-9]|(1, 2, 3)|range"},
    ),
    Recipe(
        "distill.CausalModel(mechanism)", of_mechanism, lambda: {"mechanism": lambda inner, c: (inner + c) % 3},
        {"mechanism": "choice"},
    ),
    Recipe(
        "distill.CausalModel(position)", of_position, lambda: {"position": lambda values: values["a"] * 0},
        {"position": "choice"},
    ),
    Recipe("distill.CausalModel.run", SUM.run, lambda: {"values": values()}, {"values": TABLE}),
    Recipe("distill.CausalModel.run(column)", lambda column: SUM.run(values() | {"a": column}),
           lambda: {"column": torch.zeros(4, dtype=torch.int64)}, {"column": "choice"}),
    Recipe("distill.CausalModel.answers", SUM.answers, lambda: {"values": values()}, {"values": TABLE}),
    Recipe("distill.CausalModel.encode", SUM.encode, lambda: {"values": values()}, {"values": TABLE}),
    Recipe(
        "distill.CausalModel.decode", SUM.decode, lambda: {"logits": torch.zeros(4, 3), "values": values()},
        {"logits": "choice", "values": TABLE},
    ),
    Recipe(
        "distill.CausalModel.interchange", SUM.interchange,
        lambda: {"base": values(), "sources": {"inner": values()}}, {"base": TABLE, "sources": "{}"},
    ),
    Recipe(
        "distill.CausalModel.interchange(source)", lambda source: SUM.interchange(values(), {"inner": source}),
        lambda: {"source": values()}, {"source": TABLE},
    ),
    Recipe(
        "distill.CausalModel.select", TOKENS.select,
        lambda: {"positions": "first", "values": {name: torch.arange(3) for name in ("a", "gap", "c")}},
        {"positions": "anything", "values": TABLE},
    ),
    Recipe(
        "distill.CausalModel.sample", SUM.sample, lambda: {"n": 3, "generator": draws(), "device": "cpu"},
        {"n": "count", "generator": "draws", "device": "None"}, skip={"n": "huge"},
    ),
    Recipe(
        "distill.CausalModel.pairs", SUM.pairs,
        lambda: {"n": 3, "variables": "inner", "generator": draws(), "effective": 0.5, "device": "cpu"},
        {"n": "count", "variables": "choice", "generator": "draws", "effective": "None|share", "device": "None"},
        skip={"n": "huge"},
    ),
    Recipe(
        "distill.CausalModel.enumerate", SUM.enumerate, lambda: {"limit": 100, "device": "cpu"},
        {"limit": "inf", "device": "None"},
    ),
    Recipe("distill.CausalModel.draw", SUM.draw, dict, {}),
    Recipe(
        "distill.IIT", lambda **given: trained(objectives.IIT(**given)),
        lambda: {"strict": (), "detach_source": False, "positions": None},
        {"strict": "[]|()|{}", "detach_source": "flag", "positions": "None|{}"},
    ),
    Recipe(
        "distill.IIT(strict)", lambda place: trained(objectives.IIT(strict=[place])), lambda: {"place": HIDDEN},
        {"place": "choice"},
    ),
    Recipe(
        "distill.steps(causal)", lambda **given: list(distill.steps(schedule=Schedule(steps=1, batch_size=4), **given)),
        lambda: {"teacher": SUM, "student": turned(), "mapping": {"inner": PART}, "data": values()},
        {"teacher": "choice", "student": "choice", "mapping": "None|{}|()", "data": "None"}, own=("student",),
    ),
    Recipe(
        "distill.fit(causal)", fitted,
        lambda: {"eval_data": values(), "batch_size": 4}, {"eval_data": "None", "batch_size": "count|None"},
    ),
    Recipe(
        "distill.align", aligned,
        lambda: {"causal_model": SUM, "network": turned(), "mapping": subspace(), "data": values(), "positions": None,
                 "eval_data": values(), "weights": {"das": 1.0}, "steps": 1, "batch_size": 4, "lr": None, "seed": 0,
                 "coldest": 0.1, "pairs": 8, "controls": (), "accelerator": None, "answers": None},
        {"causal_model": "choice", "network": "choice", "mapping": "choice", "data": "None", "positions": "None|{}",
         "eval_data": "None", "pairs": "counter", "controls": "[]|()|empty text", "accelerator": "None"} | COMMON,
        own=("network",), skip={"steps": "huge", "pairs": "huge", "batch_size": "huge"},
    ),
    Recipe("distill.align(weight)", weighed, lambda: {"weight": 1.0}, {"weight": "number"}),
    Recipe(
        "distill.search_alignment", searched,
        lambda: {"causal_model": SUM, "network": turned(), "variables": "inner", "at": [HIDDEN], "data": values(),
                 "positions": None, "subspace": lambda: Rotation(1), "weights": {"das": 1.0}, "steps": 1,
                 "batch_size": 4, "lr": None, "seed": 0, "coldest": 0.1, "pairs": 8, "answers": None},
        {"causal_model": "choice", "network": "choice", "variables": "None", "at": "choice", "data": "None",
         "positions": "None|[None]", "subspace": "None", "pairs": "count"} | COMMON | {"batch_size": "count|None"},
        own=("network",), skip={"steps": "huge", "pairs": "huge", "batch_size": "huge"},
    ),
    Recipe(
        "distill.search_alignment(positions)",
        lambda positions: searched(causal_model=TOKENS, network=Reader(), at=[HIDDEN], positions=positions, pairs=8),
        lambda: {"positions": ["first"]}, {"positions": "None|0|1|-1|numpy int|[None]|[1]|(1, 2, 3)"},
    ),
]  # fmt: skip
