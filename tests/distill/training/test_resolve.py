"""What a training is given is read, made and checked once, however it was started."""

import copy
import functools
import gc
import importlib
import sys
import weakref

import pytest
import torch
from transformers import BertForSequenceClassification, PreTrainedTokenizerBase

import distill
from distill import DIITO, KD, DistillError, Schedule
from distill.evaluation import measurement
from interventions import PCA, Location, Rotation
from tests.distill.alignment.test_align import turned
from tests.distill.conftest import save_bert, sentences, write_csv
from tests.distill.tiny_models import QUIET, mlp, vectors
from tests.distill.wired import SUM

fitting = importlib.import_module("distill.fit")  # distill.fit is the function
importlib.import_module("distill.alignment.align")  # before `calls` replaces functions, which it would keep replaced
SCHEDULE = Schedule(steps=2, batch_size=4)
SHORT = {"schedule": SCHEDULE, "console": QUIET}
ALIGN = {"steps": 2, "batch_size": 4, "console": QUIET}
PLACES = {Location(0): Location(0, subspace=Rotation(4))}
RESOLVED = {
    "objectives_of": "distill.training.resolve",
    "resolve_mapping": "distill.training.resolve",
    "rows_for": "distill.training.resolve",
    "keep_supported": "distill.training.resolve",
    "entries_of": "distill.interchange.mapping",
    "refuse_wholes": "distill.interchange.whole_state",
    "given": "distill.causal.feed",
    "fingerprints": "distill.training.fingerprints",
    "marks_of": "distill.data.seen_rows",
    "answer_of": "distill.models.trials",
}


