"""Decoupled KD against its identity with KD, hand-computed values and a loop (methods.md, section 1.2)."""

import math

import pytest
import torch

from distill.errors import DistillError
from distill.losses import dkd, kd, nckd, tckd
from tests.distill.losses.pairs import gradient, pair

LABELS = torch.tensor([3, 0, 5, 1])


@pytest.mark.parametrize("temperature", [1, 4.0])
@pytest.mark.parametrize("scale", [1, 100])
def test_parts_make_up_kd(temperature, scale):
    """mean_i [TCKD_i + (1 − p_t,y) NCKD_i] = KD."""
    student, teacher = pair(4, 6, scale=scale)
    sure = (teacher / temperature).softmax(-1)[range(4), LABELS]
    target, others = (part(student, teacher, LABELS, temperature, "none") for part in (tckd, nckd))
    torch.testing.assert_close((target + (1 - sure) * others).mean(), kd(student, teacher, temperature))
    assert (kd(student, teacher, temperature) - (target + others).mean()).abs() > 1e-3


def test_values_by_hand():
    """Teacher (½, ⅜, ⅛), label 0: one half against another, and ¾ against ¼ of the rest."""
    student, teacher = torch.zeros(1, 3), torch.tensor([[4.0, 3.0, 1.0]]).log()
    label = torch.tensor([0])
    target = 0.5 * math.log(0.5 * 3) + 0.5 * math.log(0.5 * 1.5)
    assert tckd(student, teacher, label).item() == pytest.approx(target, abs=1e-7)
    assert nckd(student, teacher, label).item() == pytest.approx(0.130812, abs=1e-6)
    assert dkd(student, teacher, label, 2.0, 3.0, 1.0).item() == pytest.approx(2 * target + 3 * 0.130812, abs=1e-5)


def test_defaults_are_those_of_the_paper():
    student, teacher = pair(4, 6)
    expected = tckd(student, teacher, LABELS, 4.0) + 8 * nckd(student, teacher, LABELS, 4.0)
    torch.testing.assert_close(dkd(student, teacher, LABELS), expected)


@pytest.mark.parametrize("part", [tckd, nckd])
def test_infinite_temperature_keeps_the_size(part):
    """Times temperature², both tend to a limit; without, to 0."""
    student, teacher = pair(4, 6)
    high, higher = (part(student, teacher, LABELS, temperature).item() for temperature in (1e3, 1e4))
    assert high == pytest.approx(higher, rel=0.01)
    assert high > 1e-2


def test_two_classes():
    student, teacher = pair(4, 2)
    labels = torch.tensor([0, 1, 1, 0])
    others = nckd(student, teacher, labels, 4.0)
    assert others == 0
    assert (gradient(others, student) == 0).all()
    torch.testing.assert_close(tckd(student, teacher, labels, 4.0), kd(student, teacher, 4.0))


@pytest.mark.parametrize("loss", [tckd, nckd, dkd])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize(("learnt", "taught"), [(400, 400), (400, -400), (-400, 400)])
def test_sure_answers_stay_finite(loss, dtype, classes, learnt, taught):
    """Logits of ±400, on the label and on another class, in both models."""
    signs = torch.eye(classes) * 2 - 1
    student, teacher = (size * signs.roll(by, 0).to(dtype) for size, by in ((learnt, 0), (taught, 1)))
    labels = torch.arange(classes)
    student.requires_grad_()
    value = loss(student, teacher, labels)
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert gradient(value, student).isfinite().all()


def test_sure_answers_have_their_value():
    """p_y is e^−800 in the student and 1 in the teacher."""
    student, teacher = torch.tensor([[-400.0, 400.0]], requires_grad=True), torch.tensor([[400.0, -400.0]])
    value = tckd(student, teacher, torch.tensor([0]))
    assert value.item() == 800
    assert gradient(value, student).tolist() == [[-1, 1]]


@pytest.mark.parametrize("loss", [tckd, nckd, dkd])
def test_tokens_without_label_are_left_out(loss):
    student, teacher = pair(2, 3, 5)
    labels = torch.tensor([[4, -100, 0], [-100, -100, 2]])
    counts = labels != -100
    filled = torch.where(counts[..., None], student, math.nan)
    value = loss(filled, teacher, labels)
    torch.testing.assert_close(value, loss(student[counts], teacher[counts], labels[counts]))
    assert (gradient(value, student)[~counts] == 0).all()
    if loss is not dkd:
        each = loss(student, teacher, labels, 2.0, "none")
        assert torch.equal(each != 0, counts)
        torch.testing.assert_close(each.sum() / 3, loss(student, teacher, labels, 2.0))


@pytest.mark.parametrize("loss", [tckd, nckd, dkd])
def test_classes_that_neither_model_can_predict_add_nothing(loss):
    student, teacher = pair(4, 6)
    barred = torch.tensor([0.0, 0.0, 0.0, 0.0, -math.inf, -math.inf])
    labels = torch.tensor([0, 1, 2, 3])
    value = loss(student + barred, teacher + barred, labels)
    torch.testing.assert_close(value, loss(student[:, :4], teacher[:, :4], labels))
    assert gradient(value, student).isfinite().all()


@pytest.mark.parametrize("loss", [tckd, nckd, dkd])
class TestRefuses:
    def test_labels(self, loss):
        with pytest.raises(DistillError, match=rf"^{loss.__name__} met label 6, but the logits have 6 classes"):
            loss(torch.zeros(2, 6), torch.zeros(2, 6), torch.tensor([0, 6]))
        with pytest.raises(DistillError, match=r"one label a position: logits \(2, 6\), labels \(3,\)"):
            loss(torch.zeros(2, 6), torch.zeros(2, 6), torch.tensor([0, 1, 2]))
        with pytest.raises(DistillError, match=r"they are torch.float32; give labels.long\(\)"):
            loss(torch.zeros(2, 6), torch.zeros(2, 6), torch.zeros(2))
        with pytest.raises(DistillError, match=r"No position is left"):
            loss(torch.zeros(2, 6), torch.zeros(2, 6), torch.tensor([-100, -100]))

    def test_one_class(self, loss):
        with pytest.raises(DistillError, match=r"with the other classes, and there are none: .* \(2, 1\)"):
            loss(torch.zeros(2, 1), torch.zeros(2, 1), torch.tensor([0, 0]))

    @pytest.mark.parametrize("temperature", [0, -1.0, math.nan])
    def test_temperature(self, loss, temperature):
        with pytest.raises(
            DistillError, match=rf"^{loss.__name__}.* temperature (above 0: temperature=|must be a number)"
        ):
            loss(*pair(4, 6), LABELS, temperature=temperature)

    def test_reduction(self, loss):
        if loss is not dkd:
            with pytest.raises(DistillError, match=r"no reduction='sum'; use reduction='mean' or 'none'"):
                loss(*pair(4, 6), LABELS, reduction="sum")
