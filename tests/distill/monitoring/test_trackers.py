"""Trackers are given settings, records, evaluations and final figures, by the first process, and are finished."""

import pytest

from distill import KD, DistillError, fit
from tests.distill.monitoring.test_monitor import SHORT, lm_rows, trained
from tests.distill.tiny_models import QUIET, gpt2_lm, spread


class Fake:
    """A tracker that remembers what it is given."""

    def __init__(self):
        self.settings, self.logged, self.finished = {}, [], 0

    def store_init_configuration(self, values):
        self.settings |= values

    def log(self, values, step=None, **more):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def test_a_tracker_is_given_all_that_a_training_finds():
    tracker = Fake()
    result, _ = trained(mapping={}, eval_every=3, track=tracker)
    assert tracker.settings["schedule/lr"] == 0.01
    assert tracker.settings["evaluations/eval_every"] == 3
    assert tracker.settings["objective"] == "['KD(temperature=2.0)']"
    expected = []
    for record in result.records:
        expected.append((record.step, {"loss": record.loss, "lr": record.lr, **record.terms}))
        if record.evaluation is not None:
            expected.append((record.step, {f"eval/{name}": value for name, value in record.evaluation.items()}))
    expected.append((6, {f"final/{name}": value for name, value in result.evaluation.figures.items()}))
    assert tracker.logged == expected
    assert tracker.finished == 1


def test_a_tracker_is_finished_after_an_error():
    tracker = Fake()

    def fail(record):
        raise OSError("no disk")

    with pytest.raises(OSError, match="no disk"):
        trained(mapping={}, track=[tracker], callbacks=fail)
    assert (len(tracker.logged), tracker.finished) == (1, 1)


def test_one_that_does_not_start_is_named_before_the_first_step(monkeypatch):
    from accelerate import tracking

    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    monkeypatch.setattr(tensorboard, "SummaryWriter", lambda *args, **more: 1 / 0)
    assert tracking.TensorBoardTracker.name == "tensorboard"
    seen = []
    with pytest.raises(DistillError, match=r"the tracker 'tensorboard' did not start \(ZeroDivisionError"):
        trained(mapping={}, track="tensorboard", callbacks=seen.append)
    assert seen == []


def test_tensorboard_reads_what_was_written(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "run"
    settings = dict(objective=KD(), schedule=SHORT, eval_data=lm_rows(9, 1), eval_every=3, console=QUIET)
    result = fit(spread(gpt2_lm(4)), spread(gpt2_lm(2), 1), {}, lm_rows(), track=["tensorboard"], output_dir=folder,
                 **settings)  # fmt: skip
    read = accumulator.EventAccumulator(str(folder / "trackers" / "fit"))
    read.Reload()
    losses = [(each.step, each.value) for each in read.Scalars("loss")]
    assert losses == [(each.step, pytest.approx(each.loss)) for each in result.records]
    evaluated = [(each.step, each.value) for each in read.Scalars("eval/perplexity")]
    assert evaluated == [(each["step"], pytest.approx(each["perplexity"])) for each in result.history]
    assert read.Scalars("final/kl")[0].value == pytest.approx(result.evaluation.kl)
    again = fit(spread(gpt2_lm(4)), spread(gpt2_lm(2), 1), {}, lm_rows(), resume=True, output_dir=folder, **settings)
    assert again.history == result.history
