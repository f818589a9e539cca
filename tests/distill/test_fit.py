import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file

from distill import (
    DIITO,
    KD,
    DistillError,
    InContext,
    Interrupted,
    Labels,
    Rows,
    Schedule,
    Span,
    evaluate,
    fit,
    from_layers,
    layer_mapping,
)
from distill.evaluation import measurement
from distill.monitoring import held_out
from distill.monitoring.held_out import positions_of
from distill.storage.files import read_json
from distill.tasks import Task
from distill.training.run_folder import read_log
from interventions import Location
from tests.distill.tiny_models import (
    CNN,
    LSTM,
    QUIET,
    bert,
    gpt2_lm,
    images,
    mlp,
    same,
    spread,
    text,
    vectors,
    vit,
    weights,
)

SETTINGS = dict(steps=6, batch_size=5, lr=1e-2, console=QUIET)
fitting = importlib.import_module("distill.fit")  # distill.fit is the function


@pytest.fixture(autouse=True)
def few_pairs(monkeypatch):
    """Measured on 60 pairs instead of 2000, to be quick."""
    monkeypatch.setattr(measurement, "MOST_PAIRS", 60)


def couple(dropout=0.0):
    teacher = spread(bert(4, dropout=dropout))
    return teacher, from_layers(teacher, 2)


def test_what_a_run_leaves(tmp_path):
    teacher, student = couple()
    before = weights(teacher)
    folder = tmp_path / "run"
    result = fit(
        teacher, student, "single", text(), eval_data=text(12, seed=1), output_dir=folder, title="x", **SETTINGS
    )
    assert result.student is student
    assert [r.step for r in result.records] == list(range(1, 7))
    assert same(before, weights(teacher))
    assert all(p.grad is None for p in teacher.parameters())
    again = type(student).from_pretrained(folder / "student").eval()
    assert same(weights(student), weights(again))
    told = json.loads((folder / "result.json").read_text())
    assert told["steps"] == 6
    assert told["evaluation"]["accuracy"]["value"] == result.accuracy
    assert told["evaluation"]["interchange"]["overall"]["iia"]["value"] == result.iia
    assert told["settings"] == read_json(folder / "settings.json", "")
    assert told["settings"]["mapping"] == ["block_output.2 ↔ block_output.0"]
    assert told["settings"]["schedule"]["lr"] == 1e-2
    assert read_log(folder) == list(result.records)
    assert "6 steps in" in str(result)
    assert "IIA" in str(result) or "no interchange" in str(result)
    assert "<pre>6 steps in" in result._repr_html_()
    assert [axes.get_title() for axes in result.plot().axes] == ["kd", "kd_cf"]


def test_overrides_of_a_schedule():
    teacher, student = couple()
    schedule = Schedule(steps=3, batch_size=8, lr=1e-4, seed=5)
    made = fit(teacher, student, None, text(), objective=KD(), schedule=schedule, lr=1e-3, console=QUIET)
    assert made.settings["schedule"] | {"x": 0} == {**Schedule(steps=3, batch_size=8, lr=1e-3, seed=5).__dict__, "x": 0}
    made = fit(teacher, student, None, text(24), objective=KD(), schedule=schedule, epochs=2, console=QUIET)
    assert len(made.records) == 6  # epochs were asked for, so the steps of the schedule do not count


def test_a_task_is_trained_and_tested_on_its_own_rows():
    teacher, student = couple()
    task = Task("own", text(20), text(14, seed=1), ("a", "b", "c"))
    result = fit(teacher, student, None, task, **SETTINGS)
    assert result.evaluation.accuracy.count == 14
    assert result.iia == evaluate(teacher, student, layer_mapping(teacher, student), task, pairs=60).interchange.iia
    assert fit(None, student, None, task, objective=Labels(), **SETTINGS).evaluation.interchange is None


@pytest.mark.parametrize("make", [bert, vit])
def test_random_data(make, monkeypatch):
    monkeypatch.setattr("distill.tasks.loading.RANDOM_ROWS", 20)
    teacher = spread(make(3))
    result = fit(teacher, from_layers(teacher, 2), None, "random", **SETTINGS)
    assert len(result.records) == 6
    assert result.accuracy is None


def test_data_must_be_given():
    teacher, student = couple()
    with pytest.raises(DistillError, match=r"pass data='pvr'.*data='random'"):
        fit(teacher, student, console=QUIET)
    with pytest.raises(DistillError, match=r"data=\{'inputs': torch.randn"):
        fit(mlp(), mlp(), None, "random", objective=KD(), console=QUIET)


