import math

import pytest
import torch

from distill import DistillError, Rows, accuracy
from distill.data.rows import batches
from distill.evaluation.metrics import perplexity
from distill.models.class_labels import has_classes
from distill.models.inputs import evaluating
from distill.statistics.intervals import bootstrap, wilson
from tests.distill.tiny_models import CNN, bert, gpt2_lm, images, masked_lm, mlp, same, spread, text, vectors, weights


@pytest.mark.parametrize(("right", "total"), [(0, 10), (7, 10), (10, 10), (1, 1), (905, 1000)])
def test_wilson_solves_its_equation(right, total):
    """Both ends p of the interval satisfy (share − p)² = z² p (1 − p) / n."""
    z = 1.959964
    found = wilson(right, total)
    assert found.value == right / total
    assert found.low + 1e-12 >= 0
    assert found.high <= 1 + 1e-12
    for p in (found.low, found.high):
        assert (right / total - p) ** 2 == pytest.approx(z * z * p * (1 - p) / total, abs=1e-9)


def test_wilson_by_hand():
    assert str(wilson(90, 100)) == "0.900 [0.826, 0.945]"
    assert wilson(90, 100).count == 100


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_accuracy_counts_the_rows_answered_right(batch_size):
    model, rows = spread(bert(2)), text(20)
    right = 0
    for i in range(20):
        batch = rows.batch([i])
        answer = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax()
        right += int(answer == batch["labels"][0])
    assert 0 < right < 20
    assert accuracy(model, rows, batch_size=batch_size).value == right / 20


def test_accuracy_of_token_models_counts_labelled_tokens():
    model, rows = spread(masked_lm(2)), text(8, 5, 5)
    batch = rows.batch(range(8))
    answers = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
    labels = torch.full((8, 5), -100)
    labels[:, 1] = answers[:, 1]  # right
    labels[:4, 2] = (answers[:4, 2] + 1) % 40  # wrong
    found = accuracy(model, Rows({**rows.table, "labels": labels}))
    assert (found.value, found.count) == (8 / 12, 12)


def test_accuracy_leaves_the_model_as_it_was():
    model = CNN().train()
    model.bn1.eval()
    before = weights(model)
    accuracy(model, images())
    assert same(before, weights(model))
    assert model.training
    assert not model.bn1.training
    assert all(p.grad is None for p in model.parameters())


def test_accuracy_needs_labels():
    with pytest.raises(DistillError, match="needs a column 'labels' and the data has inputs"):
        accuracy(mlp(), Rows({"inputs": torch.zeros(2, 6)}))
    nothing = Rows({"inputs": torch.zeros(2, 6), "labels": torch.tensor([-100, -100])})
    with pytest.raises(DistillError, match=r"accuracy needs a label that is not -100"):
        accuracy(mlp(), nothing)


def test_labels_are_classes_or_numbers():
    assert has_classes(vectors())
    assert not has_classes(Rows({"inputs": torch.zeros(2, 6)}))
    assert not has_classes(Rows({"inputs": torch.zeros(2, 6), "labels": torch.rand(2)}))


def slow_bootstrap(right, total, clusters, seed):
    """Whole clusters drawn with replacement, example by example."""
    groups = [[i for i, of in enumerate(clusters.tolist()) if of == c] for c in range(int(clusters.max()) + 1)]
    groups = [g for g in groups if sum(total[i] for i in g) > 0]
    draws, shares = torch.Generator().manual_seed(seed), []
    for _ in range(1000):
        examples = [i for g in torch.randint(len(groups), (len(groups),), generator=draws).tolist() for i in groups[g]]
        shares.append(sum(float(right[i]) for i in examples) / sum(float(total[i]) for i in examples))
    shares.sort()

    def at(q):  # linear between order statistics
        place = q * (len(shares) - 1)
        low = math.floor(place)
        return shares[low] + (place - low) * (shares[min(low + 1, len(shares) - 1)] - shares[low])

    return at(0.025), at(0.975)


def test_bootstrap_is_that_of_a_slow_loop():
    draws = torch.Generator().manual_seed(0)
    clusters = torch.randint(15, (40,), generator=draws)
    total = torch.randint(0, 4, (40,), generator=draws).double()
    right = (total * torch.rand(40, generator=draws)).floor()
    found = bootstrap(right, total, clusters, 3)
    assert found.value == pytest.approx(float(right.sum() / total.sum()))
    assert (found.low, found.high) == pytest.approx(slow_bootstrap(right, total, clusters, 3))
    assert found.count == int(total.sum())


def test_copies_of_an_example_are_no_new_evidence():
    right = (torch.arange(50) % 3 == 0).double()
    once = bootstrap(right, torch.ones(50), torch.arange(50), 0)
    copied = right.repeat_interleave(10)
    clustered = bootstrap(copied, torch.ones(500), torch.arange(50).repeat_interleave(10), 0)
    assert (clustered.low, clustered.high) == pytest.approx((once.low, once.high))
    ignored = bootstrap(copied, torch.ones(500), torch.arange(500), 0)
    assert ignored.high - ignored.low < 0.5 * (clustered.high - clustered.low)


def test_bootstrap_is_the_normal_interval_of_many_independent_examples():
    right = (torch.arange(1000) < 300).double()
    found = bootstrap(right, torch.ones(1000), torch.arange(1000), 0)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert (found.low, found.high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.004)


def test_batches_are_all_rows_in_order():
    assert torch.cat(list(batches(10, 4))).tolist() == list(range(10))
    assert [len(b) for b in batches(10, 4)] == [4, 4, 2]


def test_evaluating_restores_every_module_also_after_an_error():
    model = CNN().train()
    model.bn2.eval()

    def inside():
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inside()
    assert [name for name, module in model.named_modules() if not module.training] == ["bn2"]


# --- language models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_perplexity_by_a_loop(side):
    model, data = spread(gpt2_lm(2)), text(7, labels=False, side=side)
    losses = []
    for row in data:
        logits = model(input_ids=row["input_ids"][None]).logits[0].log_softmax(-1)
        losses += [-logits[t, row["input_ids"][t + 1]].item() for t in range(len(row["input_ids"]) - 1)]
    if side == "right":  # padded on the left, GPT-2 would need position_ids
        expected = torch.tensor(losses).double().mean().exp().item()
        assert perplexity(model, data, batch_size=3) == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, data, batch_size=1) == pytest.approx(torch.tensor(losses).mean().exp().item(), rel=1e-4)


def test_accuracy_of_a_causal_model_is_that_of_the_next_token():
    model, rows = spread(gpt2_lm(2)), text(7, labels=False)
    data = Rows({**rows.table, "labels": rows.table["input_ids"]})
    right = total = 0
    for row in rows:
        answers = model(input_ids=row["input_ids"][None]).logits[0].argmax(-1)
        right += int((answers[:-1] == row["input_ids"][1:]).sum())
        total += len(answers) - 1
    measured = accuracy(model, data, batch_size=3)
    assert (measured.value, measured.count) == (right / total, total)


def test_perplexity_of_what_is_no_language_model():
    with pytest.raises(DistillError, match="perplexity needs a column 'input_ids'"):
        perplexity(mlp(), vectors())
    with pytest.raises(DistillError, match="perplexity needs a model that answers at every token"):
        perplexity(bert(2), text(4, labels=False))
