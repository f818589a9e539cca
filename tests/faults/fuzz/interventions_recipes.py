"""Right calls of the public names of `interventions`."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import interventions as iv
from interventions import Location
from interventions.models.overrides import EXCEPTIONS
from tests.faults.fuzz.attack import Recipe
from tests.interventions import tiny_models as models

PLACE = Location(module="0")
BLOCK = Location(1)


def network() -> nn.Module:
    """Return a network of two linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()


@functools.cache
def decoder() -> nn.Module:
    """Return the one tiny GPT-2 of the attacks."""
    torch.manual_seed(0)
    return models.gpt2().eval()


def x(seed: int = 0) -> Tensor:
    """Return inputs of the network."""
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))


def ids(seed: int = 0) -> dict[str, Tensor]:
    """Return inputs of the decoder."""
    return {"input_ids": torch.randint(1, 30, (2, 5), generator=torch.Generator().manual_seed(seed))}


def intervened(model: Any, inputs: Any, at: Any, **settings: Any) -> Any:
    """Run a model in a block."""
    with iv.intervene(model, at, **settings):
        return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def applied(op: Callable[..., Any]) -> Any:
    """Run the network with an operator at one place."""
    source = x(1) if op.needs_source else None
    return intervened(network(), x(), PLACE, op=op, source=source, generator=torch.Generator().manual_seed(0))


def swapped(subspace: nn.Module) -> Any:
    """Exchange the network's state in a subspace."""
    at = Location(module="0", subspace=subspace)
    return iv.interchange(network(), x(), x(1), at)


def recorded(model: Any, inputs: Any, at: Any, **settings: Any) -> Any:
    """Record a model's activations."""
    with iv.record(model, at, **settings) as kept:
        model(**inputs)
    return kept


def opened(folder: Any) -> Any:
    """Open activations that were collected."""
    iv.collect(network(), [x()], PLACE, "collected")
    return len(iv.Collected.open(folder))


def saved(folder: Any, **settings: Any) -> Any:
    """Save an operator and load it again."""
    given = {"interventions": {PLACE: iv.Zero()}, "model": network()} | settings
    iv.save(folder, **given)
    return iv.load(folder, network())


def loaded(model: Any, folder: Any, **settings: Any) -> Any:
    """Load an operator that was saved."""
    iv.save("saved", {PLACE: iv.Zero()}, model=network())
    return iv.load(folder, model, **settings)


def answered(model: Any, answers: Any) -> Any:
    """Run a model in a block that says what its answer is."""
    with iv.answering(model, answers):
        return iv.run(model, x()).logits


def deferred(model: Any, **settings: Any) -> Any:
    """Run a decoder in a block where its runs end before its head."""
    with iv.deferring_head(model, **settings):
        return iv.run(model, ids()).logits


def generated(steps: Any, positions: Any) -> Any:
    """Zero a block while the decoder writes three tokens."""
    with iv.intervene(decoder(), BLOCK, op=iv.Zero(), steps=steps, positions=positions):
        return decoder().generate(**ids(), max_new_tokens=3, do_sample=False)


def stored(**given: Any) -> Any:
    """Swap stored activations in."""
    return iv.interchange(decoder(), ids(), iv.Stored(**given), BLOCK)


def located(**given: Any) -> Any:
    """Zero what a location names."""
    return intervened(decoder(), ids(), Location(**given), op=iv.Zero())


def registered(model_type: Any, path: Any, **settings: Any) -> Any:
    iv.register_blocks(model_type, path, **settings)
    return EXCEPTIONS.pop(model_type).lists_in(network())


def grid() -> iv.Grid:
    """Return the grid of a small sweep."""
    return iv.sweep(decoder(), ids(), ids(1), [BLOCK], metric=iv.logit_difference(3, 4), positions=[0, 1])


def taken(rows: Any) -> Any:
    """Take rows of a run."""
    return iv.run(network(), x(), PLACE).take(rows)


