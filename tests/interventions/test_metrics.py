"""Metrics against closed forms, on whatever a model may return; and what makes no sense raises."""

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from interventions import InterventionError, run
from interventions.metrics import (
    accuracy,
    agreement,
    kl,
    log_probability,
    logit_difference,
    name_of,
    normalized,
    probability,
)
from interventions.models.answers import logits_of
from tests.interventions.tiny_models import batch, make

LOGITS = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
LEFT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
RIGHT = LEFT.flip(1)
ANSWERS, FOILS = [1, 2, 3], [4, 5, 6]
EVERY = {
    "logit difference": logit_difference(ANSWERS, FOILS),
    "probability": probability(ANSWERS),
    "log probability [nats]": log_probability(ANSWERS),
    "accuracy": accuracy(ANSWERS),
    "KL [nats]": kl(LOGITS),
    "agreement": agreement(LOGITS),
}


@pytest.mark.parametrize("name", EVERY)
def test_a_metric_is_one_number_an_example_of_an_output_a_run_or_logits(name):
    model, inputs = make("gpt2"), batch("gpt2")
    metric = EVERY[name] if "KL" not in name and name != "agreement" else None
    done = run(model, inputs)
    metric = metric or {"KL [nats]": kl, "agreement": agreement}[name](done)
    each = [metric(given) for given in (done, done.output, {"logits": done.logits}, done.logits, done.logits[:, -1])]
    assert all(torch.equal(value, each[0]) for value in each)
    assert each[0].shape == (3,)
    assert name_of(metric) == name


@pytest.mark.parametrize("name", list(EVERY)[:4])
def test_examples_are_measured_one_by_one(name):
    one_by_one = {
        "logit difference": lambda i: logit_difference(ANSWERS[i], FOILS[i]),
        "probability": lambda i: probability(ANSWERS[i]),
        "log probability [nats]": lambda i: log_probability(ANSWERS[i]),
        "accuracy": lambda i: accuracy(ANSWERS[i]),
    }[name]
    alone = torch.cat([one_by_one(i)(LOGITS[i : i + 1]) for i in range(3)])
    assert torch.equal(EVERY[name](LOGITS), alone)


def test_closed_forms():
    last = LOGITS[:, -1]
    rows = torch.arange(3)
    assert torch.equal(EVERY["logit difference"](LOGITS), last[rows, ANSWERS] - last[rows, FOILS])
    distribution = Categorical(logits=last)
    assert torch.allclose(EVERY["log probability [nats]"](LOGITS), distribution.log_prob(torch.tensor(ANSWERS)))
    assert torch.allclose(EVERY["probability"](LOGITS), distribution.log_prob(torch.tensor(ANSWERS)).exp())
    other = Categorical(logits=LOGITS[:, 0])
    assert torch.allclose(kl(LOGITS[:, 0])(last), kl_divergence(other, distribution), atol=1e-6)  # reference first
    assert not torch.allclose(kl(LOGITS[:, 0])(last), kl_divergence(distribution, other), atol=1e-3)
    assert EVERY["KL [nats]"](LOGITS).abs().max() < 1e-6
    assert EVERY["agreement"](LOGITS).tolist() == [1, 1, 1]
    assert accuracy(last.argmax(-1))(LOGITS).tolist() == [1, 1, 1]
    assert accuracy((last.argmax(-1) + 1) % 7)(LOGITS).tolist() == [0, 0, 0]


def test_several_answers_are_averaged():
    two = torch.tensor([[1, 2], [3, 4], [5, 6]])
    mean = (probability(two[:, 0])(LOGITS) + probability(two[:, 1])(LOGITS)) / 2
    assert torch.allclose(probability(two)(LOGITS), mean)
    assert torch.allclose(logit_difference(two, 0)(LOGITS), LOGITS[:, -1].gather(1, two).mean(1) - LOGITS[:, -1, 0])


