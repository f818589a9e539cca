"""A teacher of nnsight: traced here, and asked as another machine would be. One program makes all the answers."""

import pytest

from tests.distill.teachers.served_side import MODELS, OBJECTIVES, TEACHERS
from tests.other_process import Answers


@pytest.fixture(scope="session")
def answers():
    with Answers("tests.distill.teachers.served_side") as answers:
        yield answers


def apart(first, second):
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("kind", TEACHERS)
def test_the_student_is_that_of_the_torch_model(answers, kind, name):
    plain, other = answers[f"fit {name} torch"], answers[f"fit {name} {kind}"]
    assert other["terms"].keys() == plain["terms"].keys()
    limit = 0.0 if kind == "traced" else 1e-5  # a sample is asked for once, in another batch than those it is used in
    assert apart(plain["weights"], other["weights"]) <= limit
    assert other["is in train mode"]


@pytest.mark.parametrize("below", MODELS)
@pytest.mark.parametrize("above", TEACHERS)
def test_interchange_accuracy_is_that_of_the_torch_models(answers, above, below):
    plain = answers["accuracy torch torch"]["text"]
    assert answers[f"accuracy {above} {below}"]["text"] == plain
    assert "0.000 [0.000" not in plain  # there is something to measure


def test_the_largest_logits_are_the_same_there(answers):
    here, there = answers["top k"]["served"], answers["top k"]["remote"]
    assert apart(here, there) == 0
    assert apart(here, answers["fit kd and diito torch"]["weights"]) > 1e-3  # they are not all


def test_a_host_that_fails_is_asked_again(answers):
    found = answers["flaky"]
    assert apart(found["weights"], answers["fit kd and diito remote"]["weights"]) == 0
    assert len(found["pauses"]) >= 10
    first, second = found["pauses"][:2]
    assert 0.5 <= first < 1.0 <= second < 2.0


def test_a_host_without_our_packages_that_is_started_again(answers):
    found = answers["host"]
    assert apart(found["plain"]["weights"], found["served"]["weights"]) < 1e-5
    assert found["served"]["accuracy"] == found["plain"]["accuracy"]
    assert len(found["pauses"]) == 2
    assert not found["loaded"]
    assert found["kept"]


def test_where_there_are_no_graphs_all_positions_count(answers):
    found = answers["graphs"]
    assert any("keeps no graph" in each for each in found["said"])
    assert found["all"]
    assert found["shape"] == (2, 7)


@pytest.mark.parametrize(
    ("name", "expected"), [("job", False), ("refused", False), ("lost", True), ("busy", True), ("closed", True)]
)
def test_which_errors_of_nnsight_are_of_the_network(answers, name, expected):
    assert answers["errors"][name] is expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("student", "student must be a torch model; write student=interventions.architecture(model).model."),
        ("derivatives", r"Sobolev() runs the teacher on inputs of its own"),
        ("features", "say where they are: at=Location(-1)"),
        ("stale", "holds answers of a teacher with weights="),
        ("not remotable", "needs a model that another machine has too"),
    ],
)
def test_what_cannot_be_says_so(answers, name, message):
    assert message in answers[f"refused {name}"]
