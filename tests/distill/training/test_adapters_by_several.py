"""A student that is its teacher with adapters, trained by several processes: as by one, without a second copy."""

import pytest

CELLS = [("gpt2", "kd"), pytest.param("bert", "diito", marks=pytest.mark.full)]


def value(found):
    assert [each.status for each in found] == [0] * len(found), found[0].output + found[-1].output
    assert all(each.value == found[0].value for each in found)
    return found[0].value


@pytest.mark.parametrize(("model", "objective"), CELLS)
def test_two_processes(groups, model, objective):
    """They train as beside a copy of the teacher, which stays as it was; without draws for rows, as one process."""
    settings = {"model": model, "objective": objective}
    two = value(groups.run("adapted", 2, engine="ddp", **settings))
    beside = value(groups.run("adapted", 2, engine="ddp", copied=True, **settings))
    assert two == beside
    assert two["kept"]
    assert len(set(two["losses"])) == 6
    if objective == "kd":
        one = value(groups.run("adapted", 1, engine="default", **settings))
        assert two["losses"] + two["weights"] == pytest.approx(one["losses"] + one["weights"], rel=1e-9)


def test_models_that_are_divided_are_refused(groups):
    found = groups.run("adapted", 2, engine="fsdp", objective="kd", model="gpt2")
    assert [each.error for each in found] == [found[0].error] * 2
    assert found[0].error.startswith("DistillError: FSDP divides the weights of the student, which are its teacher's")
    assert "load the teacher once more" in found[0].error
