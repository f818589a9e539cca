import math

import pytest
import torch

from distill import KD, DistillError, Labels, Rows
from distill.loop import Computation
from distill.losses import reverse_kl
from tests.distill.models import bert, gpt2_lm, masked_lm, mlp, spread, text, vectors


def terms(teacher, student, objective, batch):
    return Computation(teacher, student, (), [objective])(batch, torch.Generator())


class Fixed(torch.nn.Module):
    """Answers the same whatever it is asked."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits))

    def forward(self, inputs):
        return self.logits.expand(len(inputs), -1)


BATCH = {"inputs": torch.zeros(2, 1), "labels": torch.tensor([0, 1])}


def test_kd_by_hand():
    """Teacher (3/4, 1/4), student (1/2, 1/2): 0.75 ln 1.5 + 0.25 ln 0.5 at temperature 1."""
    teacher, student = Fixed(math.log(3), 0.0), Fixed(0.0, 0.0)
    value = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert terms(teacher, student, KD(1), BATCH)["kd"].item() == pytest.approx(value, rel=1e-6)
    assert terms(teacher, student, KD(1, reduction="mean"), BATCH)["kd"].item() == pytest.approx(value / 2, rel=1e-6)
    hotter = Fixed(2 * math.log(3), 0.0)
    assert terms(hotter, student, KD(2.0), BATCH)["kd"].item() == pytest.approx(4 * value, rel=1e-6)
    assert terms(hotter, student, KD(2.0, scale_t2=False), BATCH)["kd"].item() == pytest.approx(value, rel=1e-6)
    reverse = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    found = terms(teacher, student, KD(1, divergence=reverse_kl), BATCH)["kd"].item()
    assert found == pytest.approx(reverse, rel=1e-6)


def test_kd_reaches_the_student_alone():
    teacher, student = spread(mlp()), spread(mlp(), 1)
    terms(teacher, student, KD(), vectors().batch(range(4)))["kd"].backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad.norm() > 0 for p in student.parameters())


@pytest.mark.parametrize("make", [gpt2_lm, masked_lm])
def test_kd_of_token_models_leaves_padding_out(make):
    teacher, student = spread(make(2)), spread(make(2), 1)
    batch = text(6).batch(range(6))
    value = terms(teacher, student, KD(1), batch)["kd"]
    logits = [
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for model in (teacher, student)
    ]
    p, q = (each.log_softmax(-1) for each in logits)
    each = (p.exp() * (p - q)).sum(-1)
    real = batch["attention_mask"].bool()
    assert value.item() == pytest.approx(each[real].mean().item(), rel=1e-5)
    assert value.item() != pytest.approx(each.mean().item(), rel=1e-3)


def test_labels_by_hand():
    student = Fixed(math.log(3), 0.0)
    assert terms(None, student, Labels(), BATCH)["labels"].item() == pytest.approx(
        -(math.log(0.75) + math.log(0.25)) / 2
    )
    left_out = {**BATCH, "labels": torch.tensor([0, -100])}
    assert terms(None, student, Labels(), left_out)["labels"].item() == pytest.approx(-math.log(0.75))


def test_labels_of_tokens():
    model = spread(masked_lm(2))
    rows = Rows({**text(4, 5, 5).table, "labels": torch.tensor([[-100, 7, -100, -100, -100]] * 4)})
    batch = rows.batch(range(4))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = -logits[:, 1].log_softmax(-1)[:, 7].mean()
    assert terms(None, model, Labels(), batch)["labels"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_what_they_refuse():
    for wrong in (0, -1.0, float("nan")):
        with pytest.raises(DistillError, match=r"softens nothing; use a temperature above 0, e.g. KD\(2.0\)"):
            KD(wrong)
    with pytest.raises(
        DistillError, match=r"needs a column 'labels' and the data has input_ids, .*leave Labels\(\) out"
    ):
        terms(None, bert(2), Labels(), text(labels=False).batch([0]))
    with pytest.raises(DistillError, match=r"no teacher|there is none; use objective=\[Labels\(\)\]"):
        terms(None, bert(2), KD(), text().batch([0]))
