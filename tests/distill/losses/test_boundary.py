"""Samples at the decision boundary against a linear teacher (methods.md, section 1.5)."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from distill.errors import DistillError
from distill.losses import boundary, boundary_samples, most_different

W = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def line(x):
    """Class 1 where 3a + 4b > 0."""
    return x @ W.T


def network(classes=4):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Flatten(), nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, classes))
    made[-1].load_state_dict({name: 20 * value for name, value in made[-1].state_dict().items()})
    return made


def images(count=64):
    return torch.randn(count, 1, 2, 3, generator=seeded())


class TestLinear:
    def test_one_step_lands_where_it_says(self):
        """x + η (gap + ε) ŵ; the gap of (−0.3, −0.4) is 2.5 and ŵ is (0.6, 0.8)."""
        x = torch.tensor([[-0.3, -0.4]], dtype=torch.float64)
        moved = boundary_samples(line, x, torch.tensor([0]), lr=0.15, eps=0.5, steps=1, generator=seeded())
        expected = x + 0.15 * (2.5 + 0.5) * torch.tensor([[0.6, 0.8]], dtype=torch.float64)
        torch.testing.assert_close(moved.inputs, expected)
        assert moved.attacked.tolist() == [True]
        assert moved.crossed.tolist() == [False]

    def test_defaults_are_those_of_the_paper(self):
        x = torch.tensor([[-0.3, -0.4]], dtype=torch.float64)
        moved = boundary_samples(line, x, torch.tensor([0]), steps=1, generator=seeded())
        expected = x + 0.3 * (2.5 + 1e-4) * torch.tensor([[0.6, 0.8]], dtype=torch.float64)
        torch.testing.assert_close(moved.inputs, expected)
        assert moved.crossed.tolist() == [True]

    def test_each_stops_once_crossed(self):
        """Of a gap, 0.25 gap − 0.075 is left: 2.5, 0.55, 0.0625, −0.06; the other example takes longer."""
        x = torch.tensor([[-0.3, -0.4], [-30, -40]], dtype=torch.float64)
        ends = [
            boundary_samples(line, x, torch.zeros(2).long(), lr=0.15, eps=0.1, steps=steps, generator=seeded())
            for steps in (2, 3, 4, 20)
        ]
        assert [end.crossed.tolist() for end in ends] == [[False, False], [True, False], [True, False], [True, True]]
        assert torch.equal(ends[1].inputs[0], ends[3].inputs[0])
        assert not torch.equal(ends[0].inputs[0], ends[1].inputs[0])
        assert not torch.equal(ends[1].inputs[1], ends[2].inputs[1])

    def test_the_budget_ends_an_attack(self):
        x = torch.tensor([[-3.0, -4.0]], dtype=torch.float64)
        moved = boundary_samples(line, x, torch.tensor([0]), lr=0.01, steps=3, generator=seeded())
        gap = 25.0
        for _ in range(3):  # a step of length 0.01 (gap + ε) closes 5 times its length
            gap -= 5 * 0.01 * (gap + 1e-4)
        assert -(line(moved.inputs)[0, 1]).item() == pytest.approx(gap)
        assert moved.crossed.tolist() == [False]

    def test_probabilities_have_another_gap(self):
        x = torch.tensor([[-0.3, -0.4]], dtype=torch.float64)
        moved = boundary_samples(line, x, torch.tensor([0]), steps=1, probabilities=True, generator=seeded())
        p = 1 / (1 + math.exp(-2.5))
        expected = x + 0.3 * (p - (1 - p) + 1e-4) * torch.tensor([[0.6, 0.8]], dtype=torch.float64)
        torch.testing.assert_close(moved.inputs, expected)

    def test_stays_in_the_range_of_inputs(self):
        x = torch.tensor([[-0.3, -0.4]], dtype=torch.float64)
        for clamp in ((-0.35, -0.1), (torch.tensor([-1.0, -1.0]), torch.tensor([-0.1, -0.1]))):
            moved = boundary_samples(line, x, torch.tensor([0]), clamp=clamp, generator=seeded())
            assert moved.inputs.tolist() == [[pytest.approx(-0.1), pytest.approx(-0.1)]]
            assert not moved.crossed.any()


class TestNetworks:
    def attack(self, teacher, x, labels, seed=0, **settings):
        return boundary_samples(teacher, x, labels, generator=seeded(seed), **settings)

    def test_wrong_and_unlabelled_examples_are_not_touched(self):
        teacher, x = network(), images()
        labels = teacher(x).argmax(1)
        labels[::2] = (labels[::2] + 1) % 4
        labels[1] = -100
        moved = self.attack(teacher, x, labels, clamp=(-0.5, 0.5))
        assert moved.attacked.tolist() == [row % 2 == 1 and row != 1 for row in range(64)]
        same = (moved.inputs == x).flatten(1).all(1)
        assert torch.equal(same, ~moved.attacked)
        assert not moved.crossed[~moved.attacked].any()

    def test_each_has_crossed_or_used_its_budget(self):
        teacher, x = network(), images()
        labels = teacher(x).argmax(1)
        few, many = (self.attack(teacher, x, labels, steps=steps) for steps in (1, 50))
        assert few.crossed.float().mean() < many.crossed.float().mean()
        answers = teacher(many.inputs)
        assert (answers.argmax(1) != labels)[many.crossed].all()
        assert many.crossed.float().mean() > 0.9
        kept = few.crossed
        assert torch.equal(many.inputs[kept], few.inputs[kept])
        assert not (few.inputs == many.inputs).flatten(1).all(1)[~kept].any()

    def test_a_move_ends_in_a_third_class_or_at_the_drawn_one(self):
        teacher, x = network(10), images()
        labels = teacher(x).argmax(1)
        settings = dict(steps=200, lr=0.05)
        any_class, drawn = (self.attack(teacher, x, labels, stop=stop, **settings) for stop in ("label", "target"))
        assert torch.equal(any_class.crossed, teacher(any_class.inputs).argmax(1) != labels)
        earlier = (any_class.inputs - x).flatten(1).norm(dim=1) < (drawn.inputs - x).flatten(1).norm(dim=1)
        assert 0 < earlier.sum() < 64
        assert torch.equal(any_class.inputs[~earlier], drawn.inputs[~earlier])

    def test_the_teacher_is_left_as_it_was(self):
        teacher, x = network(), images().requires_grad_()
        before = x.detach().clone()
        with torch.no_grad():
            moved = self.attack(teacher, x, teacher(x).argmax(1))
        assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
        assert x.grad is None
        assert torch.equal(x, before)
        assert not moved.inputs.requires_grad
        assert moved.attacked.all()
        assert moved.crossed.any()

    def test_frozen_teachers_too(self):
        teacher, x = network().requires_grad_(False), images()
        assert self.attack(teacher, x, teacher(x).argmax(1)).crossed.any()

    def test_the_student_must_be_right_too(self):
        teacher, x = network(), images()
        labels = teacher(x).argmax(1)
        student = lambda x: functional.one_hot(torch.full((len(x),), 2), 4).float()  # noqa: E731
        moved = self.attack(teacher, x, labels, student=student)
        assert torch.equal(moved.attacked, labels == 2)
        assert 0 < moved.attacked.sum() < 64

    def test_targets_are_drawn_by_the_probabilities_of_the_other_classes(self):
        """Logits (9, ln 3, 0, −∞): of the others, the second is three times as likely as the third."""
        logits = torch.tensor([9.0, math.log(3), 0.0, -math.inf])
        towards = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        x, labels = torch.zeros(8000, 3), torch.zeros(8000).long()
        moved = self.attack(lambda x: logits + x @ towards.T, x, labels, steps=1)
        shares = (moved.inputs > 0).float().mean(0)
        assert shares.tolist() == pytest.approx([0.75, 0.25, 0], abs=0.02)

    def test_sure_teachers_have_targets(self):
        """The other classes' probabilities are 0 in single precision."""
        x = torch.tensor([[1.0, 0.0, 0.0]])
        moved = self.attack(lambda x: 400 * x, x, torch.tensor([0]), lr=1e-3)
        assert moved.inputs.isfinite().all()
        assert moved.attacked.all()
        flat = self.attack(lambda x: 400 * x, x, torch.tensor([0]), probabilities=True)
        assert flat.inputs.isfinite().all()

    def test_is_drawn_from_the_generator(self):
        teacher, x = network(), images()
        labels, default = teacher(x).argmax(1), torch.get_rng_state()
        one, same, other = (self.attack(teacher, x, labels, seed) for seed in (0, 0, 1))
        assert torch.equal(one.inputs, same.inputs)
        assert not torch.equal(one.inputs, other.inputs)
        assert torch.equal(torch.get_rng_state(), default)

    def test_half_precision(self):
        teacher, x = network().bfloat16(), images().bfloat16()
        moved = self.attack(teacher, x, teacher(x).argmax(1))
        assert moved.inputs.dtype == torch.bfloat16
        assert moved.crossed.any()
        assert torch.equal(moved.crossed, moved.crossed & (teacher(moved.inputs).argmax(1) != teacher(x).argmax(1)))
        with torch.autocast("cpu", torch.bfloat16):
            single = network()
            cast = self.attack(single, images(), single(images()).argmax(1))
        assert cast.inputs.dtype == torch.float32
        assert cast.inputs.isfinite().all()
        assert cast.crossed.any()

    def test_no_example_is_right(self):
        teacher, x = network(), images()
        moved = self.attack(teacher, x, (teacher(x).argmax(1) + 1) % 4)
        assert torch.equal(moved.inputs, x)
        assert not moved.attacked.any()