def measured(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that makes a metric and measures logits with it."""
    return lambda **settings: make(**settings)(torch.randn(2, 5, 30, generator=torch.Generator().manual_seed(0)))


NETWORK = "linear|training network|identity|empty network"
POSITIONS = "None|0|1|-1|numpy int|[1]|range|(1, 2, 3)"
LEARNED, SIGMA = "number|scalar tensor", "not negative|scalar tensor"
TOKENS = "0|1|7|numpy int|bytes tensor"
SAVED_POSITIONS = f"{POSITIONS}|7|[-9]|whole tensor|huge whole tensor|bool tensor|bytes tensor"
STEPS = "None|0|1|7|numpy int|[1]|(1, 2, 3)|set|range|generator"
SAME = "training network|raising hook|meta network|nan network"
ANSWERS = "None|whole|text|function|raising function|type|network|operator|!causal model"
MODELS = "network|!class of network|!causal model"
PLACES = "[]|()|{}"
DRAWN = ("normal",)


def normal() -> dict[str, Any]:
    """Return what noise takes."""
    return {"sigma": 0.5, "relative": True, "normal": None}


def built(make: Callable[..., nn.Module]) -> Callable[..., Any]:
    """Return a function that makes a subspace and swaps in it."""
    return lambda **settings: swapped(make(**settings))


def operated(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that makes an operator and writes it."""
    return lambda **settings: applied(make(**settings))


def metric_of(make: Callable[..., Any], **right: Any) -> Recipe:
    """Return the recipe of a metric of tokens."""
    return Recipe(
        f"interventions.{make.__name__}", measured(make), lambda: {**right, "position": -1, "mask": None},
        {**dict.fromkeys(right, f"{TOKENS}|whole tensor"), "position": "0|1|-1|numpy int", "mask": "None"},
    )  # fmt: skip


RUNS = [
    Recipe(
        "interventions.run",
        iv.run,
        lambda: {
            "model": network(),
            "inputs": x(),
            "at": PLACE,
            "resumable": False,
            "detach": False,
            "device": None,
            "keep": None,
            "answers": None,
            "remote": False,
        },
        {
            "model": NETWORK + "|nan network",
            "inputs": "anything",
            "at": PLACES,
            "resumable": "flag",
            "detach": "flag",
            "device": "None",
            "keep": "None|function|network|!causal model",
            "answers": ANSWERS,
            "remote": "False",
        },
        own=("inputs", "model", "keep"),
    ),
    Recipe(
        "interventions.run of a decoder",
        iv.run,
        lambda: {"model": decoder(), "inputs": ids(), "at": BLOCK, "resumable": True},
        {"inputs": "anything", "at": PLACES, "resumable": "flag"},
        own=("inputs",),
    ),
    Recipe(
        "interventions.run_to",
        iv.run_to,
        lambda: {"model": decoder(), "inputs": ids(), "at": BLOCK, "resumable": False, "remote": False},
        {"model": "", "inputs": "whole tensor", "at": "", "resumable": "flag", "remote": "False"},
        own=("inputs", "model"),
    ),
    Recipe(
        "interventions.record",
        recorded,
        lambda: {"model": decoder(), "inputs": ids(), "at": BLOCK, "detach": False, "device": None},
        {"at": PLACES, "detach": "flag", "device": "None"},
    ),
    Recipe(
        "interventions.intervene",
        intervened,
        lambda: {
            "model": decoder(),
            "inputs": ids(),
            "at": BLOCK,
            "op": iv.Swap(),
            "source": ids(1),
            "positions": [1],
            "source_positions": None,
            "source_model": None,
            "source_at": None,
            "generator": None,
            "remote": False,
        },
        {
            "model": "",
            "at": "",
            "op": "None|operator",
            "source": "whole tensor",
            "positions": POSITIONS,
            "source_positions": POSITIONS,
            "source_model": "None",
            "source_at": "None",
            "generator": "None|draws",
            "remote": "False",
        },
        own=("model", "source", "source_model", "op"),
    ),
    Recipe(
        "interventions.intervene while it generates",
        generated,
        lambda: {"steps": [1], "positions": -1},
        {"steps": STEPS, "positions": "None|0|-1"},
    ),
    Recipe(
        "interventions.interchange",
        iv.interchange,
        lambda: {
            "model": decoder(),
            "base": ids(),
            "source": ids(1),
            "at": BLOCK,
            "op": None,
            "positions": [1],
            "source_positions": None,
            "source_model": None,
            "source_at": None,
            "generator": None,
            "record": (),
            "resume": True,
            "keep": None,
            "remote": False,
        },
        {
            "model": "",
            "base": "whole tensor",
            "source": "whole tensor",
            "at": "",
            "op": "None|operator",
            "positions": POSITIONS,
            "source_positions": POSITIONS,
            "source_model": "None",
            "source_at": "None",
            "generator": "None|draws",
            "record": PLACES,
            "resume": "flag",
            "keep": "None|function|identity|empty network|returns None",
            "remote": "False",
        },
        own=("model", "base", "source", "source_model", "op", "keep"),
    ),
    Recipe(
        "interventions.sweep",
        iv.sweep,
        lambda: {
            "model": decoder(),
            "base": ids(),
            "source": ids(1),
            "at": [BLOCK],
            "metric": iv.logit_difference(3, 4),
            "positions": [1],
            "source_positions": None,
            "source_model": None,
            "source_at": None,
            "op": None,
            "batch_size": None,
            "generator": None,
            "remote": False,
            "checkpoint": None,
            "console": None,
        },
        {
            "model": "",
            "base": "whole tensor",
            "source": "whole tensor",
            "at": "",
            "metric": "",
            "positions": "None|0|1|-1|7|[1]|range|(1, 2, 3)|{text: 1}|generator|numpy int",
            "source_positions": "None|0|1|-1|numpy int|[1]|{text: 1}",
            "source_model": "None",
            "source_at": "None",
            "op": "None|operator",
            "batch_size": "None|count|huge",
            "generator": "None|draws",
            "remote": "False",
            "checkpoint": "None|text|digits|path",
            "console": "None",
        },
        own=("model", "base", "source", "source_model", "op", "metric"),
    ),
    Recipe(
        "interventions.path_patch",
        iv.path_patch,
        lambda: {
            "model": decoder(),
            "base": ids(),
            "source": ids(1),
            "sender": Location(0),
            "receivers": Location(2),
            "positions": [1],
            "receiver_positions": None,
            "freeze": None,
            "record": (),
            "remote": False,
        },
        {
            "model": "",
            "base": "whole tensor",
            "source": "whole tensor",
            "sender": "",
            "receivers": "",
            "positions": POSITIONS,
            "receiver_positions": POSITIONS,
            "freeze": f"None|{PLACES}",
            "record": PLACES,
            "remote": "False",
        },
        own=("model", "base", "source"),
    ),
    Recipe(
        "interventions.sweep_paths",
        iv.sweep_paths,
        lambda: {
            "model": decoder(),
            "base": ids(),
            "source": ids(1),
            "senders": [Location(0)],
            "receivers": Location(2),
            "metric": iv.logit_difference(3, 4),
            "positions": [1],
            "receiver_positions": None,
            "freeze": None,
            "batch_size": None,
            "checkpoint": None,
            "console": None,
        },
        {
            "model": "",
            "base": "whole tensor",
            "source": "whole tensor",
            "senders": "",
            "receivers": "",
            "metric": "",
            "positions": "None|0|1|-1|7|[1]|range|(1, 2, 3)|{text: 1}|generator|numpy int",
            "receiver_positions": POSITIONS,
            "freeze": f"None|{PLACES}",
            "batch_size": "None|count|huge",
            "checkpoint": "None|text|digits|path",
            "console": "None",
        },
        own=("model", "base", "source", "metric"),
    ),
    Recipe(
        "interventions.mean_of",
        iv.mean_of,
        lambda: {
            "model": decoder(),
            "at": BLOCK,
            "batches": [ids(), ids(1)],
            "positions": None,
            "batch_size": None,
            "remote": False,
        },
        {
            "model": "",
            "at": "",
            "batches": "",
            "positions": POSITIONS,
            "batch_size": "None|count|huge",
            "remote": "False",
        },
        own=("model", "batches"),
    ),
    Recipe(
        "interventions.collect",
        iv.collect,
        lambda: {
            "model": decoder(),
            "data": [ids(), ids(1)],
            "at": BLOCK,
            "folder": "new",
            "positions": None,
            "dtype": None,
            "batch_size": 32,
            "process": None,
            "console": None,
        },
        {
            "model": "",
            "data": "",
            "at": "",
            "folder": "text|digits|path",
            "positions": POSITIONS,
            "dtype": "None",
            "batch_size": "count|huge",
            "process": "None",
            "console": "None",
        },
        own=("model", "data"),
    ),
    Recipe("interventions.Collected.open", opened, lambda: {"folder": "collected"}, {"folder": ""}),
    Recipe("interventions.Run.take", taken, lambda: {"rows": [0]}, {"rows": "0|1|-1|numpy int|[1]"}),
    Recipe(
        "interventions.answering",
        answered,
        lambda: {"model": network(), "answers": lambda output: output},
        {"model": f"{NETWORK}|nan network", "answers": f"None|{NETWORK}|nan network"},
        own=("model", "answers"),
    ),
    Recipe(
        "interventions.deferring_head",
        deferred,
        lambda: {"model": decoder(), "head": decoder().lm_head, "after": None, "least": 1},
        {"model": "", "head": "", "after": "None|identity|empty network", "least": "1|7|numpy int"},
        own=("model", "head"),
    ),
    Recipe(
        "interventions.Stored",
        stored,
        lambda: {"activations": {BLOCK: torch.ones(2, 5, 16)}, "mask": None},
        {"activations": "", "mask": "None|whole tensor|bool tensor|bytes tensor|half tensor"},
    ),
]
READS = [
    Recipe("interventions.architecture", iv.architecture, lambda: {"model": decoder()}, {"model": MODELS}),
    Recipe(
        "interventions.describe",
        iv.describe,
        lambda: {"model": decoder(), "paths": True},
        {"model": MODELS, "paths": "flag"},
    ),
    Recipe(
        "interventions.as_location",
        iv.as_location,
        lambda: {"place": "block_output.1"},
        {"place": "far layer|no such module|far dims"},
    ),
    Recipe("interventions.Location.parse", Location.parse, lambda: {"text": "block_output.1"}, {"text": ""}),
    Recipe(
        "interventions.Location",
        located,
        lambda: {"layer": 1, "site": "block_output", "heads": None, "dims": [0, 1], "subspace": None, "stack": None},
        {
            "layer": "0|1|-1|numpy int",
            "site": "",
            "heads": "None",
            "dims": "None|0|1|7|numpy int|[1]|(1, 2, 3)|range|generator",
            "subspace": "None",
            "stack": "None",
        },
    ),
    Recipe(
        "interventions.select",
        iv.select,
        lambda: {"positions": [1], "real": torch.ones(2, 4).bool()},
        {"positions": f"{POSITIONS}|bool tensor", "real": "bool tensor"},
    ),
    Recipe(
        "interventions.logits_of",
        iv.logits_of,
        lambda: {"output": torch.ones(2, 3), "answers": None},
        {"output": "tensor|!array|!array of objects", "answers": "None|identity|empty network"},
        own=("answers",),
    ),
    Recipe(
        "interventions.unanswered",
        iv.unanswered,
        lambda: {"logits": torch.ones(2, 3)},
        {"logits": "floats|empty tensor|empty rows|odd shape|nan tensor|inf tensor|half tensor|meta tensor"},
    ),
    Recipe("interventions.on_host", iv.on_host, lambda: {"tensor": torch.ones(2)}, {"tensor": "anything"}),
    Recipe(
        "interventions.keep_on_host",
        iv.keep_on_host,
        lambda: {"tensor": torch.ones(2), "copy": torch.ones(2)},
        {"tensor": "anything", "copy": "anything"},
    ),
    Recipe("interventions.rule_of", iv.rule_of, lambda: {"model": network()}, {"model": "anything"}),
    Recipe(
        "interventions.register_blocks",
        registered,
        lambda: {"model_type": "Fuzzed", "path": "body", "why": "", "masks": None},
        {"model_type": "text", "path": "text", "why": "text", "masks": "None|{}"},
    ),
    Recipe("interventions.label", iv.label, lambda: {"text": "a"}, {"text": "anything"}),
    Recipe("interventions.shown", iv.shown, lambda: {"value": "a"}, {"value": "anything"}),
    Recipe("interventions.printable", iv.printable, lambda: {"text": "a"}, {"text": "anything"}),
    Recipe(
        "interventions.heat_map",
        iv.heat_map,
        lambda: {
            "values": torch.eye(2),
            "rows": ["a", "b"],
            "columns": ["a", "b"],
            "label": "l",
            "column_label": "c",
            "center": None,
            "texts": None,
            "blank": None,
        },
        {
            "values": "",
            "rows": "nested|array of objects",
            "columns": "nested|array of objects",
            "label": "text",
            "column_label": "text",
            "center": "None|number",
            "texts": "None",
            "blank": "None",
        },
    ),
    Recipe("interventions.Grid.largest", lambda k: grid().largest(k), lambda: {"k": 1}, {"k": "count|huge"}),
    Recipe("interventions.Grid.plot", lambda tokens: grid().plot(tokens), lambda: {"tokens": None}, {"tokens": "None"}),
]
METRICS = [
    Recipe(
        "interventions.Metric",
        measured(iv.Metric),
        lambda: {
            "name": "m",
            "function": lambda logits: logits.sum(-1),
            "position": -1,
            "mask": None,
            "is_signed": True,
        },
        {"name": "text", "function": "", "position": "0|1|-1|numpy int", "mask": "None", "is_signed": "flag"},
        own=("function",),
    ),
    metric_of(iv.logit_difference, answers=3, foils=4),
    metric_of(iv.probability, tokens=3),
    metric_of(iv.log_probability, tokens=3),
    metric_of(iv.metrics.accuracy, answers=3),
    metric_of(iv.kl, reference=torch.ones(2, 30)),
    metric_of(iv.metrics.agreement, reference=torch.ones(2, 30)),
    Recipe(
        "interventions.normalized",
        measured(iv.normalized),
        lambda: {"metric": iv.probability(3), "clean": torch.ones(2, 30), "corrupted": torch.eye(30)[:2] * 3},
        {"metric": "", "clean": "floats|half tensor", "corrupted": "floats|half tensor"},
        own=("metric",),
    ),
]
OPERATORS = [
    Recipe(
        "interventions.Interpolate",
        operated(iv.Interpolate),
        lambda: {"weight": 0.5},
        {"weight": "number|scalar tensor"},
    ),
    Recipe("interventions.Mean", operated(iv.Mean), lambda: {"value": torch.ones(4)}, {"value": "None|written"}),
    Recipe(
        "interventions.Add",
        operated(iv.Add),
        lambda: {"value": torch.ones(4), "scale": 1.0, "renormalize": False},
        {"value": "written", "scale": "number|scalar tensor", "renormalize": "flag"},
    ),
    Recipe(
        "interventions.Noise",
        operated(iv.Noise),
        normal,
        {"sigma": "not negative|scalar tensor", "relative": "flag", "normal": "None|written|!inf tensor"},
    ),
    Recipe(
        "interventions.Mixup",
        operated(iv.Mixup),
        lambda: normal() | {"keep": 0.5},
        {
            "sigma": "not negative|scalar tensor",
            "keep": "share|scalar tensor",
            "relative": "flag",
            "normal": "None|written|!inf tensor",
        },
    ),
    Recipe(
        "interventions.Rotation",
        built(iv.Rotation),
        lambda: {"dims": 2, "width": 4, "seed": 0},
        {"dims": "1|numpy int", "width": "None", "seed": "seed"},
    ),
    Recipe(
        "interventions.Rotation.from_directions",
        iv.Rotation.from_directions,
        lambda: {"directions": torch.eye(4)[:, :2]},
        {"directions": ""},
    ),
    Recipe(
        "interventions.BoundlessRotation",
        built(iv.BoundlessRotation),
        lambda: {"width": 4, "seed": 0, "temperature": 50.0},
        {"width": "None", "seed": "seed", "temperature": "positive"},
    ),
    Recipe(
        "interventions.Mask",
        built(iv.Mask),
        lambda: {"width": 4, "temperature": 1.0, "within": None},
        {"width": "None", "temperature": "positive", "within": "None"},
    ),
    Recipe(
        "interventions.PCA.fit",
        lambda **given: swapped(iv.PCA.fit(**given)),
        lambda: {"vectors": x(3), "dims": 1},
        {"vectors": "floats", "dims": "1|numpy int"},
    ),
    Recipe("interventions.PCA", iv.PCA, lambda: {"dims": 2, "width": 4}, {"dims": "1|numpy int", "width": "None|7"}),
    Recipe(
        "interventions.SparseCoder",
        built(iv.SparseCoder),
        lambda: {"encode": lambda v: v, "decode": lambda v: v, "features": [0]},
        {"encode": NETWORK, "decode": f"{NETWORK}|nan network", "features": "None|[1]|(1, 2, 3)"},
        own=("encode", "decode"),
    ),
]
SAVING = [
    Recipe(
        "interventions.save",
        saved,
        lambda: {
            "folder": "new",
            "interventions": {PLACE: iv.Zero()},
            "model": network(),
            "positions": None,
            "steps": None,
            "overwrite": False,
        },
        {
            "folder": "text|digits|path",
            "interventions": "far dims",
            "model": SAME,
            "positions": SAVED_POSITIONS,
            "steps": STEPS,
            "overwrite": "flag",
        },
    ),
    Recipe(
        "interventions.load",
        loaded,
        lambda: {"folder": "saved", "model": network(), "subspaces": None},
        {"folder": "", "model": SAME, "subspaces": "None|{}"},
    ),
]

RECIPES = [*RUNS, *READS, *METRICS, *OPERATORS, *SAVING]
