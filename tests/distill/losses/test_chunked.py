"""A mean over logits that are made in parts is the mean over whole ones, with its gradients."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from distill.losses import chunked, cross_entropy, forward_kl, jensen_shannon, kd, reverse_kl, squared_error
from distill.losses.chunked import LazyLogits, mean_in_chunks

ROWS, TOKENS, WIDTH, CLASSES = 3, 7, 5, 11
LOSSES = {
    "kl": partial(kd, temperature=1.0),
    "softened": partial(kd, temperature=3.0),
    "hot": partial(kd, temperature=60.0),
    "without τ²": partial(kd, temperature=3.0, scale_t2=False),
    "÷ classes": partial(kd, temperature=2.0, reduction="mean"),
    "reverse": partial(kd, temperature=2.0, divergence=reverse_kl),
    "Jensen–Shannon": partial(kd, temperature=1.0, divergence=jensen_shannon),
    "Jensen–Shannon .1": partial(kd, temperature=2.0, divergence=partial(jensen_shannon, beta=0.1)),
    "squared": squared_error,
    "forward": partial(kd, divergence=forward_kl),
}
MASKS = {
    "all": None,
    "ones": torch.ones(ROWS, TOKENS, dtype=torch.bool),
    "some": torch.arange(ROWS * TOKENS).reshape(ROWS, TOKENS) % 3 != 0,
    "one": torch.arange(ROWS * TOKENS).reshape(ROWS, TOKENS) == 8,
}
SIZES = {"one": (64, 64), "of 2": (1, 2), "of 5": (5, 5), "each": (1, 1)}
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2e-2}
"""Of single precision: its rounding, of differences of probabilities that nearly cancel."""
CASES = [
    *((dtype, mask) for dtype in (torch.float64, torch.float32) for mask in MASKS),
    (torch.bfloat16, "some"),
]


@pytest.fixture(params=SIZES)
def size(request, monkeypatch):
    least, most = SIZES[request.param]
    monkeypatch.setattr(chunked, "LEAST", least)
    monkeypatch.setattr(chunked, "MOST", most)


def states(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    drawn = torch.randn(ROWS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(dtype)


def head(seed: int, dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(WIDTH, CLASSES).to(dtype)


def lazy(values: Tensor, module: nn.Module) -> LazyLogits:
    def make(rows, weights):
        return torch.func.functional_call(module, dict(weights), (rows[0],))

    trained = {name: each for name, each in module.named_parameters() if each.requires_grad}
    return LazyLogits((values,), make, trained, CLASSES)


def compare(loss, other, mask: Tensor | None, dtype: torch.dtype, *, whole, other_whole: Tensor) -> None:
    hidden, module = states(0, dtype).requires_grad_(), head(0, dtype)
    by = [hidden, *module.parameters()]
    expected = whole(module(hidden), other_whole)
    found = mean_in_chunks(loss, lazy(hidden, module), other, mask=mask)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    wanted, got = (torch.autograd.grad(3 * each, by) for each in (expected, found))
    for one, another in zip(got, wanted, strict=True):
        near = TOLERANCE[dtype] * float(another.abs().max())
        assert one.dtype == another.dtype
        torch.testing.assert_close(one, another, rtol=0, atol=near)
        assert bool(another.any())
    with torch.no_grad():
        assert torch.equal(mean_in_chunks(loss, lazy(hidden, module), other, mask=mask), found)


@pytest.mark.parametrize(("dtype", "mask"), CASES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_mean_is_that_over_whole_logits_and_so_are_its_gradients(loss, mask, dtype, size):
    kept, teacher, module = MASKS[mask], states(1, dtype), head(1, dtype).requires_grad_(False)
    for other in (lazy(teacher, module), module(teacher)):
        plain = partial(LOSSES[loss], mask=kept)
        compare(LOSSES[loss], other, kept, dtype, whole=plain, other_whole=module(teacher))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_that_of_whole_logits(smoothing, dtype, size):
    labels = torch.randint(CLASSES, (ROWS, TOKENS), generator=torch.Generator().manual_seed(3))
    labels[0, :5] = labels[2] = -100
    loss = partial(cross_entropy, smoothing=smoothing)
    compare(loss, labels, labels != -100, dtype, whole=loss, other_whole=labels)


def test_gradients_are_those_of_the_mean_by_its_differences(size):
    hidden, module, teacher = states(0).requires_grad_(), head(0), states(1) @ torch.ones(WIDTH, CLASSES).double()
    names = list(dict(module.named_parameters()))

    def mean(values: Tensor, *weights: Tensor) -> Tensor:
        def make(rows, given):
            used = given or dict(zip(names, weights, strict=True))
            return torch.func.functional_call(module, used, (rows[0],))

        logits = LazyLogits((values,), make, dict(zip(names, weights, strict=True)), CLASSES)
        return mean_in_chunks(partial(kd, temperature=2.0), logits, teacher, mask=MASKS["some"])

    torch.autograd.gradcheck(mean, (hidden, *module.parameters()))


def test_logits_are_made_of_the_positions_that_count_alone_and_of_few_at_a_time(size):
    made, hidden, module = [], states(0).requires_grad_(), head(0)

    def make(rows, weights):
        made.append(len(rows[0]))
        return torch.func.functional_call(module, dict(weights), (rows[0],))

    logits = LazyLogits((hidden,), make, dict(module.named_parameters()), CLASSES)
    mean_in_chunks(kd, logits, torch.zeros(ROWS, TOKENS, CLASSES).double(), mask=MASKS["some"]).backward()
    assert sum(made) == int(MASKS["some"].sum())
    assert max(made) <= chunked.MOST


def test_what_is_frozen_gets_no_gradient_and_what_is_not_gets_one():
    hidden, module = states(0).requires_grad_(), head(0)
    module.weight.requires_grad_(False)
    mean_in_chunks(kd, lazy(hidden, module), torch.zeros(ROWS, TOKENS, CLASSES).double()).backward()
    assert module.weight.grad is None
    assert module.bias.grad.any()
    assert hidden.grad.any()
    cut, module = states(0), head(0)
    mean_in_chunks(kd, lazy(cut, module), torch.zeros(ROWS, TOKENS, CLASSES).double()).backward()
    assert module.weight.grad.any()


def test_the_hooks_of_a_weight_see_its_gradient_once_and_whole(size):
    seen, hidden, module = [], states(0).requires_grad_(), head(0)
    module.weight.register_hook(seen.append)
    mean_in_chunks(kd, lazy(hidden, module), torch.zeros(ROWS, TOKENS, CLASSES).double()).backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], module.weight.grad)


def test_zero_has_a_graph_to_states_and_weights():
    hidden, module = states(0).requires_grad_(), head(0)
    lazy(hidden, module).zero().backward()
    assert all(each.grad is not None and not each.grad.any() for each in (hidden, *module.parameters()))


def test_positions_are_selected_before_logits_are_made():
    hidden, module = states(0), head(0)
    logits = lazy(hidden, module).mapped(lambda rows: rows[:, 1:])
    assert logits.shape == (ROWS, TOKENS - 1, CLASSES)
    assert logits.ndim == 3