def naive(teacher, x, labels, targets, *, lr=0.3, eps=1e-4, steps=10, stop="label", clamp=None):
    """Every row takes part in every step: the teacher always runs the whole batch."""
    moved = x.detach()
    attacked = teacher(x).argmax(1) == labels

    def crossed(logits):
        scores = logits.gather(1, torch.stack([targets, labels], 1))
        return scores[:, 0] > scores[:, 1] if stop == "target" else logits.argmax(1) != labels

    for _ in range(steps):
        points = moved.clone().requires_grad_()
        logits = teacher(points)
        difference = logits.gather(1, targets[:, None])[:, 0] - logits.gather(1, labels[:, None])[:, 0]
        (uphill,) = torch.autograd.grad(difference.sum(), points)
        shape = (-1, *[1] * (x.ndim - 1))
        norms, length = uphill.flatten(1).norm(dim=1), lr * (eps - difference.detach())
        ahead = moved + length.reshape(shape) * (uphill / norms.reshape(shape))
        ahead = ahead if clamp is None else ahead.clamp(*clamp)
        moved = torch.where((attacked & ~crossed(logits.detach())).reshape(shape), ahead, moved)
    with torch.no_grad():
        return moved, attacked & crossed(teacher(moved))


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.seen = []
        self.features = nn.Sequential(nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten())
        self.answer = nn.Linear(8, 6)
        self.answer.weight.data.mul_(20)

    def forward(self, x):
        self.seen.append((len(x), torch.is_grad_enabled()))
        return self.answer(self.features(x))


