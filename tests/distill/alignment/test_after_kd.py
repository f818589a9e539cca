"""A mapping that is searched before a training: by a seed, with a copy of the student, and kept by the run."""

import json
import shutil

import pytest
import torch

from distill import DIITO, KD, DistillError, Labels, Schedule, fit, from_layers
from distill.alignment import after_kd
from distill.alignment.after_kd import FoundMapping, search_after_kd
from distill.fit import fit as fitting
from interventions import Location
from tests.distill.tiny_models import QUIET, images, same, spread, vit, weights
from tests.distill.wired import SUM, Wired

SHORT = Schedule(steps=4, batch_size=8, lr=1e-3)


def couple():
    teacher = spread(vit(4), 3, 0.8)
    return teacher, from_layers(teacher, [0, 2, 3])


@pytest.fixture(autouse=True)
def few_pairs(monkeypatch):
    monkeypatch.setattr(after_kd, "PAIRS", 60)


def test_the_student_and_the_random_numbers_are_left_as_they_were():
    teacher, student = couple()
    before, state = weights(student), torch.random.get_rng_state()
    one = search_after_kd(teacher, student, images(40), SHORT, console=QUIET)
    assert same(weights(student), before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert student.training == teacher.training
    other = search_after_kd(teacher, student, images(40), SHORT, console=QUIET)
    assert one.search is not None
    assert one.search.to_dict() == other.search.to_dict()
    assert one.settings == {"mapping": one.search.to_dict()["mapping"], "steps": 4, "pairs": 60}


def test_the_copy_makes_the_first_steps_of_kd():
    teacher, student = couple()
    found = search_after_kd(teacher, student, images(40), SHORT, console=QUIET).search
    fit(teacher, student, {}, images(40), objective=KD(), schedule=SHORT, console=QUIET)
    again = after_kd.search_mapping(teacher, student, images(40), pairs=60, seed=0, controls=())
    assert found.to_dict() == again.to_dict()


def test_a_training_with_the_mapping_that_is_found_is_the_same(tmp_path):
    teacher, student = couple()
    settings = dict(objective=[KD(), DIITO()], schedule=SHORT, console=QUIET)
    searched = fit(teacher, student, "search", images(40), output_dir=tmp_path / "a", **settings)
    mapping = search_after_kd(teacher, couple()[1], images(40), SHORT, console=QUIET).sides
    assert mapping
    plain = fit(teacher, couple()[1], mapping, images(40), **settings)
    assert [record.loss for record in searched.records] == [record.loss for record in plain.records]
    assert same(weights(searched.student), weights(plain.student))
    kept = json.loads((tmp_path / "a" / "settings.json").read_text())["search"]
    assert kept == searched.settings["search"]
    assert FoundMapping.read(tmp_path / "a").sides == mapping
    assert searched.settings["mapping"] == plain.settings["mapping"]
    assert "search" not in plain.settings


def test_a_resumed_run_takes_the_mapping_that_it_had(tmp_path, monkeypatch):
    teacher, student = couple()
    settings = dict(objective=[KD(), DIITO()], schedule=SHORT, console=QUIET, every=2)
    whole = fit(teacher, student, "search", images(40), output_dir=tmp_path / "a", **settings)
    (tmp_path / "a" / "result.json").unlink()  # as a run that was stopped after its step 2
    shutil.rmtree(tmp_path / "a" / "checkpoints" / "step-0000004")
    monkeypatch.setattr(after_kd, "search_after_kd", lambda *_, **__: pytest.fail("searched again"))
    again = fitting(teacher, couple()[1], "search", images(40), output_dir=tmp_path / "a", resume=True, **settings)
    assert same(weights(again.student), weights(whole.student))
    assert again.settings["search"] == whole.settings["search"]


def test_a_run_with_another_mapping_is_not_resumed_with_a_searched_one(tmp_path):
    teacher, student = couple()
    settings = dict(objective=[KD(), DIITO()], schedule=SHORT, console=QUIET)
    fit(teacher, student, {Location(1): Location(0)}, images(40), output_dir=tmp_path / "a", **settings)
    with pytest.raises(DistillError, match="was started with mapping="):
        fit(teacher, couple()[1], "search", images(40), output_dir=tmp_path / "a", resume=True, **settings)


@pytest.mark.parametrize(
    ("teacher", "student", "problem"),
    [
        (None, vit(2), "mapping='search' compares the places of two networks, and there is no teacher; leave"),
        (SUM, Wired(), r"and a causal model has variables; distill\.search_alignment\(causal_model, network\)\.best"),
        (vit(3), vit(1), "every interchange of every pair of places|mapping='search' found no place to map"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_one_line(teacher, student, problem):
    data = None if teacher is SUM else images(8)
    objective = Labels() if teacher is None else None
    with pytest.raises(DistillError, match=problem) as error:
        fit(teacher, student, "search", data, objective=objective, schedule=SHORT, console=QUIET)
    assert "\n" not in str(error.value)
