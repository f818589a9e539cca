import pytest
import torch
from torch import nn

from distill.data.task import fine_tuning, seeded, share
from distill.errors import DistillError
from distill.tasks import Recipe, Rows, Task


def test_majority_is_the_accuracy_of_the_best_constant_answer():
    rows = Rows.of({"x": [0, 0, 0, 0, 0], "labels": [1, 1, 0, 2, 1]})
    assert Task("t", rows, rows, ("a", "b", "c")).majority == 0.6


def test_majority_of_token_labels_ignores_what_the_loss_ignores():
    labels = [torch.tensor([-100, 1, 1]), torch.tensor([-100, 0])]
    rows = Rows({"labels": labels})
    assert Task("t", rows, rows, ("a", "b")).majority == pytest.approx(2 / 3)


def test_an_example_names_its_class_or_says_that_it_cannot():
    rows = Rows.of({"x": [7, 8], "labels": [1, 0]})
    shown = Task("t", rows, rows, ("a", "b"), show=lambda row: f"x={row['x']}")
    assert shown.example(1) == "x=8 → a"
    with pytest.raises(DistillError, match="'t' cannot show"):
        Task("t", rows, rows, ("a", "b")).example()


def test_a_seeded_network_depends_on_its_seed_alone():
    torch.rand(3)
    before = torch.get_rng_state()
    one, same, other = (seeded(seed, lambda: nn.Linear(3, 3)).weight for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_share_is_deterministic_nested_and_never_empty():
    whole, half, tenth = (share(1000, fraction, seed=3) for fraction in (1.0, 0.5, 0.1))
    assert whole.tolist() == list(range(1000))
    assert (len(half), len(tenth)) == (500, 100)
    assert set(tenth.tolist()) < set(half.tolist())
    assert torch.equal(half, half.sort().values)
    assert torch.equal(half, share(1000, 0.5, seed=3))
    assert not torch.equal(half, share(1000, 0.5, seed=4))
    assert len(share(1000, 1e-9, seed=0)) == 1


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.01, float("nan")])
def test_a_fraction_outside_its_range_is_named(fraction):
    with pytest.raises(DistillError, match=f"fraction={fraction} "):
        share(10, fraction, seed=0)


def test_fine_tuning_is_one_pass_but_not_too_short():
    assert fine_tuning(67_349).steps == 2105
    assert fine_tuning(100) == Recipe(steps=200, batch_size=32, lr=1e-4, warmup=0.06, weight_decay=0.01)