class TestRowsThatHaveCrossedAreNotRun:
    """Rows are equal to those of the whole batch in double precision, where products of matrices of other heights
    round otherwise, in the last bits."""

    TEACHERS = (lambda: network(6), Convolutions, lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 6)))

    @pytest.mark.parametrize("make", TEACHERS)
    @pytest.mark.parametrize("stop", ["label", "target"])
    @pytest.mark.parametrize(
        "settings", [{}, {"lr": 0.05, "steps": 30}, {"lr": 1.5, "clamp": (-1.0, 1.0)}, {"steps": 0}]
    )
    def test_each_row_ends_where_the_whole_batch_takes_it(self, make, stop, settings, monkeypatch):
        teacher, x = make().double().eval(), images().double()
        labels = teacher(x).argmax(1)
        labels[::7] = (labels[::7] + 1) % 6
        targets = (labels + 1 + torch.arange(64) % 5) % 6
        monkeypatch.setattr(boundary, "_draw_targets", lambda *_: targets)
        found = boundary_samples(teacher, x, labels, stop=stop, generator=None, **settings)
        moved, crossed = naive(teacher, x, labels, targets, stop=stop, **settings)
        torch.testing.assert_close(found.inputs, moved, rtol=1e-12, atol=1e-12)
        assert torch.equal(found.crossed, crossed)
        whole = boundary_samples(lambda x: teacher(x), x, labels, stop=stop, generator=None, **settings)
        assert torch.equal(whole.inputs, moved)
        assert torch.equal(whole.crossed, crossed)

    def test_fewer_and_fewer_rows_are_run_and_no_graph_is_made_for_nothing(self):
        teacher, x = Convolutions().eval(), images()
        labels = teacher(x).argmax(1)
        teacher.seen.clear()
        moved = boundary_samples(teacher, x, labels, lr=0.1, steps=6, generator=seeded())
        first, *asked, last = teacher.seen
        assert first == (64, False)
        assert len(asked) == 6
        assert all(graph for _, graph in asked)
        counts = [count for count, _ in (*asked, last)]
        assert counts == sorted(counts, reverse=True)
        assert counts[0] == counts[1] == 64
        assert counts[-1] < 64
        assert last == (counts[-1], False)
        assert counts[-1] >= (~moved.crossed).sum() > 0

    def test_nothing_is_run_once_no_row_is_left(self):
        teacher, x = Convolutions().eval(), images()
        labels = teacher(x).argmax(1)
        teacher.seen.clear()
        moved = boundary_samples(teacher, x, labels, lr=1.0, steps=1000, generator=seeded())
        assert moved.crossed.all()
        assert len(teacher.seen) < 100

    def test_a_module_that_mixes_rows_is_given_all_of_them(self):
        teacher, x = Convolutions().train(), images()
        labels = teacher(x).argmax(1)
        teacher.seen.clear()
        boundary_samples(teacher, x, labels, lr=0.1, steps=6, generator=seeded())
        assert {count for count, _ in teacher.seen} == {64}

    def test_bounds_of_each_example_stay_with_it(self):
        teacher, x = Convolutions().eval(), images()
        labels = teacher(x).argmax(1)
        bounds = x - 0.5 * torch.rand(x.shape, generator=seeded()), x + 0.5 * torch.rand(x.shape, generator=seeded())
        one = boundary_samples(teacher, x, labels, clamp=bounds, generator=seeded())
        other = boundary_samples(lambda x: teacher(x), x, labels, clamp=bounds, generator=seeded())
        torch.testing.assert_close(one.inputs, other.inputs)
        assert ((one.inputs >= bounds[0]) & (one.inputs <= bounds[1])).all()


