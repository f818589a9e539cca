import pytest
import torch

from distill.statistics.shifts import LARGEST, correlation, log_odds, moments
from distill.statistics.tally import Tally


def logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def summed(teacher, student, entries=1, weights=None):
    """The tally of answers `[pairs, entries, classes]`, one a pair and entry."""
    found = moments(teacher, student)
    weights = torch.ones(teacher[0].shape[:2], dtype=torch.float64) if weights is None else weights
    return Tally({"total": weights, **{name: each * weights for name, each in found.items()}})


@pytest.mark.parametrize("shape", [(7, 3), (4, 5, 6), (3, 2)])
def test_log_odds_are_those_of_the_probability(shape):
    z = logits(*shape)
    classes = torch.randint(shape[-1], shape[:-1], generator=torch.Generator().manual_seed(1))
    chosen = z.softmax(-1).gather(-1, classes[..., None])[..., 0]
    assert torch.allclose(log_odds(z, classes), torch.logit(chosen))


def test_classes_that_are_excluded_and_real_values():
    z = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0], [1.0, 0.5]])
    assert log_odds(z, torch.tensor([0, 0, 0])).tolist() == [LARGEST, -LARGEST, 0.5]
    assert log_odds(torch.tensor([[2.0], [-3.0]]), torch.tensor([0, 0])).tolist() == [2, -3]
    assert log_odds(torch.full((1, 3), -torch.inf), torch.tensor([1])).isfinite().all()


@pytest.mark.parametrize("entries", [1, 3])
def test_the_correlation_is_that_of_all_answers_that_count(entries):
    teacher, student = [(logits(20, entries, 3, seed=i), logits(20, entries, 3, seed=i + 1)) for i in (0, 5)]
    counted = (logits(20, entries, seed=9) > -0.5).double()
    value, influence = correlation(summed(teacher, student, weights=counted))
    classes = teacher[1].argmax(-1)
    shifts = [(log_odds(a, classes) - log_odds(b, classes))[counted > 0] for a, b in (teacher, student)]
    assert value == pytest.approx(float(torch.corrcoef(torch.stack(shifts))[0, 1]))
    assert float(influence.sum()) == pytest.approx(0, abs=1e-12)


def test_the_influence_is_the_derivative():
    """Weighing pair i by 1 + h moves the correlation by h times its influence."""
    teacher, student = [(logits(12, 1, 3, seed=i), logits(12, 1, 3, seed=i + 1)) for i in (0, 5)]
    value, influence = correlation(summed(teacher, student))
    for i in range(12):
        weights = torch.ones(12, 1, dtype=torch.float64)
        weights[i] += 1e-6
        moved, _ = correlation(summed(teacher, student, weights=weights))
        assert (moved - value) / 1e-6 == pytest.approx(float(influence[i]), abs=1e-5)


@pytest.mark.parametrize(("factor", "wanted"), [(1.0, 1.0), (0.25, 1.0), (-2.0, -1.0)])
def test_a_student_that_moves_in_proportion(factor, wanted):
    after, base = logits(15, 1, 1), logits(15, 1, 1, seed=1)
    value, influence = correlation(summed((after, base), (factor * after, factor * base)))
    assert value == pytest.approx(wanted)
    assert influence.abs().max() < 1e-9


def test_where_one_of_the_two_never_moves_there_is_none():
    after, base = logits(15, 1, 3), logits(15, 1, 3, seed=1)
    assert correlation(summed((after, base), (base, base))) is None
    assert correlation(summed((base, base), (after, base))) is None
    assert correlation(Tally({"total": torch.ones(3, 1)})) is None


def test_each_shift_has_the_sign_and_the_name_of_its_network():
    """The teacher's class is 0, whose log-odds are z_0 − z_1: +2 in the teacher, −3 in the student."""
    teacher = (torch.tensor([[4.0, 1.0]]), torch.tensor([[2.0, 1.0]]))
    student = (torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]]))
    found = {name: each.item() for name, each in moments(teacher, student).items()}
    wanted = {"shift": -3, "teacher_shift": 2, "shift_squared": 9, "teacher_shift_squared": 4, "shift_product": -6}
    assert found == pytest.approx(wanted)
