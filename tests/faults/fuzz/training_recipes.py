"""Right calls of what trains: `fit`, `steps`, `mutual`, `chain`, `teach`, students, schedules and weights."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import distill
from distill import KD, Labels, Rows, Schedule
from distill.objectives import Objective
from interventions import Location
from tests.distill.tiny_models import bert, gpt2_lm
from tests.faults.fuzz.attack import Recipe
from tests.faults.fuzz.interventions_recipes import network

QUIET = Console(quiet=True)
UNHASHABLE = (
    "[]|[None]|[1]|[-9]|[text]|[nan]|nested|{}|{text: 1}|{1: None}|set|slice|array|array of objects|no columns|"
    "ragged table|nan table|rows"
)
SHORT = Schedule(steps=1, batch_size=2)
PLACE = Location(module="0")


def rows() -> Rows:
    """Return four examples with labels."""
    drawn = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    return Rows({"x": drawn, "labels": torch.arange(4) % 2})


def read() -> Rows:
    """Return four short texts."""
    ids = torch.randint(5, 30, (4, 5), generator=torch.Generator().manual_seed(0))
    return Rows({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


@functools.cache
def encoder(layers: int) -> nn.Module:
    """Return the one tiny BERT of so many layers."""
    torch.manual_seed(layers)
    return bert(layers).eval()


def sides() -> dict[Location, Location]:
    """Return the mapping of the small networks."""
    return {PLACE: PLACE}


def trained(teacher: Any, student: Any, mapping: Any = None, data: Any = None, **settings: Any) -> Any:
    """Take the steps of a training."""
    given = {"objective": KD(), "schedule": SHORT} | settings
    return list(distill.steps(teacher, student, mapping, data, **given))


def used(objective: Objective, *, mapping: Any = None) -> Any:
    """Train a small network by an objective."""
    return trained(network(), network(), mapping, rows(), objective=objective)


@functools.cache
def decoder(layers: int) -> nn.Module:
    """Return the one tiny GPT-2 of so many layers."""
    torch.manual_seed(layers)
    return gpt2_lm(layers).eval()


def prompts() -> Rows:
    """Return three prompts with completions."""
    ids = torch.tensor([[5, 6, 7], [8, 9, 5], [6, 6, 9]])
    return Rows({"input_ids": ids, "labels": ids.where(torch.arange(3) > 0, -100)})


def written(**settings: Any) -> Any:
    """Train on what a student writes."""
    return trained(decoder(2), decoder(1), {}, distill.Written(**settings))


def fitted(**settings: Any) -> Any:
    """Call `fit`."""
    return distill.fit(console=QUIET, **settings)


def taught(**settings: Any) -> Any:
    """Call `teach` on a task of three rows."""
    return distill.teach(console=QUIET, **settings)


def teacher_of(**settings: Any) -> Any:
    """Call `teacher_of` with a cache of its own."""
    before = os.environ.get("DISTILL_CACHE")
    os.environ["DISTILL_CACHE"] = str(Path.cwd())
    try:
        return distill.teacher_of(console=QUIET, **settings)
    finally:
        os.environ.pop("DISTILL_CACHE") if before is None else os.environ.update(DISTILL_CACHE=before)


def task() -> distill.Task:
    """Return a small task with a network."""
    recipe = distill.tasks.Recipe(steps=1, batch_size=2, lr=1e-3)
    return distill.Task("small", rows(), rows(), ("no", "yes"), lambda seed: network(), recipe=recipe)


def scheduled(**settings: Any) -> Any:
    """Train for a step or two by a schedule."""
    return trained(network(), network(), data=rows(), schedule=Schedule(**{"steps": 1} | settings))


def mapped(teacher: Any, student: Any) -> Any:
    """Train with interchanges at a place of each network."""
    objective = distill.DIITO(positions=None)
    return trained(network(), network(), {teacher: student}, rows(), objective=objective)


def weighted(weight: Callable[[float], float]) -> Any:
    """Train with a weight of the one term."""
    return trained(network(), network(), data=rows(), weights={"kd": weight})


NETWORKS = "linear|training network|identity"
LEARNING = "linear|training network"
DATA = "rows|floats|odd shape|half tensor|array"
FUNCTIONS = "identity|empty network|linear|training network"  # from an output to its answer
SECONDS = {
    "schedule": "None", "output_dir": "None|text|digits|path", "resume": "False",
    "tokenizer": "None|[]|[None]|()", "every": "count|digits", "title": "text", "accelerator": "None",
    "answers": f"None|{FUNCTIONS}",
}  # fmt: skip

RECIPES = [
    Recipe(
        "distill.fit", fitted,
        lambda: {"teacher": network(), "student": network(), "mapping": sides(), "data": rows(), "objective": KD(),
                 "weights": {"kd": 1.0}, "eval_data": rows(), "epochs": None, "steps": 1, "batch_size": 2, "lr": 1e-3,
                 "seed": 0, "schedule": None, "output_dir": None, "resume": False, "every": 200, "title": "fit",
                 "accelerator": None, "answers": None, "tokenizer": None, "cache": "kept", "top_k": 2},
        {"teacher": NETWORKS, "student": LEARNING, "mapping": "{}|()|None", "data": DATA, "objective": "None",
         "cache": "text|digits|path", "top_k": "None|count",
         "weights": "None|{}", "eval_data": "None|rows|nan table", "epochs": "None|positive", "steps": "None|count",
         "batch_size": "None|count", "lr": "None|positive", "seed": "None|seed"} | SECONDS,
        own=("teacher", "student"),
    ),
    Recipe(
        "distill.steps", trained,
        lambda: {"teacher": network(), "student": network(), "mapping": sides(), "data": rows(), "objective": KD(),
                 "weights": {"kd": 1.0}, "schedule": SHORT, "checkpoints": None, "accelerator": None, "trained": None,
                 "answers": None},
        {"teacher": NETWORKS, "student": LEARNING, "mapping": "{}|()|None", "data": DATA, "objective": "None",
         "weights": "None|{}", "schedule": "None", "checkpoints": "None", "accelerator": "None", "trained": "None",
         "answers": f"None|{FUNCTIONS}"},
        own=("teacher", "student"),
    ),
    Recipe(
        "distill.mutual", lambda **settings: distill.mutual(console=QUIET, **settings),
        lambda: {"networks": [network(), network()], "data": rows(), "objective": KD(), "own": Labels(),
                 "edges": [(0, 1)], "mapping": sides(), "weights": {"kd": 1.0}, "eval_data": None, "schedule": SHORT,
                 "output_dir": None, "resume": False, "every": 200, "title": "mutual", "accelerator": None,
                 "answers": None, "tokenizer": None, "callbacks": (), "track": ()},
        {"networks": "choice", "data": "rows", "objective": "None", "own": "None|[]|()", "edges": "None|[]|()|{}",
         "mapping": "{}|()|None", "weights": "None|{}", "eval_data": "None|rows|nan table"} | SECONDS,
    ),
    Recipe(
        "distill.chain", lambda **settings: distill.chain(console=QUIET, **settings),
        lambda: {"networks": [network(), network()], "data": rows(), "mapping": sides(), "objective": KD(),
                 "schedule": SHORT, "output_dir": None, "resume": False, "answers": None},
        {"networks": "choice", "data": DATA, "mapping": "{}|None|[None]", "objective": "None"} | {
            name: SECONDS[name] for name in ("schedule", "output_dir", "resume", "answers")
        },
    ),
    Recipe(
        "distill.teach", taught,
        lambda: {"network": network(), "task": task(), "schedule": None, "seed": 0, "output_dir": None,
                 "resume": False, "answers": None},
        {"network": LEARNING, "task": "choice", "seed": "seed"} | {
            name: SECONDS[name] for name in ("schedule", "output_dir", "resume", "answers")
        },
        own=("network",),
    ),
    Recipe(
        "distill.teacher_of", teacher_of, lambda: {"task": task(), "seed": 0}, {"task": "choice", "seed": "seed"},
    ),
    Recipe(
        "distill.from_layers", lambda **settings: distill.from_layers(**settings),
        lambda: {"teacher": encoder(3), "layers": 2, "by": None, "stack": None, "inputs": None, "copy": True},
        {"teacher": "choice", "layers": "1|numpy int|[1]", "by": "None", "stack": "None|empty text",
         "inputs": "None|whole tensor", "copy": "flag"},
        own=("inputs",),
    ),
    Recipe(
        "distill.from_width", distill.from_width,
        lambda: {"teacher": encoder(2), "width": 8, "heads": None, "intermediate": None, "by": None},
        {"teacher": "choice", "width": "None", "heads": "None|1|numpy int", "intermediate": "None|count", "by": "None"},
    ),
    Recipe(
        "distill.importance", distill.importance,
        lambda: {"model": encoder(2), "data": read(), "search": 1, "criterion": "kl", "stack": None, "batch_size": 2,
                 "answers": None},
        {"model": "choice", "data": "rows", "search": "None|1|numpy int", "criterion": "choice",
         "stack": "None|empty text", "batch_size": "count", "answers": "None|0|-1|[None]"},
        own=("answers",),
    ),
    Recipe(
        "distill.from_width(units)", distill.from_width,
        lambda: {"teacher": encoder(2), "width": None, "heads": None, "intermediate": 7},
        {"width": "None", "intermediate": "count"},
    ),
    Recipe(
        "distill.reinitialized", distill.reinitialized, lambda: {"network": network(), "seed": 0},
        {"network": "network|!class of network|!causal model|!meta network", "seed": "seed"},
    ),
    Recipe(
        "distill.layer_mapping", distill.layer_mapping,
        lambda: {"teacher": encoder(3), "student": encoder(2), "kind": "full", "remainder": "spread"},
        {"teacher": "choice", "student": "choice", "kind": "choice", "remainder": "choice"},
    ),
    Recipe(
        "distill.Schedule", scheduled,
        lambda: {"epochs": 1, "steps": None, "batch_size": 2, "lr": 1e-3, "warmup": 0.0, "weight_decay": 0.01,
                 "clip": 1.0, "seed": 0, "accumulate": 1, "optimizer": "adamw", "decay": "linear",
                 "param_dtype": "float32", "workers": 0, "group_by_length": None},
        {"epochs": "positive", "steps": "None|count", "batch_size": "count", "lr": "positive",
         "warmup": "share", "weight_decay": "not negative", "clip": "None|positive|inf", "seed": "seed",
         "accumulate": "1|numpy int", "optimizer": "choice", "decay": "type|identity|empty network",
         "param_dtype": "choice",
         "workers": "counter", "group_by_length": "None|False"},
        own=("decay",), skip={"epochs": "huge"},
    ),
    Recipe(
        "distill.Written", written,
        lambda: {"prompts": prompts(), "by": "student", "share": 1.0, "max_new_tokens": 2, "temperature": 1.0,
                 "top_k": 0, "top_p": 1.0, "generation": {"min_p": 0.1}, "prompt_tokens": None},
        {"prompts": "rows", "by": "choice", "share": "share|function|identity|empty network", "max_new_tokens": "count",
         "temperature": "positive", "top_k": "counter", "top_p": "share", "generation": "{}",
         "prompt_tokens": "None|count"}, own=("share",),
    ),
    Recipe(
        "distill.Ramp", lambda **settings: weighted(distill.Ramp(**settings)),
        lambda: {"start": 1.0, "end": 0.0, "until": 1.0},
        {"start": "number", "end": "number", "until": "share above 0"},
    ),
    Recipe(
        "distill.steps(weight)", weighted, lambda: {"weight": distill.Ramp(1.0, 0.0)},
        {"weight": "number|type|identity|empty network"}, own=("weight",),
    ),
    Recipe(
        "distill.steps(location)", mapped,
        lambda: {"teacher": PLACE, "student": PLACE}, {"teacher": "choice", "student": "choice"},
        skip={"teacher": UNHASHABLE},
    ),
]  # fmt: skip
