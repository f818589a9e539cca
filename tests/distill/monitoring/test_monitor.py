"""Evaluations change no bit of a training; the best state comes back; a training ends early; resumed alike."""

import io
import json
import math

import pytest
import torch
from rich.console import Console
from torch import nn

import distill
from distill import DIITO, KD, DistillError, Labels, Schedule, fit
from distill.monitoring import monitor
from distill.tasks.causal.equality import hierarchical_equality
from tests.distill.tiny_models import QUIET, bert, gpt2_lm, llama, same, spread, t5, text, weights

SHORT = Schedule(steps=6, batch_size=4, lr=0.01)


def lm_rows(count=12, seed=0):
    rows = text(count, labels=False, seed=seed)
    return distill.Rows({**rows.table, "labels": rows.table["input_ids"]})


def trained(make=gpt2_lm, objective=None, mapping=None, rows=None, schedule=SHORT, **settings):
    """A student of two layers, trained by a teacher of four."""
    teacher = spread(make(4))
    student = spread(make(2), 1)
    rows = lm_rows() if rows is None else rows
    settings = {"eval_data": lm_rows(9, 1), "console": QUIET, **settings}
    made = [KD()] if objective is None else objective
    result = fit(teacher, student, mapping, rows, objective=made, schedule=schedule, **settings)
    return result, weights(student)


@pytest.mark.parametrize(
    ("make", "objectives", "mapping"),
    [
        (gpt2_lm, [KD()], {}),
        pytest.param(llama, [KD(), DIITO()], "full", marks=pytest.mark.full),
        pytest.param(t5, [KD()], {}, marks=pytest.mark.full),
        (gpt2_lm, [KD(), DIITO()], "full"),
    ],
)
def test_evaluations_change_no_bit_of_a_training(make, objectives, mapping):
    plain, alone = trained(make, objectives, mapping)
    torch.manual_seed(5)
    watched, beside = trained(make, objectives, mapping, eval_every=2, callbacks=[lambda record: None])
    assert [each.loss for each in plain.records] == [each.loss for each in watched.records]
    assert same(alone, beside)
    assert [each["step"] for each in watched.history] == [2, 4, 6]
    assert {"perplexity", "agreement", "kl", "accuracy"} <= set(watched.history[0])
    assert ("iia" in watched.history[0]) == bool(mapping)
    assert plain.history == ()


def test_the_last_evaluation_is_that_of_the_result_where_all_rows_are_taken():
    result, _ = trained(eval_every=4, mapping={})
    assert [each["step"] for each in result.history] == [4, 6]
    assert result.history[-1] == {"step": 6, **result.evaluation.figures}
    few, _ = trained(eval_every=4, mapping={}, eval_rows=3)
    assert few.history[-1]["perplexity"] != few.evaluation.perplexity


def scripted(monkeypatch, values, name="perplexity"):
    """Let evaluations between steps find these values, the first before the first step."""
    left = list(values)
    monkeypatch.setattr(monitor.Monitor, "_measure", lambda self: ({name: left.pop(0)}, ""))
    return left