class TestMostDifferent:
    def test_by_hand(self):
        """Beside the label 0: 0, .01 + .01, .25; with it, the second would lead."""
        student = torch.tensor([[0.5, 0.3, 0.2], [0.8, 0.1, 0.1], [0.3, 0.6, 0.1]])
        teacher = torch.tensor([[0.5, 0.3, 0.2], [0.0, 0.2, 0.0], [0.3, 0.1, 0.1]])
        labels = torch.zeros(3).long()
        assert most_different(student, teacher, labels, n=2).tolist() == [2, 1]
        assert sorted(most_different(student, teacher, labels).tolist()) == [0, 1, 2]
        assert most_different(student, teacher, torch.tensor([0, 1, 1]), n=1).tolist() == [1]

    def test_refuses_other_settings(self):
        with pytest.raises(DistillError, match=r"n=0; the paper's is n=64"):
            most_different(torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0, 1]), n=0)
        with pytest.raises(DistillError, match=r"same classes on both sides: student_probs \(2, 3\), .* \(2, 4\)"):
            most_different(torch.ones(2, 3), torch.ones(2, 4), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("teacher", "inputs", "labels", "settings", "message"),
    [
        (line, torch.zeros(2, 2).long(), [0, 0], {}, r"torch.int64 cannot be moved a little; .* for text"),
        (line, torch.zeros(2, 2).double(), [0, 2], {}, r"boundary_samples met label 2, but the logits have 2 classes"),
        (line, torch.zeros(2, 2).double(), [0], {}, r"logits \(2, 2\), labels \(1,\)"),
        (line, torch.zeros(2, 2).double(), [0, 0], dict(lr=0.0), r"lr=0.0, eps=0.0001; the paper's are"),
        (line, torch.zeros(2, 2).double(), [0, 0], dict(eps=-1.0), r"lr=0.3, eps=-1.0"),
        (line, torch.zeros(2, 2).double(), [0, 0], dict(stop="k"), r"stop='k'\) does not exist; use stop='label'"),
        (lambda x: x.sum(1), torch.zeros(2, 2), [0, 0], {}, r"inputs \(2, 2\) give \(2,\)"),
        (lambda x: x, torch.zeros(2, 1), [0, 0], {}, r"inputs \(2, 1\) give \(2, 1\)"),
    ],
)
def test_refuses(teacher, inputs, labels, settings, message):
    with pytest.raises(DistillError, match=message):
        boundary_samples(teacher, inputs, torch.tensor(labels), generator=seeded(), **settings)