@pytest.mark.parametrize(("mask", "columns"), [(LEFT, [3, 1, 2]), (RIGHT, [1, 1, 1])])
def test_positions_count_real_tokens(mask, columns):
    metric = probability(0, position=1, mask=mask)
    assert torch.equal(metric(LOGITS), LOGITS.softmax(-1)[range(3), columns, 0])
    last = probability(0, mask=mask)(LOGITS)
    assert torch.equal(last, LOGITS.softmax(-1)[range(3), [4, 4, 4] if mask is LEFT else [2, 4, 3], 0])
    with pytest.raises(InterventionError, match=r"positions=4 names padding in 2 of 3 examples"):
        probability(0, position=4, mask=mask)(LOGITS)


def test_ids_are_those_of_each_batch_that_is_measured():
    """They are checked once for a shape; another shape, or ids that were changed, are looked at anew."""
    metric, ids = probability([1, 2, 3]), torch.tensor([1, 2, 3])
    held = probability(ids)
    for _ in range(2):
        assert torch.equal(metric(LOGITS), held(LOGITS))
        with pytest.raises(InterventionError, match=r"has shape \[3\] for 2 examples"):
            metric(LOGITS[:2])
        with pytest.raises(InterventionError, match=r"not all classes of the output; give ints from 0 to 2"):
            metric(LOGITS[..., :3])
    ids[0] = 4
    assert torch.equal(held(LOGITS), probability([4, 2, 3])(LOGITS))


def test_normalised_is_0_for_the_corrupted_and_1_for_the_clean_run():
    metric = EVERY["logit difference"]
    clean, corrupted = LOGITS, LOGITS.flip(0)
    scaled = normalized(metric, clean, corrupted)
    assert scaled(clean).mean().item() == pytest.approx(1)
    assert scaled(corrupted).mean().item() == pytest.approx(0, abs=1e-6)
    assert name_of(scaled) == "normalized logit difference"
    low, high = metric(corrupted).mean(), metric(clean).mean()
    assert torch.allclose(scaled(LOGITS + 1), (metric(LOGITS + 1) - low) / (high - low))

    def of_my_own(output):
        return output[:, -1, 0] ** 2

    mine = normalized(of_my_own, clean[:2], corrupted[:2])
    assert mine(clean[:2]).mean().item() == pytest.approx(1)
    assert name_of(mine) == "normalized of my own"
    with pytest.raises(InterventionError, match=r"in the clean and .* in the corrupted run, which makes no scale"):
        normalized(metric, clean, clean)
    with pytest.raises(InterventionError, match=r"is nan in the clean"):
        normalized(lambda output: output[:, 0, 0] * math.nan, clean, corrupted)


def test_half_precision_is_measured_in_single():
    assert probability(0)(LOGITS.half()).dtype == torch.float32
    assert kl(LOGITS.double())(LOGITS.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("metric", "given", "match"),
    [
        (
            probability([1, 2]),
            LOGITS,
            r"tokens has shape \[2\] for 3 examples; give one int for all, \[3\] or",
        ),
        (probability(7), LOGITS, r"tokens=7 are not all classes of the output; give ints from 0 to 6"),
        (probability(-1), LOGITS, r"tokens=-1 are not all classes"),
        (probability(torch.rand(3)), LOGITS, r"are not all classes of the output; give ints"),
        (logit_difference([[1], [2, 3], [4]], 1), LOGITS, r"answers=.* are no ids; give an int"),
        (probability(0, mask=LEFT[:2]), LOGITS, r"mask has shape \[2, 5\] and the logits .* \[3, 5\]"),
        (probability(0), LOGITS[None], r"the logits have shape \[1, 3, 5, 7\]"),
        (kl(LOGITS[:2]), LOGITS, r"the reference has \[batch, classes\] = \[2, 7\] and the output \[3, 7\]"),
        (
            probability(0),
            {"hidden": LOGITS},
            r"is the answer is not known; say which: answers='hidden'",
        ),
    ],
)
def test_what_makes_no_sense_raises(metric, given, match):
    with pytest.raises(InterventionError, match=match):
        metric(given)


def test_names_of_functions():
    assert name_of(lambda output: output) == "metric"
    assert name_of(test_names_of_functions) == "test names of functions"
    assert logits_of(LOGITS) is LOGITS
