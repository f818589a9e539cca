"""Measurements over rows of several lengths: little padding, and the same figures as in the order of the data."""

from typing import Any

import pytest
import torch

import distill
from distill import Rows, metrics
from distill.data.texts import lengths
from distill.data.texts.lengths import similar_batches
from distill.evaluation.answers.labelled_answers import labelled_answers
from distill.evaluation.metrics import _log_probabilities
from distill.tasks import MinimalPairs
from tests.distill.tiny_models import bert, llama


@pytest.fixture
def uneven() -> Rows:
    """Rows of 1 to 20 tokens, in no order of length."""
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 40, (int(n),), generator=draw) for n in torch.randint(1, 21, (50,), generator=draw)]
    table = {"input_ids": ids, "attention_mask": [torch.ones_like(row) for row in ids]}
    return Rows({**table, "labels": torch.randint(0, 3, (50,), generator=draw)})


def test_rows_of_similar_length_are_measured_together_with_the_same_figures(uneven, monkeypatch):
    model, tokens, other = bert(labels=3).eval(), llama(2).eval(), llama(2).eval()
    text = Rows({name: column for name, column in uneven.table.items() if name != "labels"})
    pairs = MinimalPairs(good=text, bad=text.take(range(49, -1, -1)), groups=("a",) * 50)

    def figures() -> list[Any]:
        found = list(labelled_answers(model, uneven, 8, "test"))
        logits, order = torch.cat([each for each, *_ in found]), torch.cat([each for *_, each in found])
        beside = distill.evaluate(tokens, other, None, text)
        return [logits[order.argsort()], torch.tensor(metrics.perplexity(tokens, text)),
                torch.tensor(list(beside.figures.values())), _log_probabilities(tokens, text, 8),
                torch.tensor([each.value for each in metrics.preferences(tokens, pairs).values()]),
                torch.tensor(metrics.accuracy(model, uneven).value)]  # fmt: skip

    grouped = figures()
    padded = sum(len(part) * max(len(text.table["input_ids"][i]) for i in part) for part in similar_batches(text, 8))
    assert padded <= 1.2 * sum(map(len, text.table["input_ids"]))
    monkeypatch.setattr(lengths, "lengths_of", lambda rows: None)
    assert [part.tolist() for part in similar_batches(text, 30)] == [list(range(30)), list(range(30, 50))]
    for one, again in zip(grouped, figures(), strict=True):
        assert torch.allclose(one.double(), again.double(), rtol=1e-5, atol=1e-6)
