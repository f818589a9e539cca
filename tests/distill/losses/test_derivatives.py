"""Sobolev losses against closed forms and finite differences (methods.md, section 2)."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional

from distill.errors import DistillError
from distill.losses import sobolev, sobolev_terms

NAMES = ["sobolev_value", "sobolev_1", "sobolev_2"]


def seeded():
    return torch.Generator().manual_seed(0)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(weight):
    return lambda x: x @ weight.T


def bent(weight):
    return lambda x: torch.tanh(x @ weight.T)


class TestLinear:
    def test_exact_is_the_squared_distance_of_the_weights(self):
        a, c, x = normal(3, 4), normal(3, 4, seed=1), normal(5, 4, seed=2)
        terms = sobolev_terms(linear(a), linear(c), x)
        assert list(terms) == NAMES[:2]
        torch.testing.assert_close(terms["sobolev_value"], (x @ (a - c).T).square().sum() / 5)
        torch.testing.assert_close(terms["sobolev_1"], (a - c).square().sum())
        torch.testing.assert_close(sobolev(linear(a), linear(c), x), sum(terms.values()))

    def test_stochastic_is_that_over_the_number_of_answers(self):
        """1e5 draws: 1000 examples, 100 directions each."""
        a, c = normal(3, 4), normal(3, 4, seed=1)
        terms = sobolev_terms(linear(a), linear(c), normal(1000, 4), projections=100, generator=seeded())
        assert terms["sobolev_1"].item() == pytest.approx((a - c).square().sum().item() / 3, rel=0.01)

    def test_has_no_second_derivative(self):
        a, c = normal(3, 4).requires_grad_(), normal(3, 4, seed=1)
        terms = sobolev_terms(linear(a), linear(c), normal(5, 4), order=2)
        assert list(terms) == NAMES
        assert terms["sobolev_2"] == 0


class TestBent:
    def test_equals_jacobians_and_hessians_of_each_example(self):
        a, c, x = normal(2, 3), normal(2, 3, seed=1), normal(4, 3, seed=2)
        terms = sobolev_terms(bent(a), bent(c), x, order=2)
        jacobian, hessian = 0.0, 0.0
        for row in x:
            jacobians = [torch.autograd.functional.jacobian(bent(w), row) for w in (a, c)]
            jacobian = jacobian + (jacobians[0] - jacobians[1]).square().sum() / 4
            for j in range(2):
                hessians = [torch.autograd.functional.hessian(lambda r, w=w, j=j: bent(w)(r)[j], row) for w in (a, c)]
                hessian = hessian + (hessians[0] - hessians[1]).square().sum() / 4
        torch.testing.assert_close(terms["sobolev_1"], jacobian)
        torch.testing.assert_close(terms["sobolev_2"], hessian)

    def test_random_directions_have_the_expectation_of_all(self):
        a, c, x = normal(2, 3), normal(2, 3, seed=1), normal(1, 3, seed=2)
        exact = sobolev_terms(bent(a), bent(c), x, order=2)
        drawn = sobolev_terms(bent(a), bent(c), x.expand(2000, 3), order=2, projections=10, generator=seeded())
        torch.testing.assert_close(drawn["sobolev_1"], exact["sobolev_1"] / 2, rtol=0.03, atol=0)
        torch.testing.assert_close(drawn["sobolev_2"], exact["sobolev_2"] / (2 * 3), rtol=0.05, atol=0)

    @pytest.mark.parametrize("order", [1, 2])
    @pytest.mark.parametrize("projections", [None, 2])
    def test_gradient_of_the_weights_matches_finite_differences(self, order, projections):
        c, x = normal(2, 3, seed=1), normal(4, 3, seed=2)

        def loss(a):
            return sobolev(bent(a), bent(c), x, order, projections, seeded())

        assert gradcheck(loss, (normal(2, 3).requires_grad_(),))

    @pytest.mark.parametrize("projections", [None, 3])
    def test_equal_networks_cost_nothing(self, projections):
        a = normal(2, 3).requires_grad_()
        value = sobolev(bent(a), bent(a.detach().clone()), normal(4, 3, seed=2), 2, projections, seeded())
        assert value == 0
        assert torch.autograd.grad(value, a)[0].abs().max() == 0

    def test_one_answer_has_one_direction_up_to_sign(self):
        a, c, x = normal(1, 3), normal(1, 3, seed=1), normal(4, 3, seed=2)
        exact, drawn = (sobolev(bent(a), bent(c), x, projections=k) for k in (None, 1))
        torch.testing.assert_close(exact, drawn)

    def test_is_drawn_from_the_generator(self):
        a, c, x = normal(2, 3), normal(2, 3, seed=1), normal(4, 3, seed=2)
        default = torch.get_rng_state()
        one, same, other = (
            sobolev(bent(a), bent(c), x, 1, 1, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
        )
        assert one == same
        assert one != other
        assert torch.equal(torch.get_rng_state(), default)

    def test_images_are_inputs_too(self):
        x = normal(2, 3, 4, 4)
        student, teacher = (lambda x, k=k: (x**k).mean((2, 3)) for k in (2, 3))
        terms = sobolev_terms(student, teacher, x)
        expected = ((2 * x - 3 * x**2) / 16).square().sum() / 2
        torch.testing.assert_close(terms["sobolev_1"], expected)


class Attending(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.mixed, self.answer = nn.Linear(width, 3 * width), nn.Linear(width, 2)

    def forward(self, x):
        query, key, value = (part[:, None] for part in self.mixed(x).chunk(3, -1))
        return self.answer(functional.scaled_dot_product_attention(query, key, value)[:, 0, 0])


class TestNetworks:
    @pytest.mark.parametrize("order", [1, 2])
    def test_attention_has_a_second_derivative(self, order):
        """torch's fused kernels have none: "derivative for … is not implemented"."""
        student, teacher, x = Attending(), Attending(), torch.randn(2, 5, 8, generator=seeded())
        with torch.no_grad():
            teacher.mixed.weight.mul_(2)
        sobolev(student, teacher, x, order, 2, seeded()).backward()
        assert all(p.grad.isfinite().all() for p in student.parameters())
        assert student.mixed.weight.grad.abs().max() > 0
        assert all(p.grad is None for p in teacher.parameters())

    def test_the_caller_keeps_inputs_and_modes(self):
        student, teacher, x = Attending(), Attending(), torch.randn(2, 5, 8, generator=seeded())
        before, frozen = x.clone(), x.clone().requires_grad_()
        sobolev(student, teacher, x)
        assert not x.requires_grad
        assert torch.equal(x, before)
        sobolev(student, teacher, frozen).backward()
        assert frozen.grad is None

    def test_no_grad_outside_gives_the_same_value_without_a_graph(self):
        student, teacher, x = bent(normal(2, 3).requires_grad_()), bent(normal(2, 3, seed=1)), normal(4, 3, seed=2)
        with torch.no_grad():
            terms = sobolev_terms(student, teacher, x, order=2)
            assert not torch.is_grad_enabled()
        attached = sobolev_terms(student, teacher, x, order=2)
        for name, term in terms.items():
            assert not term.requires_grad
            assert attached[name].requires_grad
            assert torch.equal(term, attached[name].detach())

    def test_half_precision_and_autocast_come_close(self):
        student, teacher, x = Attending(), Attending(), torch.randn(64, 5, 8, generator=seeded())
        with torch.no_grad():
            teacher.mixed.weight.mul_(2)
        expected = sobolev(student, teacher, x)
        with torch.autocast("cpu", torch.bfloat16):
            cast = sobolev(student, teacher, x)
        torch.testing.assert_close(cast, expected, rtol=0.05, atol=0)
        half = sobolev(student.bfloat16(), teacher.bfloat16(), x.bfloat16())
        assert cast.dtype == half.dtype == torch.float32
        torch.testing.assert_close(half, expected, rtol=0.1, atol=0)
        half.backward()
        assert student.mixed.weight.grad.isfinite().all()