@pytest.mark.parametrize(
    ("make", "rows", "mapping"),
    [
        (mlp, vectors(), {Location(module="2", dims=range(4)): Location(module="2", dims=range(4))}),
        (CNN, images(), {Location(module="conv1"): Location(module="conv1")}),
        (LSTM, text(24, 6, 6), {Location(module="embed"): Location(module="embed")}),
    ],
)
def test_plain_modules_are_saved_as_safetensors(make, rows, mapping, tmp_path):
    teacher, student = spread(make()), spread(make(), 1)
    result = fit(teacher, student, mapping, rows, eval_data=rows, output_dir=tmp_path / "r", **SETTINGS)
    assert same(load_file(tmp_path / "r" / "student" / "model.safetensors"), weights(student))
    assert 0 <= result.iia <= 1


def test_a_used_folder_is_refused_and_a_mistake_uses_none(tmp_path):
    teacher, student = couple()
    folder = tmp_path / "run"
    with pytest.raises(DistillError, match="networks were given and no data"):
        fit(teacher, student, output_dir=folder, console=QUIET)
    with pytest.raises(DistillError, match="weights names"):
        fit(teacher, student, None, text(), weights={"x": 1.0}, output_dir=folder, **SETTINGS)
    assert not folder.exists()
    fit(teacher, student, None, text(), output_dir=folder, **SETTINGS)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(
        DistillError, match=r"is not empty: it may hold another run; choose a new folder, or .*resume=True"
    ):
        fit(teacher, student, None, text(), output_dir=folder, **SETTINGS)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    (tmp_path / "file").touch()
    with pytest.raises(DistillError, match="is a file, and a run needs a folder; name another"):
        fit(teacher, student, None, text(), output_dir=tmp_path / "file", **SETTINGS)


def test_a_student_is_saved_before_it_is_measured(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no measure")

    monkeypatch.setattr(held_out, "answers_on", broken)
    teacher, student = couple()
    with pytest.raises(RuntimeError, match="no measure"):
        fit(teacher, student, None, text(), eval_data=text(), output_dir=tmp_path / "r", **SETTINGS)
    assert same(weights(type(student).from_pretrained(tmp_path / "r" / "student")), weights(student))


def test_nothing_to_measure_is_a_note():
    teacher = spread(bert(3))
    result = fit(teacher, from_layers(teacher, 1), None, text(), eval_data=text(12), **SETTINGS)
    assert result.iia is None
    assert result.accuracy is not None
    assert "no interchange accuracy: every write of this mapping replaces all" in str(result)
    assert result.to_dict()["evaluation"]["note"].startswith("no interchange accuracy")


def test_regression_is_measured_by_its_error():
    teacher = spread(bert(4, labels=1))
    rows = Rows({**text(20, labels=False).table, "labels": torch.rand(20)})
    from distill import Cosine

    result = fit(teacher, from_layers(teacher, 2), "full", rows, objective=Cosine(), eval_data=rows, **SETTINGS)
    assert result.accuracy is None
    assert result.evaluation.interchange.overall.error > 0


def test_positions_are_measured_as_trained():
    assert positions_of([KD(), DIITO(positions=Span(0.5))]) == Span(0.5)
    assert positions_of([DIITO(positions=None)]) is None
    assert positions_of([KD()]) == Span(0.3)


# --- stopping and going on --------------------------------------------------------------------------------------------


class Interrupting(KD):
    """KD that presses Ctrl-C in one training step."""

    def __init__(self, at):
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, step):
        self.calls += torch.is_grad_enabled()
        if self.calls == self.at:
            signal.raise_signal(signal.SIGINT)
        return super().forward(step)


@pytest.mark.parametrize("at", [1, 4])
def test_ctrl_c_ends_after_the_step_and_going_on_changes_nothing(at, tmp_path):
    teacher, _ = couple(dropout=0.2)
    objectives = lambda first: [first, DIITO(InContext())]  # noqa: E731
    whole, student, again = (from_layers(teacher, 2).eval() for _ in range(3))
    expected = fit(teacher, whole, None, text(), objective=objectives(KD()), eval_data=text(12), **SETTINGS)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(
        Interrupted,
        match=rf"stopped after step {at} of 6; .*step-000000{at}; go on with the same call and resume=True",
    ):
        fit(
            teacher,
            student,
            None,
            text(),
            objective=objectives(Interrupting(at)),
            eval_data=text(12),
            output_dir=tmp_path / "r",
            **SETTINGS,
        )
    assert signal.getsignal(signal.SIGINT) is handler
    assert not student.training
    torch.rand(3)
    with pytest.warns(UserWarning, match="was started with objective=.*continues all the same, as resume='anyway'"):
        result = fit(
            teacher,
            again,
            None,
            text(),
            objective=objectives(KD()),
            eval_data=text(12),
            output_dir=tmp_path / "r",
            resume="anyway",
            **SETTINGS,
        )
    assert same(weights(whole), weights(again))
    assert result.records == expected.records
    assert result.evaluation == expected.evaluation


