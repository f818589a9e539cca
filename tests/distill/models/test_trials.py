"""Wrong inputs × verbs: each gives one line with the value and a way out that is code, and leaves nothing behind."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import distill
from distill import KD, DistillError, Labels, Schedule
from interventions import Location, Rotation
from tests.distill.tiny_models import CLASSES, CNN, LSTM, QUIET, bert, gpt2, mlp

ROWS = 6


class Pair(nn.Module):
    """Two inputs, both needed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.head = nn.Linear(6, CLASSES)

    def forward(self, left, right):
        for layer in self.layers:
            left = layer(left).tanh()
        return self.head(left + right)


class Several(nn.Module):
    """Two tensors, of which either could be the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, inputs):
        found = self.inner(inputs)
        return found, found + 1


class Flat(nn.Module):
    """One number a row, without an axis of classes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, inputs):
        return self.inner(inputs)[:, 0]


def classes(rows: int = ROWS) -> torch.Tensor:
    return torch.arange(rows) % CLASSES


def tokens(width: int = 5, high: int = 40, rows: int = ROWS) -> torch.Tensor:
    return torch.randint(5, high, (rows, width), generator=torch.Generator().manual_seed(0))


def ragged() -> dict:
    """Two short rows, and one longer than the model's positions further down."""
    ids = [tokens(4, rows=1)[0] for _ in range(ROWS - 1)] + [tokens(30, rows=1)[0]]
    return {"input_ids": ids, "attention_mask": [torch.ones_like(row) for row in ids]}


def unknown() -> torch.Tensor:
    ids = tokens()
    ids[1, 2] = 57
    return ids


def plain(**columns) -> dict:
    return {**columns, "labels": classes()}


# {what is wrong: (makes a model, makes the data, the value in the line, the way out)}
WRONG = {
    "a token that BERT does not know": (bert, lambda: plain(input_ids=unknown()), r"57", r"from_pretrained\("),
    "a token that an embedding does not know": (LSTM, lambda: plain(input_ids=unknown()), r"57.*39", r"pretrained"),
    "more tokens than positions": (bert, lambda: plain(input_ids=tokens(30)), r"30.*24", r"max_length=24"),
    "one row longer than the positions": (bert, lambda: plain(**ragged()), r"30.*24", r"max_length=24"),
    "GPT-2, more tokens than positions": (gpt2, lambda: plain(input_ids=tokens(30)), r"30.*24", r"max_length=24"),
    "whole numbers": (mlp, lambda: plain(inputs=torch.ones(ROWS, 6).long()), r"int64", r"\.to\(torch.float32\)"),
    "uint8 pictures": (
        CNN, lambda: plain(pixel_values=torch.ones(ROWS, 1, 8, 8).byte()), r"uint8", r"\.float\(\) / 255",
    ),
    "pictures without channels": (
        CNN, lambda: plain(pixel_values=torch.randn(ROWS, 8, 8)), r"\[\d, 8, 8\]", r"\[:, None\]",
    ),
    "channels last": (
        CNN, lambda: plain(pixel_values=torch.randn(ROWS, 8, 8, 1)), r"\[\d, 8, 8, 1\]", r"permute\(0, 3, 1, 2\)",
    ),
    "tokens that are no whole numbers": (bert, lambda: plain(input_ids=tokens().float()), r"float32", r"\.long\(\)"),
    "a missing column": (Pair, lambda: plain(left=torch.randn(ROWS, 6)), r"left|right", r"'right'"),
    "other columns": (CNN, lambda: plain(a=torch.zeros(ROWS, 1), b=torch.zeros(ROWS, 1)), r"a, b", r"data=\{"),
    "another width": (mlp, lambda: plain(inputs=torch.randn(ROWS, 5)), r"\[\d, 5\]", r"Rows\.of\(data\)"),
    "another device": (
        mlp, lambda: plain(inputs=torch.empty(ROWS, 6, device="meta")), r"meta", r"\.to\('cpu'\)|\.cpu\(\)",
    ),
    "two outputs": (Several, lambda: plain(inputs=torch.randn(ROWS, 6)), r"tuple \(0: \[", r"answers=0"),
    "an answer without classes": (Flat, lambda: plain(inputs=torch.randn(ROWS, 6)), r"answers \[\d\]", r"answers="),
}  # fmt: skip

SCHEDULE = Schedule(steps=1, batch_size=3)


def fit(model, twin, data):
    distill.fit(model, twin, {}, data, objective=KD(), schedule=SCHEDULE, output_dir="run", console=QUIET)


def steps(model, twin, data):
    list(distill.steps(model, twin, {}, data, objective=KD(), schedule=SCHEDULE))


def labels(model, twin, data):
    distill.fit(None, twin, None, data, objective=Labels(), schedule=SCHEDULE, output_dir="run", console=QUIET)


def measured(model, twin, data):
    distill.interchange_accuracy(model, twin, {first_of(model): first_of(twin)}, data, pairs=4)


def evaluated(model, twin, data):
    distill.evaluate(model, twin, {}, data)


def together(model, twin, data):
    distill.mutual([model, twin], data, schedule=SCHEDULE, output_dir="run", console=QUIET)


def probed(model, twin, data):
    distill.linear_probe(model, data, data)


def aligned(model, twin, data):
    at = replace(first_of(twin), subspace=Rotation(1))
    distill.align(model, twin, {first_of(model): at}, data, steps=1, batch_size=3, pairs=4, console=QUIET)


def first_of(model: nn.Module) -> Location:
    """A place that every one of these models has: the first linear or convolution."""
    kinds = nn.Linear | nn.Conv2d | nn.LSTM
    if hasattr(model, "config") and "GPT2" in type(model).__name__:
        return Location(0)
    return Location(module=next(path for path, module in model.named_modules() if isinstance(module, kinds)))


VERBS = {
    "fit": fit, "steps": steps, "labels": labels, "interchange_accuracy": measured, "evaluate": evaluated,
    "mutual": together, "linear_probe": probed, "align": aligned,
    "accuracy": lambda model, twin, data: distill.accuracy(model, data),
    "calibration": lambda model, twin, data: distill.calibration(model, data),
}  # fmt: skip
# Verbs for which it is not wrong: features need no answer, and what has no logits is not measured.
RIGHT = {("two outputs", "linear_probe"), ("two outputs", "evaluate")}


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_said_in_one_line(wrong, verb, tmp_path, monkeypatch):
    if (wrong, verb) in RIGHT:
        pytest.skip("not wrong here")
    make, data, value, way_out = WRONG[wrong]
    monkeypatch.chdir(tmp_path)
    models = make().train(), make()
    models[1].eval()
    with pytest.raises(DistillError) as raised:
        VERBS[verb](*models, data())
    line = str(raised.value)
    assert "\n" not in line
    assert len(line) < 400
    assert re.search(value, line), line
    assert re.search(way_out, line), line
    assert [hooks(model) for model in models] == [0, 0]
    assert models[0].training
    assert not models[1].training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in models[1].parameters())
    assert not list(Path(tmp_path).iterdir())
