"""A run remembers what it was made of: what has changed since is named and refused, or accepted with a warning."""

import json
import sys
from argparse import Namespace
from dataclasses import replace
from functools import cache, wraps
from typing import Any

import numpy as np
import pytest
import torch

import distill
from distill import AT, CRD, DIITO, DKD, ICD, KD, PKD, Cosine, DistilBERT, DistillError, FitNets, Labels, Rows, Sobolev
from distill.storage.files import read_json, write_json
from distill.training.fingerprints import of_causal, of_objective
from interventions import Mixup
from tests.distill.tiny_models import CLASSES, QUIET, bert, mlp, spread, text, vectors

SETTINGS: dict[str, Any] = dict(steps=3, batch_size=4, lr=1e-2, console=QUIET)


class Own(KD):
    """An objective of one's own."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, step):
        return {name: self.share * term for name, term in super().forward(step).items()}


def own(body: str):
    """A class with this body, as a user edits it between two starts; the name stays."""
    scope: dict[str, Any] = {"KD": KD}
    exec(f"class Edited(KD):\n    def forward(self, step):\n        {body}\n", scope)
    return scope["Edited"]()


def other(data: Rows, change) -> Rows:
    table = {name: column.clone() for name, column in data.table.items()}
    return change(replace(data, table=table))


def flipped(rows: Rows) -> Rows:
    rows.table["labels"][3] = (rows.table["labels"][3] + 1) % CLASSES
    return rows


def touched(rows: Rows) -> Rows:
    rows.table["inputs"][5, 2] += 1e-3
    return rows


PLAIN = dict(teacher=lambda: spread(mlp()), data=vectors, objective=lambda: [KD(), Labels()], weights=None)
CHANGES = {
    "other rows": (dict(data=lambda: vectors(seed=9)), "data column"),
    "fewer rows": (dict(data=lambda: vectors().take(range(20))), "number of rows"),
    "another order": (dict(data=lambda: vectors().take(range(23, -1, -1))), "data column"),
    "a flipped label": (dict(data=lambda: other(vectors(), flipped)), "data column 'labels'"),
    "one number": (dict(data=lambda: other(vectors(), touched)), "data column 'inputs'"),
    "another teacher": (dict(teacher=lambda: spread(mlp(), 4)), "teacher"),
    "another objective": (dict(objective=lambda: [KD(3.0), Labels()]), "objective="),
}


def run(folder, resume=False, *, teacher, data, objective, weights):
    return distill.fit(teacher(), spread(mlp(), 1), None, data(), objective=objective(), weights=weights,
                       output_dir=folder, resume=resume, **SETTINGS)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_named_and_refused_or_accepted(change, tmp_path):
    first = run(tmp_path / "run", **PLAIN)
    changed, named = CHANGES[change]
    with pytest.raises(DistillError, match=rf"was started with.*{named}.*resume='anyway'"):
        run(tmp_path / "run", True, **{**PLAIN, **changed})
    with pytest.warns(UserWarning, match=rf"{named}.*continues all the same, as resume='anyway' says"):
        run(tmp_path / "run", "anyway", **{**PLAIN, **changed})
    again = run(tmp_path / "other", **PLAIN)
    assert run(tmp_path / "other", True, **PLAIN).records == again.records == first.records


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (lambda: Own(0.5), lambda: Own(0.6)),
        (lambda: own("return super(Edited, self).forward(step)"), lambda: own("return KD.forward(self, step)")),
        (lambda: DIITO(op=Mixup(0.5)), lambda: DIITO(op=Mixup(0.6))),
        (lambda: DIITO(match=[KD()]), lambda: DIITO(match=[KD(), Cosine()])),
        (distill.Augmented, lambda: distill.Augmented(distill.InContext(0.4))),
    ],
)
def test_objectives_are_known_by_settings_and_source(before, after):
    assert of_objective(before()) == of_objective(before()) != of_objective(after())


def summed(**changes):
    """A causal model of two numbers and their sum, with some of what it is made of replaced."""
    parts: dict[str, Any] = dict(
        inputs={"a": range(3), "b": range(3)},
        mechanisms={"inner": lambda a, b: a + b, "answer": lambda inner: inner % 3},
        output="answer",
        encode=lambda values: torch.stack([values["a"], values["b"]], 1).float(),
        domains={"answer": range(3)},
    )
    return distill.CausalModel(**{**parts, **changes})


def shifted(by):
    return {"inner": lambda a, b: a + b + by, "answer": lambda inner: inner % 3}


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": {"a": range(3), "b": range(4)}},
        {"mechanisms": {"inner": lambda a, b: a - b, "answer": lambda inner: inner % 3}},
        {"mechanisms": {"answer": lambda a, b: (a + b) % 3}},
        {"encode": lambda values: torch.stack([values["b"], values["a"]], 1).float()},
        {"decode": lambda logits, values: logits},
        {"sample": lambda n, generator: {"a": torch.zeros(n), "b": torch.zeros(n)}},
        {"domains": {"answer": (2, 1, 0)}},
        {"positions": {"first": lambda values: torch.zeros(len(values["a"]), dtype=torch.long)}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_causal_models_are_known_by_all_that_they_are_made_of(change):
    assert of_causal(summed()) == of_causal(summed()) != of_causal(summed(**change))
    assert of_causal(summed(**change)) == of_causal(summed(**change))


def test_what_the_functions_of_a_causal_model_close_over_counts():
    made = of_causal(summed(mechanisms=shifted(1)))
    assert made == of_causal(summed(mechanisms=shifted(1))) != of_causal(summed(mechanisms=shifted(2)))


MODULUS = 3


def remainder(value):
    return value % MODULUS


class Bound:
    """Its method computes with what it holds."""

    def __init__(self, number):
        self.number = number

    def add(self, a, b):
        return a + b + self.number


def times(number):
    """A decorator with a setting."""

    def decorate(function):
        @wraps(function)
        def multiplied(a, b):
            return number * function(a, b)

        return multiplied

    return decorate


def plain_sum(a, b):
    return a + b


def layer(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Linear(1, 1)


def closing_over(thing):
    return lambda a, b: a + b + (thing is None)


def two():
    return (lambda a, b: a + b), (lambda a, b: a - b)


CLOSED = {
    "a bound method": (lambda: Bound(1).add, lambda: Bound(2).add),
    "a decorator": (lambda: times(2)(plain_sum), lambda: times(3)(plain_sum)),
    "an array": (lambda: closing_over(np.zeros(3)), lambda: closing_over(np.ones(3))),
    "a number of NumPy": (lambda: closing_over(np.int64(2)), lambda: closing_over(np.int64(3))),
    "a tensor": (lambda: closing_over(torch.ones(3)), lambda: closing_over(torch.zeros(3))),
    "a method of a tensor": (lambda: closing_over(torch.ones(3).add), lambda: closing_over(torch.zeros(3).add)),
    "a cached method": (lambda: closing_over(cache(torch.ones(3).to)), lambda: closing_over(cache(torch.zeros(3).to))),
    "a network": (lambda: closing_over(layer(0)), lambda: closing_over(layer(1))),
    "a namespace": (lambda: closing_over(Namespace(a=1)), lambda: closing_over(Namespace(a=2))),
    "an object": (lambda: closing_over(Bound(1)), lambda: closing_over(Bound(2))),
    "one of two on a line": (lambda: two()[0], lambda: two()[1]),
}


@pytest.mark.parametrize("kind", CLOSED)
def test_what_functions_hold_counts(kind):
    one, other = ([of_causal(summed(mechanisms={"answer": make()})) for _ in range(2)] for make in CLOSED[kind])
    assert one[0] == one[1] != other[0] == other[1]


def test_globals_that_a_function_reads_count(monkeypatch):
    """Also those that a function of the same file reads for it."""

    def known():
        return of_causal(summed(mechanisms={"answer": lambda a, b: remainder(a + b)}))

    before = known()
    assert known() == before
    monkeypatch.setattr(sys.modules[__name__], "MODULUS", 2)
    assert known() != before


def test_the_embedded_causal_models_are_known_apart():
    tasks = distill.tasks
    assert of_causal(tasks.hierarchical_equality(seed=0)) != of_causal(tasks.hierarchical_equality(seed=1))
    assert of_causal(tasks.hierarchical_equality(seed=0)) == of_causal(tasks.hierarchical_equality(seed=0))


def test_a_cache_that_fills_changes_nothing(tmp_path):
    """The call of a notebook, made again with the same model."""
    seen = {}

    def encode(values):
        seen["calls"] = seen.get("calls", 0) + 1
        return torch.stack([values["a"], values["b"]], 1).float()

    settings: dict[str, Any] = {**SETTINGS, "output_dir": tmp_path / "run"}
    model = summed(encode=encode)
    distill.fit(model, torch.nn.Linear(2, 3), **settings)
    assert seen["calls"]
    distill.fit(model, torch.nn.Linear(2, 3), resume=True, **settings)


def test_positions_of_iit_are_among_its_settings():
    assert of_objective(distill.IIT(positions=0)) != of_objective(distill.IIT(positions=1))
    assert "positions" not in repr(distill.IIT())


def test_another_causal_model_is_named(tmp_path):
    """Also after the first one has been used, which changes nothing that it is known by."""
    settings: dict[str, Any] = {**SETTINGS, "output_dir": tmp_path / "run"}
    model = summed()
    before = of_causal(model)
    distill.fit(model, torch.nn.Linear(2, 3), **settings)
    assert of_causal(model) == before
    distill.fit(summed(), torch.nn.Linear(2, 3), resume=True, **settings)
    with pytest.raises(DistillError, match=r"was started with.*another causal model"):
        distill.fit(summed(mechanisms=shifted(1)), torch.nn.Linear(2, 3), resume=True, **settings)


def test_a_class_of_ones_own_and_a_weight_that_is_a_function(tmp_path):
    asked = {**PLAIN, "objective": lambda: [Own(0.5)], "weights": {"kd": lambda progress: 1 + progress}}
    run(tmp_path / "run", **asked)
    run(tmp_path / "run", True, **asked)
    with pytest.raises(DistillError, match=r"another objective 1 \(Own\)"):
        run(tmp_path / "run", True, **{**asked, "objective": lambda: [Own(0.25)]})
    with pytest.raises(DistillError, match=r"another weight of 'kd'"):
        run(tmp_path / "run", True, **{**asked, "weights": {"kd": lambda progress: 2 + progress}})
    factor = 2.0
    closed = {**asked, "weights": {"kd": lambda progress: factor * progress}}
    run(tmp_path / "closed", **closed)
    factor = 3.0
    with pytest.raises(DistillError, match=r"another weight of 'kd'"):
        run(tmp_path / "closed", True, **closed)


OBJECTIVES = [
    KD, lambda: DKD(warmup=0), Labels, Cosine, PKD, FitNets, AT, DistilBERT, lambda: CRD(8, 16), lambda: ICD(8), DIITO,
    Sobolev, distill.TinyBERT, distill.BSS, distill.Augmented,
]  # fmt: skip


@pytest.mark.parametrize("make", OBJECTIVES)
def test_training_changes_nothing_that_an_objective_is_known_by(make):
    if make is DistilBERT:
        pytest.skip("its students answer tokens")
    teacher = spread(bert(4))
    student = distill.from_layers(teacher, 2)
    objective = make()
    before = of_objective(objective)
    data = vectors() if make is distill.BSS else text()
    models = (spread(mlp()), spread(mlp(), 1)) if make is distill.BSS else (teacher, student)
    mapping = "full" if make in (AT, PKD, FitNets, distill.TinyBERT) else None
    list(distill.steps(*models, mapping, data, objective=objective, schedule=distill.Schedule(steps=2, batch_size=6)))
    assert of_objective(objective) == before == of_objective(make())


def test_a_version_is_named(tmp_path):
    run(tmp_path / "run", **PLAIN)
    told = read_json(tmp_path / "run/settings.json", "")
    told["fingerprints"]["version of torch"] = "2.0.0"
    write_json(tmp_path / "run/settings.json", told)
    with pytest.raises(DistillError, match=r"version of torch 2\.0\.0 and is resumed with "):
        run(tmp_path / "run", True, **PLAIN)


def test_a_run_of_an_earlier_version_goes_on_with_a_note(tmp_path):
    first = run(tmp_path / "run", **PLAIN)
    settings = tmp_path / "run/settings.json"
    told = read_json(settings, "")
    del told["fingerprints"]
    settings.write_text(json.dumps(told))
    for checkpoint in (tmp_path / "run/checkpoints").iterdir():
        for name in ("manifest.json", "log.jsonl"):
            (checkpoint / name).unlink()
    with pytest.warns(UserWarning, match="earlier version") as noted:
        again = run(tmp_path / "run", True, **PLAIN)
    said = "\n".join(str(each.message) for each in noted)
    assert "was started by an earlier version, which remembered neither data nor models" in said
    assert "was written by an earlier version, without checksums; it is taken unchecked" in said
    assert again.records == first.records


def test_what_changes_the_model_that_is_trained_alone_does_not_count(tmp_path):
    """The student that is passed to a resumed run may be any: its weights come from the checkpoint."""
    run(tmp_path / "run", **PLAIN)
    result = distill.fit(spread(mlp()), spread(mlp(), 7), None, vectors(), objective=PLAIN["objective"](),
                         output_dir=tmp_path / "run", resume=True, **SETTINGS)  # fmt: skip
    assert torch.equal(result.student[0].weight, run(tmp_path / "new", **PLAIN).student[0].weight)


def test_chains_and_networks_that_learn_together_remember_too(tmp_path):
    make = lambda: [spread(mlp(), seed) for seed in range(2)]  # noqa: E731
    asked = dict(schedule=distill.Schedule(steps=2, batch_size=4), console=QUIET)
    distill.mutual(make(), vectors(), output_dir=tmp_path / "mutual", **asked)
    with pytest.raises(DistillError, match="data column"):
        distill.mutual(make(), vectors(seed=4), output_dir=tmp_path / "mutual", resume=True, **asked)
    models = lambda: [spread(bert(3)), spread(bert(2), 1), spread(bert(1), 2)]  # noqa: E731
    distill.chain(models(), data=text(), objective=KD(), output_dir=tmp_path / "chain", **asked)
    with pytest.raises(DistillError, match="another teacher"):
        distill.chain([spread(bert(3), 5), *models()[1:]], data=text(), objective=KD(), resume=True,
                      output_dir=tmp_path / "chain", **asked)  # fmt: skip