@pytest.fixture(autouse=True)
def few_pairs(monkeypatch):
    """Measured on 4 pairs instead of 2000, to be quick."""
    monkeypatch.setattr(measurement, "MOST_PAIRS", 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"), classifier=True, layers=2)


@pytest.fixture
def network(folder):
    """Makes a classifier of two layers that names its classes."""

    def made():
        model = BertForSequenceClassification.from_pretrained(folder)
        model.config.id2label, model.config.label2id = {0: "negative", 1: "positive"}, {"negative": 0, "positive": 1}
        return model

    return made


@pytest.fixture
def calls(monkeypatch):
    """How often each function of `RESOLVED` makes something, whoever calls it, and how many texts are read."""
    counts = dict.fromkeys([*RESOLVED, "read", "texts"], 0)

    def counted(name, function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            found = function(*args, **kwargs)
            counts[name] += all(found is not each for each in args)  # what is made already is handed back
            return found

        return call

    for name, module in {**RESOLVED, "read": "distill.data.tables"}.items():
        function = getattr(importlib.import_module(module), name)
        call = counted(name, function)
        for other in [each for each in sys.modules.values() if getattr(each, "__name__", "").startswith("distill")]:
            if vars(other).get(name) is function:
                monkeypatch.setattr(other, name, call)
    whole = PreTrainedTokenizerBase.__call__

    def tokenise(self, text, *args, **kwargs):
        counts["texts"] += 1 if isinstance(text, str) else len(text)
        return whole(self, text, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", tokenise)
    return counts


def started(how, network, path, tmp_path):
    """A training on a file, however it is started."""
    if how == "fit":
        distill.fit(network(), network(), None, path, **SHORT)
    elif how == "fit in a folder":
        distill.fit(network(), network(), None, path, output_dir=tmp_path / "run", **SHORT)
    elif how == "steps":
        list(distill.steps(network(), network(), None, path, schedule=SCHEDULE))
    elif how == "chain":
        distill.chain([network(), network()], data=path, **SHORT)
    elif how == "mutual":
        distill.mutual([network(), network()], path, objective=[KD(), DIITO()], edges=[(0, 1)], **SHORT)
    elif how == "specialists":
        distill.Specialists.train(network(), path, 2, **SHORT)
    else:
        distill.align(network(), network(), PLACES, path, pairs=4, **ALIGN)


HOW = ["fit", "fit in a folder", "steps", "chain", "mutual", "specialists", "align"]


@pytest.mark.parametrize("how", HOW)
def test_a_file_is_read_and_tokenised_once(how, network, calls, tmp_path):
    started(how, network, write_csv(tmp_path / "x.csv", sentences(40)), tmp_path)
    assert calls["read"] == 1
    assert calls["texts"] == 40


@pytest.mark.parametrize("how", ["fit", "fit in a folder", "steps", "chain"])
def test_objectives_and_pairs_are_made_once(how, network, calls, tmp_path):
    started(how, network, write_csv(tmp_path / "x.csv", sentences(40)), tmp_path)
    assert {name: calls[name] for name in ("objectives_of", "resolve_mapping", "rows_for", "keep_supported")} == {
        "objectives_of": 1, "resolve_mapping": 1, "rows_for": 1, "keep_supported": 1,
    }  # fmt: skip
    assert calls["marks_of"] == (how != "steps")  # its one column of tokens


@pytest.mark.parametrize("data", [None, "rows"])
@pytest.mark.parametrize("subspace", [Rotation, PCA])
def test_an_alignment_is_guarded_once_and_its_rows_are_checked_once(subspace, data, calls):
    rows = None if data is None else SUM.sample(30, torch.Generator().manual_seed(0))
    mapping = {"inner": Location(module="hidden", subspace=subspace(1))}
    distill.align(SUM, turned(), mapping, rows, pairs=0, **ALIGN)
    assert calls["refuse_wholes"] == 1
    assert calls["given"] == (data is not None)
    calls.update(dict.fromkeys(calls, 0))
    mapping = {"inner": Location(module="hidden", subspace=subspace(1))}
    distill.align(SUM, turned(), mapping, rows, pairs=20, **ALIGN)
    assert calls["refuse_wholes"] == 2  # and once where it is measured: what was learned may be everything
    assert calls["entries_of"] == 1


def test_each_place_of_a_search_is_guarded_once(calls):
    rows = SUM.sample(30, torch.Generator().manual_seed(0))
    places = [Location(module="hidden"), Location(module="hidden", dims=range(2))]
    distill.search_alignment(SUM, turned(), "inner", places, rows, subspace=lambda: Rotation(1), pairs=20, **ALIGN)
    assert calls["refuse_wholes"] == 2
    assert calls["given"] == 1


def test_held_out_rows_of_a_causal_model_are_checked_once(calls):
    rows, others = (SUM.sample(30, torch.Generator().manual_seed(seed)) for seed in range(2))
    mapping = {"inner": Location(module="hidden", dims=[0])}
    distill.fit(SUM, turned(), mapping, rows, eval_data=others, **SHORT)
    assert calls["given"] == 2
    assert calls["resolve_mapping"] == calls["objectives_of"] == calls["rows_for"] == 1


def test_a_file_that_is_gone_before_it_is_measured(network, tmp_path, monkeypatch):
    path = write_csv(tmp_path / "x.csv", sentences(40))

    class Removing(DIITO):
        def forward(self, step):
            path.unlink(missing_ok=True)
            return super().forward(step)

    monkeypatch.setattr("distill.alignment.align.DIITO", Removing)
    found = distill.align(network(), network(), PLACES, path, pairs=4, **ALIGN)
    assert not path.exists()
    assert found.accuracy.settings["pairs"] == 4


def test_networks_that_learn_together_are_tried_once_each(calls):
    networks = [mlp() for _ in range(3)]
    distill.mutual(networks, vectors(), **SHORT)
    assert calls["answer_of"] == 3


def test_rows_that_change_while_they_are_trained_on_stay_known():
    data = {"inputs": torch.randn(8, 6), "labels": torch.zeros(8, dtype=torch.long)}
    before = data["inputs"].clone()

    def changing(progress):
        data["inputs"].add_(1)
        return 1.0

    result = distill.fit(mlp(), mlp(), {}, data, objective=KD(), weights={"kd": changing}, **SHORT)
    assert not torch.equal(data["inputs"], before)
    assert result.seen.among({"inputs": before}).all()
    assert not result.seen.among(data).any()


def test_a_result_keeps_no_rows():
    data = {"inputs": torch.randn(8, 6), "labels": torch.zeros(8, dtype=torch.long)}
    rows = distill.Rows.of(data)
    held = weakref.ref(rows)
    result = distill.fit(mlp(), mlp(), {}, rows, objective=KD(), **SHORT)
    del rows
    gc.collect()
    assert held() is None
    assert {name: each.nbytes for name, each in result.seen.marks.items()} == {"inputs": 64}


def test_a_mapping_of_nothing_interchanges_nothing():
    teacher, one = mlp(), mlp()
    alone = copy.deepcopy(one)
    result = distill.fit(teacher, one, {}, vectors(), **SHORT)
    assert result.settings["mapping"] == []
    assert list(result.records[-1].terms) == ["kd"]
    assert result.records == distill.fit(teacher, alone, {}, vectors(), objective=KD(), **SHORT).records
    with pytest.raises(DistillError, match="DIITO needs a mapping; give mapping='full'"):
        distill.fit(teacher, one, {}, vectors(), objective=[KD(), DIITO()], **SHORT)
