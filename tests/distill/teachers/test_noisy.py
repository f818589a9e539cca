import itertools

import pytest
import torch
from torch import nn

from distill import DIITO, KD, Ensemble, Labels, NoisyTeacher, Schedule, from_layers, layer_mapping, steps
from distill.losses import LogitNoise
from distill.models.inputs import inputs_of, vocabulary_of
from distill.training.checkpoints import Checkpoints
from tests.distill.tiny_models import CLASSES, VOCABULARY, bert, gpt2_lm, mlp, same, spread, text, vectors, weights

SHORT = Schedule(steps=5, batch_size=5, lr=1e-2)
NOISE = LogitNoise(1.0, share=0.5)


def trained(teacher, student, *, rows=None, objective=None, **settings):
    records = list(
        steps(teacher, student, None, rows or text(), objective=objective or KD(), schedule=SHORT, **settings)
    )
    return records, weights(student)


@pytest.mark.parametrize("noise", [LogitNoise(0.0), LogitNoise(3.0, share=0.0), LogitNoise(0.0, kind="multiplicative")])
def test_no_noise_is_plain_distillation_bit_for_bit(noise):
    teacher = spread(bert(3))
    make = lambda: spread(bert(2, dropout=0.2), 1)  # noqa: E731 (dropout shows whether something was drawn)
    plain, noisy = trained(teacher, make()), trained(NoisyTeacher(teacher, noise), make())
    assert plain[0] == noisy[0]
    assert same(plain[1], noisy[1])
    assert trained(NoisyTeacher(teacher, NOISE), make())[0] != plain[0]


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_what_additive_noise_adds_to_squared_distances(share):
    """E‖z_s − z′‖² = ‖z_s − z‖² + share · C σ²."""
    teacher = NoisyTeacher(nn.Linear(6, 4), LogitNoise(0.5, share=share), torch.Generator().manual_seed(0))
    x, z_s = vectors().batch(range(8))["inputs"].repeat(4000, 1), torch.randn(4)
    with torch.no_grad():
        clean, noisy = teacher.module(x), teacher(x).logits
    added = (z_s - noisy).square().sum(-1).mean() - (z_s - clean).square().sum(-1).mean()
    assert added.item() == pytest.approx(share * 4 * 0.25, rel=0.05)


def test_the_spread_of_multiplicative_noise_is_as_large_as_the_logits():
    teacher = NoisyTeacher(nn.Identity(), LogitNoise(0.5, kind="multiplicative"), torch.Generator().manual_seed(0))
    z = torch.tensor([[1.0, -2.0, 0.0]]).repeat(20000, 1)
    variance = (teacher(z).logits - z).var(0)
    assert torch.allclose(variance, torch.tensor([0.25, 1.0, 0.0]), rtol=0.05)


def test_noise_is_drawn_anew_by_seed_and_step():
    teacher = NoisyTeacher(spread(mlp()), NOISE)
    x = vectors().batch(range(6))["inputs"]
    assert not torch.equal(teacher(x).logits, teacher(x).logits)
    once, again = (trained(teacher, spread(mlp(), 1), rows=vectors()) for _ in range(2))
    assert once[0] == again[0]
    assert same(once[1], again[1])
    other = Schedule(steps=5, batch_size=5, lr=1e-2, seed=1)
    assert list(steps(teacher, spread(mlp(), 1), None, vectors(), objective=KD(), schedule=other)) != once[0]


@pytest.mark.parametrize("at", [1, 3, 4])
def test_resumed_as_if_uninterrupted(at, tmp_path):
    teacher, make = NoisyTeacher(spread(bert(3)), NOISE), lambda: spread(bert(2, dropout=0.2), 1)
    expected, final = trained(teacher, make())
    running = steps(
        teacher, make(), None, text(), objective=KD(), schedule=SHORT, checkpoints=Checkpoints(tmp_path, every=1)
    )
    records = list(itertools.islice(running, at))
    running.close()
    torch.rand(7)
    rest, again = trained(teacher, make(), checkpoints=Checkpoints(tmp_path, resume=True))
    assert records + rest == expected
    assert same(final, again)


def test_a_generator_of_ones_own_leaves_the_others_alone():
    teacher = spread(mlp())
    seeded = lambda: NoisyTeacher(teacher, NOISE, torch.Generator().manual_seed(3))  # noqa: E731
    x, before = vectors().batch(range(6))["inputs"], torch.random.get_rng_state()
    assert torch.equal(seeded()(x).logits, seeded()(x).logits)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("make", [bert, gpt2_lm])
def test_it_is_looked_through(make):
    inner = spread(make(3))
    teacher, rows = NoisyTeacher(inner, NOISE), text(labels=False)
    student = from_layers(inner, 2)
    assert set(inputs_of(teacher, rows.batch([0]))) >= {"input_ids", "attention_mask"}
    assert vocabulary_of(teacher) == VOCABULARY
    assert layer_mapping(teacher, student, "full") == layer_mapping(inner, student, "full")
    record = next(steps(teacher, student, None, rows, objective=[KD(), DIITO()], schedule=SHORT))
    assert record.terms["kd_cf"] > 0
    both = NoisyTeacher(Ensemble([inner, inner]), LogitNoise(0.0))
    assert set(inputs_of(both, rows.batch([0]))) >= {"input_ids", "attention_mask"}
    assert vocabulary_of(NoisyTeacher(mlp(), NOISE)) is None


def test_the_control_is_a_noisy_student():
    inner = spread(mlp(), 1)
    records, _ = trained(
        spread(mlp()), NoisyTeacher(inner, LogitNoise(0.3)), rows=vectors(), objective=[KD(), Labels()]
    )
    assert not same(weights(inner), weights(spread(mlp(), 1)))
    plain, _ = trained(spread(mlp()), spread(mlp(), 1), rows=vectors(), objective=[KD(), Labels()])
    assert records[0].loss != plain[0].loss
    assert inner(torch.zeros(2, 6)).shape == (2, CLASSES)
