"""One law over all results: they print, show themselves in notebooks, draw, and become plain data and tables."""

import inspect
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

import pandas
import pytest
import torch
from torch import nn

import distill
import interventions
from distill import DistillError, Evaluation, FitResult, InterchangeAccuracy, Outcome, Share
from distill.evaluation.calibration import Calibration
from distill.students.ranking import Importance
from distill.teachers.served import ServedRun
from distill.training.progress import Record
from interventions import InterventionError, Location, Picture, Result, plain_data
from tests.distill.tiny_models import bert, mlp, spread, text, vectors
from tests.distill.wired import TOKENS, Reader
from tests.interventions.analysis.test_grids import grid_of
from tests.interventions.tiny_models import batch, make
from tests.test_short_texts import SHOWN

BARRED = ("vllm", "nnsight", "conformance")
OUTCOME = Outcome(Share(0.75, 0.7, 0.8, 100), 0.4, 0.5, 0.6, 0.65, 0.123, None, 100, 0)
NOTHING = Outcome(None, None, None, None, None, None, None, 0, 100)
ERROR = Outcome(None, None, None, None, None, None, 0.25, 7, 0)
RECORDS = tuple(Record(step, 3, 1.0 / step, {"kd": 0.5, "kd_cf": 0.25 * step}, 1e-3) for step in (1, 2, 3))


def measured(**entries: Outcome) -> InterchangeAccuracy:
    return InterchangeAccuracy(
        OUTCOME, entries or {"a ↔ b": OUTCOME, "c ↔ d": NOTHING}, {"pairs": 100}, {"labels": OUTCOME}
    )


def searched() -> distill.Search:
    """A search in a network that holds each of two variables at a token of its own."""
    return distill.search_alignment(TOKENS, Reader(), at=["module:hidden"], pairs=50)


def circuit_of() -> interventions.Circuit:
    """The circuit of a tiny model."""
    model, base, source, metric = make("vit"), batch("vit"), batch("vit", seed=2), interventions.logit_difference(0, 1)
    edges = interventions.edge_attribution(model, base, source, metric)
    return interventions.circuit(model, base, source, metric, edges)


def lens_of(name: str = "gpt2") -> interventions.Lens:
    """The logit lens of a tiny model."""
    return interventions.logit_lens(make(name), batch(name))


def searched_mapping() -> distill.MappingSearch:
    """A search between two networks, with its controls."""
    places = (["module:0[dims=0:4]", "module:2[dims=0:4]"], ["module:0[dims=0:4]"])
    teacher, student = (spread(mlp(), seed) for seed in (0, 1))
    return distill.search_mapping(teacher, student, vectors(40), places=places, pairs=50)


def aligned() -> distill.Alignment:
    return searched().best


def path() -> distill.TrainingPath:
    generator = torch.Generator().manual_seed(0)
    return distill.training_path({name: [torch.randn(8, 3, generator=generator) for _ in range(3)] for name in "ab"})


def calibrated() -> Calibration:
    return distill.calibration(mlp(), vectors(40), bins=5)


def room() -> distill.Headroom:
    """Headroom at two places of an MLP, one of which is all of its state."""
    part, whole = (Location(module="0", **dims) for dims in ({"dims": range(4)}, {}))
    student = mlp(8)
    torch.nn.init.normal_(student[0].weight, generator=torch.Generator().manual_seed(1))
    return distill.headroom(mlp(8), student, vectors(), {part: part, whole: whole}, steps=0, batches=2, batch_size=12)


def same_networks() -> distill.Headroom:
    """Headroom of a copy, whose losses are 0."""
    place, network = Location(module="0", dims=range(4)), mlp(8)
    objective = distill.DIITO(match=distill.KD(answers="values"))
    return distill.headroom(network, network, vectors(), {place: place}, steps=0, batches=2, objective=objective)


def audited(**settings: Any) -> distill.Audit:
    other = mlp()
    torch.nn.init.normal_(other[2].weight, generator=torch.Generator().manual_seed(0))
    return distill.audit(mlp(), other, vectors(12), pairs=4, examples=4, **settings)


