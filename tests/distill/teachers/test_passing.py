"""Answers to texts that do not come back, as those that a student writes, are kept neither on disk nor in memory."""

import pytest

from distill import DIITO, KD, DistillError, Served, Written, fit
from tests.distill.tiny_models import QUIET, weights
from tests.distill.writing.words import pairs, taught


def trained(steps, share, by="student", objective=None, cache=None, is_served=False):
    """Return the losses and weights of a training on written rows, and the numbers of kept answers by kind."""
    teacher, student = taught()
    served = Served(teacher, cache=cache) if is_served else None
    data = Written(pairs(), by, share=share, max_new_tokens=6)
    mapping = "full" if objective else {}
    result = fit(
        served or teacher, student, mapping, data, objective=objective or KD(1.0), steps=steps, batch_size=4, lr=0.01,
        console=QUIET, **({} if is_served else {"cache": cache}),
    )  # fmt: skip
    cached = served if is_served else None if cache is None else Served(teacher, cache=cache)
    kept = {} if cached is None else {kind: cached.cache.count(kind) for kind in ("samples", "counterfactuals")}
    return [each.loss for each in result.records], weights(student), kept


@pytest.mark.parametrize("objective", [None, lambda: [KD(1.0), DIITO()]])
@pytest.mark.parametrize("where", ["folder", pytest.param("memory", marks=pytest.mark.full)])
def test_what_the_student_wrote_is_kept_nowhere_and_the_losses_are_those_of_the_live_teacher(
    objective, where, tmp_path
):
    for steps in (2, 5):
        folder = tmp_path / str(steps) if where == "folder" else None
        made = objective and objective()
        losses, own, kept = trained(steps, 1.0, objective=made, cache=folder, is_served=True)
        assert kept == {"samples": 0, "counterfactuals": 0}
        live_losses, live, _ = trained(steps, 1.0, objective=objective and objective())
        assert losses == pytest.approx(live_losses, rel=1e-12)
        assert all((own[name] - live[name]).abs().max() < 1e-9 for name in own)


def test_rows_that_come_back_are_kept_beside_those_that_do_not(tmp_path):
    found = [trained(steps, 0.5, cache=tmp_path / str(steps))[2]["samples"] for steps in (12, 24)]
    assert found == [len(pairs())] * 2  # the completions of the data
    found = [trained(steps, 1.0, "teacher", cache=tmp_path / f"t{steps}")[2]["samples"] for steps in (2, 6)]
    assert found == [len(pairs())] * 2  # what the teacher wrote once


def test_a_cache_that_would_keep_nothing_is_refused(tmp_path):
    with pytest.raises(DistillError, match=r"would keep nothing, as the student writes new texts in each step"):
        trained(2, 1.0, cache=tmp_path / "answers")
    assert not (tmp_path / "answers").exists()
