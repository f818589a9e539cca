"""Of answers that are NaN or infinite no figure is made, and weights that are so are not saved."""

import pytest
import torch
from torch import nn

import distill
from distill import metrics
from distill.errors import DistillError
from distill.evaluation.linear_probe import linear_probe
from distill.training.checkpoints import Checkpoints
from distill.training.schedule import Schedule
from interventions import InterventionError, Location
from interventions import metrics as measures

WRONG = {"nan": torch.nan, "inf": torch.inf}
REFUSED = r"is of answers, and \d+ of \d+ are none: \d+ of \d+ logits are NaN or infinite; see"


class Classifier(nn.Module):
    """Two layers; what it answers to a row is spoilt where the first number of the row is above a threshold."""

    def __init__(self, spoilt: float = 0.0, above: float = -torch.inf, only: int | None = None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.spoilt, self.above, self.only = spoilt, above, only

    def forward(self, x):
        logits = self.last(self.first(x).relu())
        rows = (x[:, :1] > self.above).expand_as(logits).clone()
        if self.only is not None:
            rows[:, torch.arange(3) != self.only] = False
        return torch.where(rows, logits + self.spoilt, logits)


def data(rows: int = 40) -> dict[str, torch.Tensor]:
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(0))
    return {"x": x, "labels": (x.sum(1) > 0).long()}


PLACE = Location(module="first", dims=range(4))
MAPPING = {PLACE: PLACE}
FIGURES = {
    "accuracy": lambda bad, good: metrics.accuracy(bad, data()),
    "calibration": lambda bad, good: metrics.calibration(bad, data()),
    "evaluate": lambda bad, good: distill.evaluate(None, bad, None, data()),
    "interchange accuracy, student": lambda bad, good: distill.interchange_accuracy(good, bad, MAPPING, data()),
    "interchange accuracy, teacher": lambda bad, good: distill.interchange_accuracy(bad, good, MAPPING, data()),
    "metric accuracy": lambda bad, good: measures.accuracy(1)(bad(data()["x"])),
    "agreement": lambda bad, good: measures.agreement(good(data()["x"]))(bad(data()["x"])),
    "agreement, reference": lambda bad, good: measures.agreement(bad(data()["x"]))(good(data()["x"])),
}


@pytest.mark.parametrize("above", [-torch.inf, 1.5], ids=["every row", "some rows"])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("figure", FIGURES)
def test_no_figure_is_made_of_answers_that_are_none(figure, wrong, above):
    bad, good = Classifier(WRONG[wrong], above), Classifier()
    with pytest.raises((DistillError, InterventionError), match=REFUSED) as said:
        FIGURES[figure](bad, good)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("figure", FIGURES)
def test_a_class_that_is_masked_out_is_an_answer(figure):
    found = FIGURES[figure](Classifier(-torch.inf, only=2), Classifier())
    assert found is not None
    if isinstance(found, torch.Tensor):
        assert found.isfinite().all()


@pytest.mark.parametrize("wrong", WRONG)
def test_what_compares_features_refuses_too(wrong):
    bad = Classifier()
    with torch.no_grad():
        bad.first.weight[0, 0] = WRONG[wrong]
    with pytest.raises(DistillError, match=r"not finite in \d+ rows"):
        linear_probe(bad, data(), data())
    states = bad.first(data()["x"]).detach()
    for similarity in (metrics.cka, metrics.representational_similarity):
        with pytest.raises(DistillError, match="not finite"):
            similarity(states, states)
    with pytest.raises(DistillError, match="which is no distance"):
        distill.training_path({"a": [states, states]}, similarity=lambda a, b: a.mean() - b.mean())


def test_padding_may_be_none():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 3)

        def forward(self, input_ids, attention_mask):
            return self.table(input_ids).masked_fill(~attention_mask.bool()[..., None], torch.nan)

    ids = torch.arange(1, 9).view(2, 4)
    rows = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]), "labels": ids % 3}
    rows["labels"] = rows["labels"].masked_fill(rows["attention_mask"] == 0, -100)
    assert metrics.accuracy(Tagger(), rows).count == 5


@pytest.mark.parametrize("lr", [float("inf"), float("nan")])
def test_a_learning_rate_that_is_no_number(lr):
    with pytest.raises(DistillError, match="must be above 0 and finite|lr must be a number"):
        Schedule(lr=lr)


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    """The very last step makes them: its loss was finite."""
    schedule = Schedule(steps=1, batch_size=8, optimizer="sgd", clip=None, warmup=0.0, lr=3e38, weight_decay=1e3)
    settings = {"data": data(), "objective": distill.Labels(), "schedule": schedule, "output_dir": tmp_path / "run"}
    student = Classifier()
    with pytest.raises(DistillError, match=r"after step 1, \d+ of \d+ values of \S+ are NaN or infinite, so nothing"):
        distill.fit(None, student, **settings)
    assert not (tmp_path / "run" / "student").exists()
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_the_last_good_checkpoint_stays(tmp_path):
    """Weights spoilt at the step of a checkpoint: the one before it stays, and is named."""
    student = Classifier()
    schedule = Schedule(steps=3, batch_size=8)
    kept = Checkpoints(tmp_path / "kept", every=1)
    running = distill.steps(None, student, data=data(), objective=distill.Labels(), schedule=schedule, checkpoints=kept)
    assert next(running).step == 1
    student.last.bias.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(DistillError, match=r"after step 2, .* the last good checkpoint is .*step-0000001; lower"):
        next(running)
    assert [each.name for each in (tmp_path / "kept").iterdir()] == ["step-0000001"]
