import pytest

from distill.cli.students import USUAL, plan_of, steps_as_long
from distill.tasks import Task
from tests.distill.tiny_models import images, text


def task(rows):
    return Task("own", rows, rows, ("a", "b", "c"), description="")


@pytest.mark.parametrize(("rows", "names"), [(images(4), 3), (text(4), 4)])
def test_words_are_replaced_where_there_are_words(rows, names):
    found = [plan.name for plan in USUAL if plan.suits(task(rows))]
    assert found == ["kd", "kd-equal-time", "diito", "augmented"][:names]
    assert plan_of("kd,augmented").suits(task(rows)) is (names == 4)


def test_a_student_that_takes_the_time_of_another_is_one_of_the_run():
    names = [plan.name for plan in USUAL]
    assert len(set(names)) == len(names)
    for plan in USUAL:
        assert plan.as_long_as in (None, *names)
        assert plan.as_long_as is None or plan.objectives in names


@pytest.mark.parametrize(("steps", "ratio", "wanted"), [(600, 1.85, 1110), (5, 1.3, 6), (10, 1.0, 10), (10, 0.5, 10)])
def test_as_many_steps_as_the_other_has_time_for(steps, ratio, wanted):
    assert steps_as_long(steps, ratio) == wanted


def test_names_of_folders():
    assert plan_of("labels,kd").name == "labels+kd"
    assert plan_of("kd").title == "KD"