def test_ctrl_c_without_a_folder_says_that_nothing_was_saved():
    teacher, student = couple()
    with pytest.raises(
        Interrupted, match="stopped after step 2 of 6; nothing was saved, because no output_dir was given"
    ):
        fit(teacher, student, None, text(), objective=Interrupting(2), **SETTINGS)
    assert not student.training


def test_going_on_after_the_last_step_gives_the_result_again(tmp_path):
    teacher, student = couple()
    folder = tmp_path / "r"
    expected = fit(teacher, student, None, text(), output_dir=folder, eval_data=text(12), every=3, **SETTINGS)
    again = from_layers(teacher, 2)
    result = fit(teacher, again, None, text(), output_dir=folder, eval_data=text(12), resume=True, **SETTINGS)
    assert result.records == expected.records
    assert result.evaluation == expected.evaluation
    assert same(weights(student), weights(again))


def test_resuming_what_is_not_there(tmp_path):
    teacher, student = couple()
    with pytest.raises(DistillError, match=r"resume=True needs the folder to go on from; pass output_dir="):
        fit(teacher, student, None, text(), resume=True, **SETTINGS)
    with pytest.raises(DistillError, match=r"holds no run to go on with; leave resume out to start one"):
        fit(teacher, student, None, text(), output_dir=tmp_path / "r", resume=True, **SETTINGS)
    fit(teacher, student, None, text(), output_dir=tmp_path / "r", **SETTINGS)
    with pytest.raises(
        DistillError,
        match=r"schedule.lr=0.01 and is resumed with 1.0; use the same, .* or go on all the same: resume='anyway'",
    ):
        fit(teacher, student, None, text(), output_dir=tmp_path / "r", resume=True, **{**SETTINGS, "lr": 1.0})
    with pytest.raises(DistillError, match=r"was started with objective="):
        fit(
            teacher,
            student,
            None,
            text(),
            objective=[KD(), DIITO(InContext())],
            output_dir=tmp_path / "r",
            resume=True,
            **SETTINGS,
        )
    shutil.rmtree(tmp_path / "r" / "checkpoints")
    with pytest.raises(DistillError, match=r"was started with another student as it was at the start"):
        fit(teacher, student, None, text(), output_dir=tmp_path / "r", resume=True, **SETTINGS)
    with pytest.warns(UserWarning, match=r"no checkpoint: the run ended before its first, and starts anew"):
        again = fit(teacher, couple()[1], None, text(), output_dir=tmp_path / "r", resume=True, **SETTINGS)
    assert list(again.records) == read_log(tmp_path / "r")


BF16 = """
    import torch
    from accelerate import Accelerator
    from distill import fit, from_layers
    from tests.distill.tiny_models import QUIET, bert, spread, text

    teacher = spread(bert(4))
    states = []
    for accelerator in (Accelerator(mixed_precision="bf16"),) * 2:
        student = from_layers(teacher, 2)
        result = fit(teacher, student, None, text(), steps=3, batch_size=5, console=QUIET, accelerator=accelerator)
        states.append(student.state_dict())
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values()))
    plain = student(**{k: v for k, v in text().batch([0]).items() if k in ("input_ids", "attention_mask")})
    assert plain.logits.dtype == torch.float32
    print("terms", *result.records[-1].terms)
"""


def test_mixed_precision():
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(BF16)], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout == "terms kd kd_cf\n", done.stderr


REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))


def test_a_language_model_without_labels(tmp_path):
    teacher = spread(gpt2_lm(4))
    result = fit(
        teacher,
        from_layers(teacher, 2),
        None,
        text(labels=False),
        eval_data=text(8, labels=False),
        output_dir=tmp_path / "r",
        **SETTINGS,
    )
    assert result.accuracy is None
    assert 0 <= result.iia <= 1
    assert re.search(r"\(kd [\d.]+, kd_cf [\d.]+\)", str(result))
