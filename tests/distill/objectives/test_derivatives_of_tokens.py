"""Sobolev training of models that answer at every token."""

import pytest
import torch
from torch.nn import functional

from distill import Sobolev
from distill.objectives.derivatives import _draw_tokens
from distill.training.computation import Computation
from tests.distill.tiny_models import gpt2_lm, masked_lm, spread, text


def computation_of(make):
    return Computation(spread(make(2)), spread(make(2), 1), (), [Sobolev()])


def step_of(batch, seed=0, make=masked_lm):
    return computation_of(make).step(batch, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("side", ["right", "left"])
def test_each_token_that_is_no_padding_is_drawn_alike(side):
    batch = text(3, 2, 5, labels=False, side=side).batch(range(3))
    computation = computation_of(masked_lm)
    steps = (computation.step(batch, torch.Generator().manual_seed(seed)) for seed in range(400))
    drawn = torch.stack([_draw_tokens(step) for step in steps])
    for row in range(3):
        counts = drawn[:, row].bincount(minlength=batch["input_ids"].shape[1])
        real = batch["attention_mask"][row].bool()
        assert (counts[~real] == 0).all()
        share = 400 / real.sum().item()
        assert ((counts[real] - share).abs() < 5 * share**0.5).all()


@pytest.mark.parametrize("make", [masked_lm, gpt2_lm])
def test_the_value_is_that_of_the_drawn_tokens_and_padding_changes_nothing(make):
    batch = text(4, labels=False).batch(range(4))
    step = step_of(batch, make=make)
    token = _draw_tokens(step)
    rows = torch.arange(4)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    embedded = step.taught.model(**inputs, output_hidden_states=True).hidden_states[0]
    table = step.network.get_input_embeddings().weight  # the student is given what the teacher's first block is
    assert not torch.equal(table[batch["input_ids"]], embedded)
    terms = Sobolev()(step)
    assert terms["sobolev_1"] > 0
    wider = {name: functional.pad(c, (0, 3), value=int(name[0] == "s")) for name, c in batch.items()}
    again = Sobolev()(step_of(wider, make=make))
    assert torch.equal(_draw_tokens(step_of(wider, make=make)), token)
    assert again["sobolev_value"].item() == pytest.approx(terms["sobolev_value"].item(), rel=1e-4)
    assert again["sobolev_1"].item() == pytest.approx(terms["sobolev_1"].item(), rel=1e-4)
    theirs = step.taught.logits[rows, token]
    assert theirs.shape == (4, 40)