def compared(count: int = 2) -> distill.Comparison:
    """Two students of an MLP, of one or of several seeds."""
    place = Location(module="2", dims=range(4))
    students = {name: [shifted(seed + i) for i in range(count)] for seed, name in ((1, "KD"), (5, "KD + interchange"))}
    return distill.compare(mlp(8), students, {place: place}, vectors(30), kinds="usual", pairs=30)


def shifted(seed: int) -> nn.Module:
    network = mlp(8)
    torch.nn.init.normal_(network[0].weight, generator=torch.Generator().manual_seed(seed))
    return network


WHOLE: dict[str, Callable[[], Result]] = {
    "Grid": grid_of,
    "Grid with empty cells": lambda: grid_of("bert", positions=[0, 4]),
    "Direction": lambda: interventions.direction(
        make("gpt2"), [batch("gpt2")], [batch("gpt2", seed=2)], Location(1), positions=None
    ),
    "Circuit": circuit_of,
    "Edges": lambda: interventions.edge_attribution(
        make("gpt2"), batch("gpt2"), batch("gpt2", seed=2), interventions.logit_difference(0, 1)
    ),
    "Lens": lens_of,
    "Lens of a classifier": lambda: lens_of("bert"),
    "Probes": lambda: interventions.probe(
        make("mlp"),
        [torch.randn(20, 6, generator=torch.Generator().manual_seed(0))],
        ["module:0", "module:2"],
        torch.arange(20) % 2,
    ),
    "Search": searched,
    "MappingSearch": searched_mapping,
    "Alignment": aligned,
    "InterchangeAccuracy": measured,
    "InterchangeAccuracy without bound": lambda: measured(**{"a ↔ b": replace(OUTCOME, kl=math.inf)}),
    "InterchangeAccuracy of numbers": lambda: InterchangeAccuracy(ERROR, {"a ↔ b": ERROR}, {}),
    "Evaluation": lambda: Evaluation(Share(0.9, 0.88, 0.92, 500), measured()),
    "Evaluation of accuracy": lambda: Evaluation(Share(0.9, 0.88, 0.92, 500), None, "no pair"),
    "Evaluation of interchanges": lambda: Evaluation(None, measured()),
    "FitResult": lambda: FitResult(
        nn.Linear(2, 2), RECORDS, Evaluation(None, measured()), {"lr": 1e-3}, 1.0, Path("a")
    ),
    "Headroom": room,
    "Importance": lambda: distill.importance(spread(bert(3)), text(6), search=1),
    "Comparison": compared,
    "Comparison of one seed": lambda: compared(1),
    "TrainingPath": path,
    "Audit": audited,
    "Calibration": calibrated,
    "Calibration without bins": lambda: Calibration(0.05, Share(0.9, 0.88, 0.92, 1000), 0.95),
}
EMPTY: dict[str, Callable[[], Result]] = {
    "Alignment": lambda: distill.Alignment((distill.interchange.mapping.Entry(("a",), (Location(1),)),)),
    "InterchangeAccuracy": lambda: InterchangeAccuracy(NOTHING, {"c ↔ d": NOTHING}, {}),
    "Evaluation": lambda: Evaluation(None, None, "nothing was measured: no rows"),
    "Circuit": lambda: interventions.Circuit((), 0.0, ((0, 0.0),), "metric", 1.0, 0.0, 4),
    "FitResult": lambda: FitResult(nn.Linear(2, 2), (), Evaluation(None, None)),
    "Headroom": lambda: same_networks(),
    "Importance": Importance,
    "Audit": lambda: replace(audited(), parts=(), depths=()),
    "Comparison": lambda: distill.Comparison((), {"KD": 1, "KD + interchange": 1}),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_result_keeps_the_promise(name):
    """Text, picture, page, plain data and table of one result, which changes by none of them."""
    result = WHOLE[name]()
    assert isinstance(result, Result)
    before, text = json.dumps(result.to_dict()), str(result)
    assert text.strip()
    picture = result.plot()
    assert isinstance(picture, Picture)
    assert picture._repr_png_().startswith(b"\x89PNG")
    assert not plotted()
    page = result._repr_html_()
    assert page.startswith('<img src="data:image/png;base64,')
    assert unescape(re.search(r"<pre>(.*)</pre>", page, re.DOTALL)[1]) == text
    data = result.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    table = result.to_pandas()
    assert isinstance(table, pandas.DataFrame)
    assert len(table)
    assert table.index.is_unique
    assert all(table.index.names)
    for name in table.columns:  # numbers, with NaN where there is none, or texts
        assert table[name].dtype.kind in "if" or all(isinstance(each, str) for each in table[name])
    records = plain_data([vars(each) for each in getattr(result, "records", ())])
    known = numbers_of(pandas.Series([*leaves(data), *leaves(records)])) | numbers_of(table.index.to_frame())
    assert numbers_of(table) <= known
    assert (json.dumps(result.to_dict()), str(result)) == (before, text)


@pytest.mark.parametrize("name", EMPTY)
def test_where_nothing_was_measured_that_is_said(name):
    """No picture, with an error that names the way out; text, page, plain data and table are there."""
    result = EMPTY[name]()
    with pytest.raises((DistillError, InterventionError), match=r"; .*\(|=") as error:
        result.plot()
    assert "<img" not in result._repr_html_()
    assert unescape(result._repr_html_()).count(str(error.value)) == 1
    assert str(result)
    json.dumps(result.to_dict(), allow_nan=False)
    assert isinstance(result.to_pandas(), pandas.DataFrame)


@pytest.mark.parametrize("name", WHOLE)
def test_without_pandas_it_is_asked_for(name, monkeypatch):
    """The error is that of the package, and says how to install it."""
    result = WHOLE[name]()
    monkeypatch.setitem(sys.modules, "pandas", None)
    kind = InterventionError if type(result).__module__.startswith("interventions") else DistillError
    with pytest.raises(kind, match="pip install pandas"):
        result.to_pandas()


def test_terms_of_any_name_and_at_any_step_are_shown():
    """A term called loss beside the loss, one that is 0, and one that begins late, each over its own steps."""
    terms = [{"loss": 0.5}, {"late": 0.0, "loss": 0.1}, {"late": 0.0, "loss": 0.1}]
    records = [Record(step, 3, 1.0, each, 1e-3) for step, each in enumerate(terms, 1)]
    result = FitResult(nn.Linear(2, 2), tuple(records), Evaluation(None, None))
    table = result.to_pandas()
    assert (table["loss"].tolist(), table["term loss"].tolist()) == ([1.0] * 3, [0.5, 0.1, 0.1])
    axes = result.plot().axes
    assert [each.get_title() for each in axes] == ["loss", "late"]
    assert [list(each.lines[0].get_xdata()) for each in axes] == [[1, 2, 3], [2, 3]]
    assert [each.get_yscale() for each in axes] == ["log", "linear"]
    assert result._repr_html_()


def test_whatever_draws_itself_is_a_result():
    """A new class with a method `plot` makes all of the promise, and stands in the law above."""
    drawing = {kind for kind in classes() if callable(getattr(kind, "plot", None))} - {Result}
    assert {kind for kind in drawing if not issubclass(kind, Result)} == set()
    assert {kind.__name__ for kind in drawing} == {name.split()[0] for name in WHOLE}
    shown = {kind for kind in classes() if hasattr(kind, "_repr_html_")} - {Picture}
    assert {kind for kind in shown if not issubclass(kind, Result)} - {ServedRun} == {
        kind for kind in shown if kind.__name__ in SHOWN
    }


def classes() -> set[type]:
    found = set()
    for package in (interventions, distill):
        for module in walk_packages(package.__path__, f"{package.__name__}."):
            if not any(word in module.name for word in (*BARRED, "__main__", "tracing")):
                members = inspect.getmembers(import_module(module.name), inspect.isclass)
                found |= {kind for _, kind in members if kind.__module__ == module.name}
    return found


def plotted() -> list[int]:
    """The figures that pyplot would show, where it was imported."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    return [] if pyplot is None else pyplot.get_fignums()


def leaves(data: Any) -> Any:
    if isinstance(data, dict | list):
        for each in data.values() if isinstance(data, dict) else data:
            yield from leaves(each)
    else:
        yield data


def numbers_of(table: Any) -> set[float]:
    """The numbers in a table, rounded so that float32 and float64 agree."""
    values = table.to_numpy().ravel().tolist()
    return {float(f"{each:.5g}") for each in values if isinstance(each, int | float) and math.isfinite(each)}
