"""Right calls of what measures: accuracies, probes, similarities, paths of training, alignments."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import distill
from distill import Alignment, CausalModel, Rows, Share, TokenAlignment, metrics, tasks
from distill.interchange.mapping import entries_of
from interventions import Location
from tests.faults.fuzz.attack import Recipe
from tests.faults.fuzz.interventions_recipes import decoder, network
from tests.faults.fuzz.tasks_recipes import is_right, tokenizer

PLACE = Location(module="0")
ANSWERS = "None|[None]|linear|training network|identity|empty network"
ANSWERS_OF_TWO = "None|{}|linear|training network|identity|empty network"
LIKE_IT = "training network|raising hook|meta network|nan network"
HALF = Location(module="0", dims=[0, 1])
NETWORK = "linear|training network|identity|empty network"
COUNT = {"batch_size": "count"}


def x(seed: int = 0) -> Tensor:
    """Return inputs of the network."""
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))


def rows() -> Rows:
    """Return labelled rows of the network."""
    return Rows({"x": x(), "labels": torch.arange(8) % 4})


def texts() -> Rows:
    """Return rows of the decoder."""
    return Rows({"input_ids": torch.randint(1, 30, (4, 5), generator=torch.Generator().manual_seed(0))})


def pairs() -> tasks.MinimalPairs:
    """Return pairs of sentences."""
    good, bad = (torch.tensor([[1, 2, end], [3, 4, end]]) for end in (5, 6))
    return tasks.MinimalPairs(Rows({"input_ids": good}), Rows({"input_ids": bad}), ("a", "b"))


@functools.cache
def sums() -> CausalModel:
    """Return a causal model of four bits."""
    return CausalModel(
        {name: range(2) for name in "abcd"},
        {"left": lambda a, b: a ^ b, "right": lambda c, d: c ^ d, "answer": lambda left, right: left + right},
        "answer",
        encode=lambda values: torch.stack([values[name] for name in "abcd"], 1).float(),
        domains={"left": range(2), "right": range(2), "answer": range(4)},
    )


def bits() -> dict[str, Tensor]:
    """Return inputs of the causal model."""
    return {name: torch.arange(16) >> place & 1 for place, name in enumerate("abcd")}


def twin() -> nn.Module:
    """Return another network like the first."""
    found = network()
    nn.init.normal_(found[0].weight)
    return found


def similar(a: Any = None, b: Any = None) -> dict[str, Any]:
    """Return what two networks give."""
    return {"a": x() if a is None else a, "b": x(1) if b is None else b}


def snapped(records: Any, **settings: Any) -> Any:
    """Train for two steps, and take representations."""
    student = network()
    made = distill.steps(None, student, data=rows(), objective=distill.Labels(),
                         schedule=distill.Schedule(steps=2, batch_size=4))  # fmt: skip
    return distill.snapshots(made if is_right(records) else records, student, **settings)


def shown(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that makes something and prints it."""
    return lambda **given: str(make(**given))


def aligned() -> Alignment:
    """Return an alignment of the causal model with the network."""
    return Alignment(entries_of({"left": Location(module="0", dims=0)}, sums(), network()))


def saved(**given: Any) -> Any:
    """Save an alignment and load it again."""
    return Alignment.load(aligned().save(**given), network())


def loaded(folder: Any, **given: Any) -> Any:
    """Load an alignment that was saved."""
    aligned().save("saved", network())
    return Alignment.load("saved" if is_right(folder) else folder, **given)


def rowed(**given: Any) -> Any:
    """Read texts for two tokenizers and pair their tokens."""
    alignment = TokenAlignment(tokenizer(), tokenizer())
    found = alignment.rows(**given)
    return alignment.spans(found.batch(range(len(found))))


def spanned(batch: Any = None, by: Any = "prefix") -> Any:
    """Pair the tokens of a batch."""
    alignment = TokenAlignment(tokenizer(), tokenizer())
    right = alignment.rows(["the dog is", "the cat"]).batch([0, 1])
    return alignment.spans(right if is_right(batch) else batch, by)