BEST = [
    ("perplexity", [5.0, 3.0, 3.0, 4.0], 2),
    pytest.param("kl", [5.0, math.nan, 2.0, 2.5], 3, marks=pytest.mark.full),
    pytest.param("iia", [0.5, 0.25, 0.75, 0.75], 3, marks=pytest.mark.full),
    pytest.param("accuracy", [0.5, 0.25, math.nan, 0.5], 1, marks=pytest.mark.full),
    (True, [9.0, math.inf, 7.0, math.nan], 3),
]
FOUR = Schedule(steps=4, batch_size=4, lr=0.01)


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize(("figure", "values", "best"), BEST)
def test_the_student_of_the_best_evaluation_is_returned(figure, values, best, folder, tmp_path, monkeypatch):
    """Ties go to the first, and what is no number is never the best."""
    scripted(monkeypatch, [1.0, *values], "perplexity" if figure is True else figure)
    at, student = [], spread(gpt2_lm(2), 1)

    def remember(record):
        at.append({name: each.clone() for name, each in weights(student).items()})

    settings = dict(objective=KD(), eval_data=lm_rows(9, 1), eval_every=1, save_best=figure, schedule=FOUR, keep=1,
                    output_dir=tmp_path / "run" if folder else None, console=QUIET)  # fmt: skip
    result = fit(spread(gpt2_lm(4)), student, {}, lm_rows(), callbacks=remember, **settings)
    assert result.best == best
    assert f"; the student is that of step {best}" in str(result)
    assert [same(weights(student), each) for each in at] == [step == best for step in range(1, 5)]
    assert result.evaluation.perplexity == distill.evaluate(None, student, {}, lm_rows(9, 1)).perplexity
    if not folder:
        return
    kept = sorted(each.name for each in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [f"step-{step:07d}" for step in sorted({best, 4})]
    assert same(weights(type(student).from_pretrained(tmp_path / "run" / "student")), weights(student))
    monkeypatch.undo()
    if figure != "iia":
        again = fit(spread(gpt2_lm(4)), spread(gpt2_lm(2), 1), {}, lm_rows(), resume=True, **settings)
        assert (again.best, again.history) == (result.best, result.history) or math.nan in values
        assert same(weights(again.student), weights(student))


def test_a_training_whose_evaluations_are_no_numbers_ends_and_says_so(monkeypatch):
    scripted(monkeypatch, [1.0, math.nan, math.nan, math.nan])
    with pytest.warns(UserWarning, match="no evaluation gave a number to compare"):
        found = fit(spread(gpt2_lm(4)), spread(gpt2_lm(2), 1), {}, lm_rows(), objective=KD(), eval_data=lm_rows(9, 1),
                    eval_every=1, save_best=True, early_stopping=2, schedule=SHORT, console=QUIET)  # fmt: skip
    assert (len(found.records), found.best) == (2, None)
    assert found.stopped == "none of 2 evaluations gave a number to compare"


class Halt(Exception):
    """The error of a callback."""


@pytest.mark.parametrize("at", [3, pytest.param(4, marks=pytest.mark.full), 5])
def test_a_resumed_run_is_the_uninterrupted_one(at, tmp_path, monkeypatch):
    """Best step, history, patience and weights, after a failure at any step; the state of that step was saved."""
    values = [9.0, 8.0, 8.5, 8.6, 8.7, 3.0]
    settings = dict(objective=KD(), eval_data=lm_rows(9, 1), eval_every=1, save_best=True, early_stopping=3,
                    schedule=SHORT, every=100, console=QUIET)  # fmt: skip
    scripted(monkeypatch, [1.0, *values])
    whole = fit(spread(gpt2_lm(4)), spread(gpt2_lm(2), 1), {}, lm_rows(), output_dir=tmp_path / "whole", **settings)
    assert (whole.best, len(whole.records)) == (2, 5)
    assert whole.stopped == "no evaluation was better than that of step 2 in the 3 after it"
    monkeypatch.undo()
    left = scripted(monkeypatch, [1.0, *values])

    def fail(record):
        if record.step == at:
            raise Halt("no more")

    with pytest.raises(Halt, match="no more") as raised:
        fit(spread(gpt2_lm(4)), spread(gpt2_lm(2), 1), {}, lm_rows(), output_dir=tmp_path / "parts", callbacks=[fail],
            **settings)  # fmt: skip
    assert f"step-{at:07d}; go on with the same call and resume=True." in raised.value.__notes__[0]
    left.insert(0, 1.0)
    student = spread(gpt2_lm(2), 1)
    parts = fit(spread(gpt2_lm(4)), student, {}, lm_rows(), output_dir=tmp_path / "parts", resume=True, **settings)
    assert (parts.history, parts.best, parts.stopped) == (whole.history, whole.best, whole.stopped)
    assert same(weights(student), weights(whole.student))
    assert (tmp_path / "parts" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()
    lines = [json.loads(each) for each in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [each["evaluation"]["perplexity"] for each in lines] == values[:5]
    assert ["stop" in each for each in lines] == [False] * 4 + [True]
    assert json.loads((tmp_path / "parts" / "result.json").read_text())["best"] == 2


def stop_at_two(record):
    return "stop" if record.step == 2 else None


def test_a_run_that_ended_early_stays_ended_unless_it_goes_on_anyway(tmp_path):
    settings = dict(objective=KD(), schedule=SHORT, console=QUIET, output_dir=tmp_path / "run")
    data = (spread(gpt2_lm(4)), {}, lm_rows())
    first = fit(data[0], spread(gpt2_lm(2), 1), *data[1:], callbacks=stop_at_two, **settings)
    assert first.stopped == "a callback ended the training"
    assert "2 steps of 6 (a callback ended the training) in" in str(first)
    ended = fit(data[0], spread(gpt2_lm(2), 1), *data[1:], callbacks=print, resume=True, **settings)
    assert (len(ended.records), ended.stopped) == (2, first.stopped)
    assert same(weights(ended.student), weights(first.student))
    whole = fit(data[0], spread(gpt2_lm(2), 1), *data[1:], callbacks=print, resume="anyway", **settings)
    assert (len(whole.records), whole.stopped) == (6, None)
    _, expected = trained(mapping={}, eval_data=None)
    assert same(weights(whole.student), expected)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"save_best": "perplexty", "eval_every": 1}, "save_best='perplexty' is no figure.*did you mean 'perplexity'"),
        ({"save_best": True}, "compares evaluations, and there are none between the steps; .* eval_every=200"),
        ({"early_stopping": 0, "eval_every": 1}, "early_stopping=0 is no number of evaluations"),
        ({"early_stopping": True, "eval_every": 1}, "early_stopping must be a whole number"),
        ({"eval_every": "soon"}, "eval_every='soon' is no interval between two evaluations"),
        ({"eval_every": 0}, "eval_every=0 is no interval"),
        ({"eval_rows": 1, "eval_every": 1}, "eval_rows=1 is no number of held-out rows"),
        ({"eval_every": 1, "eval_data": None}, "eval_every=1 has no held-out rows .* eval_data=rows"),
        ({"save_best": "iia", "eval_every": 1}, r"save_best='iia' cannot be measured .*measured: perplexity"),
        ({"keep": 0}, "keep=0 is no number of checkpoints"),
        ({"callbacks": [1]}, r"callbacks=1 cannot be called with the record of a step"),
        ({"callbacks": "print"}, "cannot be called"),
        ({"callbacks": Halt}, "cannot be called"),
        ({"track": "wandbb"}, "track='wandbb' names no tracker; did you mean 'wandb'"),
        ({"track": ["aim"]}, "track='aim' needs a package that is not installed; pip install aim"),
        ({"track": 3}, "track=3 is no tracker"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_first_step(settings, said, tmp_path):
    student = spread(gpt2_lm(2), 1)
    before = {name: each.clone() for name, each in weights(student).items()}
    called = {"eval_data": lm_rows(9, 1), "output_dir": tmp_path / "run", "callbacks": [print], **settings}
    with pytest.raises(DistillError, match=said) as refused:
        fit(spread(gpt2_lm(4)), student, {}, lm_rows(), objective=KD(), schedule=SHORT, console=QUIET, **called)
    assert "\n" not in str(refused.value)
    assert same(weights(student), before)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("answer", [True, False, "go on"])
def test_an_unclear_answer_of_a_callback_is_refused(answer):
    with pytest.raises(DistillError, match="which may mean to stop or to go on; return 'stop' to stop"):
        trained(mapping={}, callbacks=lambda record: answer)


def test_callbacks_see_evaluations_and_stop_by_their_answer_or_stop_iteration():
    seen = []

    class Counter:
        def __call__(self, record):
            seen.append((record.step, record.evaluation is not None))
            if record.step == 3:
                raise StopIteration
            return 7  # as file.write returns

    result, _ = trained(mapping={}, eval_every=2, callbacks=[Counter(), lambda record: None])
    assert seen == [(1, False), (2, True), (3, False)]
    assert result.stopped == "a callback ended the training"


def test_the_time_between_evaluations(monkeypatch):
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(monitor.time, "monotonic", lambda: next(clock))
    result, _ = trained(mapping={}, eval_every="50 seconds")
    assert 1 < len(result.history) < 6
    assert result.history[-1]["step"] == 6


def test_evaluations_are_printed_and_saved_as_data():
    out = io.StringIO()
    result, _ = trained(mapping={}, eval_every=3, console=Console(file=out, width=200))
    assert f"step 3/6 evaluated  perplexity {result.history[0]['perplexity']:.4g}" in out.getvalue()
    assert result.to_dict()["history"] == list(result.history)


def test_classifiers_and_causal_models_are_evaluated_between_steps():
    rows = text(16)
    result = fit(spread(bert(4)), spread(bert(2), 1), {}, rows, objective=[KD(), Labels()], eval_data=text(9, seed=1),
                 eval_every=2, schedule=SHORT, save_best=True, console=QUIET)  # fmt: skip
    assert [set(each) for each in result.history] == [{"step", "accuracy"}] * 3
    model = hierarchical_equality()
    network = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    found = fit(model, network, {}, steps=4, eval_every=2, eval_rows=50, console=QUIET)
    assert [set(each) for each in found.history] == [{"step", "accuracy"}] * 2
