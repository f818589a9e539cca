"""Right calls of teachers that are made of others: committees, noisy ones, and those that are asked."""

from typing import Any

from torch import nn

from distill import Ensemble, NoisyTeacher, Retries, Served, Specialists, losses
from distill.errors import Unreachable
from distill.teachers.retries import retry
from tests.faults.fuzz.attack import Recipe
from tests.faults.fuzz.interventions_recipes import network
from tests.faults.fuzz.training_recipes import FUNCTIONS, QUIET, SHORT, rows, trained


def taught(teacher: Any) -> Any:
    """Train a small network by a teacher."""
    return trained(teacher, network(), data=rows())


def specialised(**settings: Any) -> Any:
    """Learn from a generalist and its specialists."""
    return taught(Specialists(**settings))


def made(**settings: Any) -> Any:
    """Train specialists and learn from them."""
    return taught(Specialists.train(console=QUIET, schedule=SHORT, **settings))


def served(cache: Any = None, **settings: Any) -> Any:
    """Learn from a teacher that is asked."""
    return taught(Served(cache=cache, **settings))


def again(**settings: Any) -> Any:
    """Ask again after two failures."""
    waited: list[float] = []
    asked: list[int] = []

    def ask() -> int:
        asked.append(1)
        if len(asked) < 3:
            raise ConnectionError
        return len(asked)

    given = {"sleep": waited.append} | settings
    return retry(ask, Retries(**given), lambda error, count, seconds: Unreachable(f"{count} times"))


NETWORKS = "linear|training network|identity|empty network"

ANSWERS = f"None|[None]|{FUNCTIONS}"

RECIPES = [
    Recipe(
        "distill.Ensemble", lambda **settings: taught(Ensemble(**settings)),
        lambda: {"teachers": [network(), network()], "average": "logits", "weights": [3, 1], "temperature": 1.0,
                 "answers": None},
        {"teachers": "choice", "average": "choice", "weights": "None", "temperature": "1|1.0|numpy int",
         "answers": ANSWERS},
    ),
    Recipe(
        "distill.Ensemble(member)", lambda member: taught(Ensemble([network(), member])),
        lambda: {"member": network()}, {"member": NETWORKS}, own=("member",),
    ),
    Recipe(
        "distill.Ensemble(temperature)",
        lambda **settings: taught(Ensemble([network(), network()], "probabilities", **settings)),
        lambda: {"temperature": 2.0, "weights": [1, 1]}, {"temperature": "positive", "weights": "None"},
    ),
    Recipe(
        "distill.NoisyTeacher", lambda **settings: taught(NoisyTeacher(**settings)),
        lambda: {"teacher": network(), "noise": losses.LogitNoise(0.5), "generator": None, "answers": None},
        {"teacher": NETWORKS, "noise": "choice", "generator": "None|draws", "answers": ANSWERS}, own=("teacher",),
    ),
    Recipe(
        "distill.Specialists", specialised,
        lambda: {"generalist": network(), "specialists": {nn.Linear(4, 3): [0, 1]}, "k": 1, "temperature": 1.0,
                 "answers": None},
        {"generalist": NETWORKS, "specialists": "choice", "k": "count", "temperature": "positive",
         "answers": ANSWERS},
        own=("generalist",),
    ),
    Recipe(
        "distill.Specialists(classes)",
        lambda classes: specialised(generalist=network(), specialists={nn.Linear(4, 3): classes}),
        lambda: {"classes": [0, 1]}, {"classes": "choice"},
    ),
    Recipe(
        "distill.Specialists.train", made,
        lambda: {"generalist": network(), "data": rows(), "n": 2, "size": None, "share": 0.5, "clustering": "kmeans",
                 "network": None, "seed": 0, "k": 1, "temperature": 1.0, "answers": None},
        {"generalist": NETWORKS, "data": "rows", "n": "None|1|numpy int", "size": "None|1|numpy int",
         "share": "share above 0", "clustering": "choice", "network": "None", "seed": "seed", "k": "count",
         "temperature": "positive",
         "answers": ANSWERS},
        own=("generalist", "network"),
    ),
    Recipe(
        "distill.Served", served,
        lambda: {"model": network(), "remote": False, "top_k": 2, "temperature": 2.0, "cache": "kept", "retries": 5,
                 "batch_size": 2, "answers": None, "tokenizer": None, "api_key": None},
        {"model": NETWORKS, "remote": "False", "top_k": "None|count", "temperature": "None|positive",
         "cache": "None|text|digits|path", "retries": "counter", "batch_size": "None|count", "answers": ANSWERS},
        own=("model",),
    ),
    Recipe(
        "distill.Served.fetch", lambda **settings: Served(network()).fetch(**settings),
        lambda: {"data": rows(), "batch_size": 2}, {"data": "rows|floats|array", "batch_size": "count"},
    ),
    Recipe(
        "distill.Retries", again,
        lambda: {"count": 5, "first": 0.5, "longest": 1.0, "seed": 0},
        {"count": "7", "first": "not negative", "longest": "not negative", "seed": "seed"},
    ),
    Recipe(
        "distill.Retries(sleep)", again, lambda: {"sleep": lambda seconds: None},
        {"sleep": "function|type|identity|empty network|returns None"},
        own=("sleep",),
    ),
]  # fmt: skip
