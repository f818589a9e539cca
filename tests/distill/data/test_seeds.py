"""What is drawn in a training is decided by its seed, whatever generator a model draws from."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import distill
from distill import KD, DistillError, Labels, Schedule
from distill.training.checkpoints import Checkpoints
from distill.training.schedule import drawing
from tests.distill.tiny_models import bert, mlp, same, spread, text, vectors, weights

# Dropout draws from torch's generator, the masks that wav2vec2, Whisper and SpeechT5 put over inputs from NumPy's,
# the layers that some models drop from Python's.
DRAWS = {
    "torch": lambda: torch.rand(1).item(),
    "numpy": lambda: np.random.rand(),
    "python": random.random,
}


class Drawing(nn.Module):
    """An mlp whose inputs are scaled by a draw while it trains."""

    def __init__(self, draw) -> None:
        super().__init__()
        self.inner, self.draw = mlp(), draw

    def forward(self, inputs):
        return self.inner(inputs * (0.5 + self.draw()) if self.training else inputs)


def trained(draw, seed=0, **settings) -> tuple[list, nn.Module]:
    torch.manual_seed(0)
    student = Drawing(draw)
    schedule = Schedule(steps=4, batch_size=8, lr=0.01, seed=seed)
    records = distill.steps(None, student, None, vectors(), objective=Labels(), schedule=schedule, **settings)
    return [record.loss for record in records], student


@pytest.mark.parametrize("name", DRAWS)
def test_the_seed_decides_what_a_model_draws(name):
    draw = DRAWS[name]
    (first, student), (again, twin), (other, _) = trained(draw), trained(draw), trained(draw, seed=1)
    assert first == again
    assert same(weights(student), weights(twin))
    assert first[0] != other[0]


@pytest.mark.parametrize("name", DRAWS)
def test_a_resumed_run_draws_as_the_full_one(name, tmp_path):
    whole, student = trained(DRAWS[name])
    torch.manual_seed(0)
    twin, schedule = Drawing(DRAWS[name]), Schedule(steps=4, batch_size=8, lr=0.01)
    asked = {"objective": Labels(), "schedule": schedule}
    begun = distill.steps(None, twin, None, vectors(), checkpoints=Checkpoints(tmp_path, every=2), **asked)
    for _ in zip(range(2), begun, strict=False):
        pass
    begun.close()
    rest = distill.steps(None, twin, None, vectors(), checkpoints=Checkpoints(tmp_path, resume=True), **asked)
    assert [record.loss for record in rest] == whole[2:]
    assert same(weights(twin), weights(student))


def test_the_callers_generators_are_as_they_were():
    def states():
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    before = states()
    with drawing(0, 3, torch.device("cpu")):
        found = [draw() for draw in DRAWS.values()]
        assert states() != before
    assert states() == before
    with drawing(0, 3, torch.device("cpu")):
        assert [draw() for draw in DRAWS.values()] == found


def test_a_training_has_gradients_whatever_the_caller_says():
    outside, _ = trained(DRAWS["torch"])
    with torch.no_grad():
        inside, _ = trained(DRAWS["torch"])
    assert inside == outside
    with (
        torch.inference_mode(),
        pytest.raises(DistillError, match=r"inside torch\.inference_mode\(\).*outside"),
    ):
        distill.fit(mlp(), mlp(), {}, vectors(), objective=KD(), steps=1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_measurements_are_the_same_whatever_the_caller_says(mode):
    teacher, student, rows = spread(bert(3)), spread(bert(2), 1), text()
    measured = {
        "interchange_accuracy": lambda: distill.interchange_accuracy(teacher, student, "full", rows, pairs=16),
        "accuracy": lambda: distill.accuracy(student, rows),
        "evaluate": lambda: distill.evaluate(teacher, student, "full", rows, pairs=16),
    }
    outside = {name: str(call()) for name, call in measured.items()}
    with mode():
        assert {name: str(call()) for name, call in measured.items()} == outside


def test_scikit_learn_is_imported_where_its_draws_are_undone():
    """It draws from Python's generator while it is imported; `test_load.py` sees it in a process of its own."""
    sources = [path.read_text(encoding="utf-8") for path in Path(distill.__file__).parent.rglob("*.py")]
    before = [line for text in sources for line in re.findall(r"(.*)\n *(?:from|import) sklearn", text)]
    assert len(before) >= 4
    assert {line.partition("#")[0].strip() for line in before} == {"with decided(0):"}