class TestRefuses:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (dict(order=3), r"order 1 or 2: order=3; for values alone use hint"),
            (dict(projections=0), r"projections=0; projections=None compares all"),
        ],
    )
    def test_settings(self, settings, message):
        with pytest.raises(DistillError, match=message):
            sobolev(linear(normal(2, 3)), linear(normal(2, 3)), normal(4, 3), **settings)

    def test_inputs(self):
        with pytest.raises(DistillError, match=r"torch.int64 has no derivative; give floating values: for text"):
            sobolev(nn.Embedding(3, 2), nn.Embedding(3, 2), torch.tensor([0, 1]))
        with pytest.raises(DistillError, match=r"No example is left .* \(0, 3\)"):
            sobolev(linear(normal(2, 3)), linear(normal(2, 3)), normal(0, 3))

    def test_answers(self):
        weight, x = normal(2, 3), normal(4, 3)
        with pytest.raises(DistillError, match=r"student \(4, 2\), teacher \(4, 3\); keep the outputs that they share"):
            sobolev(linear(weight), lambda x: x, x)
        with pytest.raises(DistillError, match=r"student gives \(4,\) for inputs \(4, 3\); .* value\[:, None\]"):
            sobolev(lambda x: x.sum(1), linear(weight), x)
        with pytest.raises(DistillError, match=r"those of teacher cannot; let teacher compute .*no_grad"):
            sobolev(linear(weight), torch.no_grad()(linear(weight)), x)