UNUSED = (
    f"{ANSWERS}|nan network|1|-1|7|0|huge|-huge|numpy int|name|[1]|[-9]|[text]|function|raising function|type|"
    "returns None|raising network|raising hook|meta network|class of network|operator"
)
"""Rules of an answer that nobody asks for, as the place is no answer."""
MODEL: dict[str, Any] = {"model": network, "data": rows}


def measured(**more: Any) -> Callable[[], dict[str, Any]]:
    """Return what makes a network, rows and settings."""
    return lambda: {"model": network(), "data": rows(), "answers": None, **more}


MEASURED = {"model": f"{NETWORK}|nan network", "data": "rows", "answers": ANSWERS}
OWN = ("model", "answers", "data")
RECIPES = [
    Recipe("distill.accuracy", distill.accuracy, measured(batch_size=4), MEASURED | COUNT, own=OWN),
    Recipe("distill.calibration", distill.calibration, measured(batch_size=4, bins=5),
           MEASURED | COUNT | {"bins": "count"}, own=OWN),
    Recipe("metrics.perplexity", metrics.perplexity,
           lambda: {"model": decoder(), "data": texts(), "batch_size": 2, "answers": None},
           MEASURED | COUNT | {"model": "", "data": "", "answers": "None|0|-1|[None]"}, own=OWN),
    Recipe("metrics.preferences", metrics.preferences,
           lambda: {"model": decoder(), "pairs": pairs(), "batch_size": 2, "answers": None},
           COUNT | {"model": "", "pairs": "", "answers": "None|0|-1|[None]"}, own=OWN),
    Recipe("distill.accuracy under a causal model", distill.accuracy,
           lambda: {"model": network(), "data": sums(), "values": bits(), "batch_size": 4, "answers": None},
           COUNT | {"model": NETWORK, "data": "", "values": "", "answers": ANSWERS},
           own=("model", "answers")),
    Recipe("distill.evaluate", distill.evaluate,
           lambda: {"teacher": network(), "student": twin(), "mapping": {HALF: HALF}, "data": rows(),
                    "positions": None, "pairs": 8, "seed": 0, "answers": None},
           {"teacher": "None|network|!class of network|!causal model", "student": f"{NETWORK}|returns None",
            "mapping": "None|()|{}|[]|name|no columns", "data": "rows",
            "positions": "None", "pairs": "count", "seed": "seed", "answers": ANSWERS_OF_TWO},
           own=("teacher", "student", "answers", "data")),
    Recipe("distill.interchange_accuracy", distill.interchange_accuracy,
           lambda: {"teacher": network(), "student": twin(), "mapping": {HALF: HALF}, "data": rows(), "pairs": 8,
                    "sources": None, "positions": None, "seed": 0, "batch_size": 4, "controls": (), "exclude": None,
                    "answers": None},
           {"batch_size": "count|None", "teacher": NETWORK, "student": NETWORK, "mapping": "", "data": "rows",
            "pairs": "count", "sources": "None", "positions": "None", "seed": "seed",
            "controls": "[]|()|{}|empty text", "exclude": "None", "answers": ANSWERS_OF_TWO},
           own=("teacher", "student", "answers", "data")),
    Recipe("distill.search_mapping", distill.search_mapping,
           lambda: {"teacher": network(), "student": twin(), "data": rows(), "places": ([HALF], [HALF]), "pairs": 8,
                    "kinds": None, "seed": 0, "batch_size": 4, "controls": (), "exclude": None, "answers": None},
           {"batch_size": "count|None", "teacher": NETWORK, "student": NETWORK, "data": "rows", "places": "",
            "pairs": "count", "kinds": "None", "seed": "seed", "controls": "[]|()|{}|empty text", "exclude": "None",
                    "answers": ANSWERS_OF_TWO},
           own=("teacher", "student", "answers", "data")),
    Recipe("distill.interchange_accuracy under a causal model", distill.interchange_accuracy,
           lambda: {"teacher": sums(), "student": network(), "mapping": {"left": Location(module="0", dims=0)},
                    "data": bits(), "pairs": 8, "positions": None},
           {"student": NETWORK, "mapping": "", "data": "None", "pairs": "count", "positions": "None|{}"},
           own=("student",)),
    Recipe("distill.compare", distill.compare,
           lambda: {"teacher": network(), "students": {"a": twin(), "b": network()}, "mapping": {HALF: HALF},
                    "data": rows(), "kinds": None, "pairs": 8, "sources": None, "positions": None, "seed": 0,
                    "batch_size": 4, "effective_only": False, "exclude": None, "answers": None},
           COUNT | {"teacher": NETWORK, "students": "", "mapping": "", "data": "rows", "kinds": "None|[]|()|{}",
                    "pairs": "count", "sources": "None", "positions": "None", "seed": "seed",
                    "effective_only": "flag", "exclude": "None", "answers": ANSWERS_OF_TWO},
           own=("teacher", "students", "answers", "data")),
    Recipe("distill.Discordance", distill.Discordance, lambda: {"won": 3, "lost": 12},
           {"won": "counter", "lost": "counter"}),
    Recipe("distill.headroom", distill.headroom,
           lambda: {"teacher": network(), "student": twin(), "data": rows(), "mapping": {HALF: HALF},
                    "objective": distill.DIITO(), "kinds": None, "steps": 1, "batches": 1, "batch_size": 4,
                    "schedule": None, "tolerance": 0.01, "seed": 0, "answers": None},
           {"teacher": NETWORK, "student": NETWORK, "data": "rows", "mapping": "", "objective": "None",
            "kinds": "None|[]|()|{}", "steps": "counter", "batches": "count", "batch_size": "None|7|numpy int",
            "schedule": "None", "tolerance": "not negative", "seed": "seed", "answers": ANSWERS_OF_TWO},
           own=("teacher", "student", "answers", "data")),
    Recipe("distill.audit", distill.audit,
           lambda: {"original": network(), "compressed": twin(), "data": rows(), "mapping": None, "slices": None,
                    "kinds": None, "examples": 8, "pairs": 8, "seed": 0, "batch_size": 4, "answers": None,
                    "output_dir": None},
           COUNT | {"output_dir": "None|text|digits|control text|path", "original": f"{NETWORK}|!causal model",
                    "compressed": NETWORK,
                    "data": "rows", "mapping": "None", "slices": "None",
                    "kinds": "None|[]|()|{}", "examples": "count", "pairs": "count",
                    "seed": "seed", "answers": ANSWERS_OF_TWO}, own=("original", "compressed", "answers", "data")),
    Recipe("distill.linear_probe", distill.linear_probe,
           lambda: {"model": network(), "data": rows(), "test": rows(), "at": None, "pool": "mean", "penalty": 1.0,
                    "batch_size": 4, "answers": None},
           COUNT | {"model": "linear|training network", "data": "", "test": "rows", "at": "None",
                    "pool": "", "penalty": "positive", "answers": UNUSED}, own=("model", "answers")),
    Recipe("distill.representations", distill.representations,
           lambda: {"model": network(), "data": rows(), "at": PLACE, "positions": None, "batch_size": 4,
                    "answers": None},
           COUNT | {"model": "linear|training network|nan network", "data": "rows|nan table", "at": "",
                    "positions": "None", "answers": UNUSED}, own=("model", "answers", "data")),
    Recipe("distill.snapshots", snapped,
           lambda: {"records": "right", "data": rows(), "at": PLACE, "every": 1, "positions": None,
                    "answers": None},
           {"records": "", "data": "rows|nan table", "at": "", "every": "count", "positions": "None",
            "answers": UNUSED}, own=("answers", "records", "data")),
    Recipe("distill.training_path", shown(distill.training_path),
           lambda: {"runs": {"one": [x(), x(1)], "other": [x(2), x(3)]},
                    "similarity": metrics.representational_similarity, "seed": 0},
           {"runs": "", "similarity": "", "seed": "seed"}, own=("similarity",)),
    Recipe("metrics.expected_calibration_error", metrics.expected_calibration_error,
           lambda: {"confidence": torch.tensor([0.5, 0.9]), "correct": torch.tensor([0, 1]), "bins": 5},
           {"confidence": "", "correct": "", "bins": "count"}),
    Recipe("metrics.representational_similarity", metrics.representational_similarity, similar,
           {"a": "", "b": ""}),
    Recipe("metrics.representational_similarity of two", metrics.representational_similarity,
           lambda: similar(x()[:2], x(1)[:2]), {"a": "floats|half tensor", "b": "floats|half tensor"}),
    Recipe("metrics.cka", metrics.cka, similar, {"a": "", "b": ""}),
    Recipe("metrics.cka of two", metrics.cka, lambda: similar(x()[:2], x(1)[:2]),
           {"a": "floats", "b": "floats"}),
    Recipe("metrics.wilson", metrics.wilson, lambda: {"right": 3, "total": 10, "z": 1.96},
           {"right": "0|1|7|numpy int", "total": "7", "z": "not negative"}),
    Recipe("metrics.bootstrap", metrics.bootstrap,
           lambda: {"right": torch.ones(4), "total": torch.ones(4), "clusters": torch.tensor([0, 0, 1, 1]),
                    "seed": 0},
           {"right": "", "total": "", "clusters": "", "seed": "seed"}),
    Recipe("metrics.batches", lambda **given: list(metrics.batches(**given)), lambda: {"count": 10, "size": 3},
           {"count": "counter", "size": "count"}),
    Recipe("metrics.evaluating", lambda model: metrics.evaluating(model).__enter__(),
           lambda: {"model": network()}, {"model": "network|!class of network|!causal model"}),
    Recipe("metrics.has_classes", metrics.has_classes, lambda: {"data": rows()}, {"data": "rows"}),
    Recipe("metrics.Share", shown(Share), lambda: {"value": 0.9, "low": 0.8, "high": 0.95, "count": 10},
           {"value": "share", "low": "0|0.5|numpy float", "high": "1|1.0|numpy int", "count": "counter"}),
    Recipe("metrics.Calibration", shown(metrics.Calibration),
           lambda: {"error": 0.1, "accuracy": Share(0.9, 0.8, 0.95, 10), "confidence": 0.9},
           {"error": "share", "accuracy": "", "confidence": "share"}),
    Recipe("distill.Alignment", shown(Alignment),
           lambda: {"pairs": aligned().pairs, "accuracy": None, "records": (), "settings": {}, "seen": None},
           {"pairs": "()|[]", "accuracy": "None", "records": "()|[]", 
            "settings": "None|{}|{text: 1}|no columns|ragged table|nan table",
            "seen": "None"}),
    Recipe("distill.Alignment.save", saved, lambda: {"folder": "new", "network": network(), "overwrite": False},
           {"folder": "text|digits|control text", "network": LIKE_IT, "overwrite": "flag"},
           own=("network",), skip={"folder": "path"}),
    Recipe("distill.Alignment.load", loaded, lambda: {"folder": "right", "network": network(), "subspaces": None},
           {"folder": "", "network": f"{LIKE_IT}", "subspaces": "None|{}"}, own=("network",)),
    Recipe("distill.TokenAlignment", TokenAlignment, lambda: {"teacher": tokenizer(), "student": tokenizer()},
           {"teacher": "", "student": ""}),
    Recipe("distill.TokenAlignment.rows", rowed,
           lambda: {"texts": ["the dog is", "the cat"], "labels": [0, 1], "max_length": 8},
           {"texts": "",
            "labels": "None|floats|whole tensor|huge whole tensor|bool tensor|bytes tensor|half tensor|array",
            "max_length": "count"}),
    Recipe("distill.TokenAlignment.spans", spanned, lambda: {"batch": "right", "by": "prefix"},
           {"batch": "", "by": ""}),
]  # fmt: skip
