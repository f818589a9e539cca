import math
from contextlib import contextmanager

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from distill import AT, DIITO, KD, PKD, DistillError, Labels, Rows, Schedule, Sobolev, fit, steps
from distill.losses import sobolev_terms
from distill.objectives import Moment
from distill.objectives.derivatives import _draw_tokens
from distill.training.computation import Computation
from interventions import Location
from tests.distill.tiny_models import (
    CLASSES,
    CNN,
    LSTM,
    QUIET,
    bert,
    gpt2,
    images,
    masked_lm,
    mlp,
    same,
    spread,
    text,
    vectors,
    vit,
)
from tests.distill.tiny_models import weights as weights_of

SHORT = Schedule(steps=2, batch_size=5, lr=1e-2)
KINDS = {
    "mlp": (mlp, vectors),
    "cnn": (CNN, images),
    "vit": (lambda: vit(2), images),
    "bert": (lambda: bert(2), text),
    "gpt2": (lambda: gpt2(2), text),
}


def terms(teacher, student, objective, batch):
    return Computation(teacher, student, (), [objective])(batch, torch.Generator().manual_seed(0), Moment())


def linear(seed=0):
    return spread(nn.Sequential(nn.Linear(6, CLASSES)), seed)


def test_linear_models_by_hand():
    """Exact: ‖A − C‖²_F; with one direction a mean of a third of it over many rows."""
    teacher, student = linear(), linear(1)
    exact = (student[0].weight - teacher[0].weight).square().sum().item()
    found = terms(teacher, student, Sobolev(2, None), vectors(4).batch(range(4)))
    assert found["sobolev_1"].item() == pytest.approx(exact, rel=1e-5)
    assert found["sobolev_2"].item() == 0
    difference = student(vectors(4).batch(range(4))["inputs"]) - teacher(vectors(4).batch(range(4))["inputs"])
    assert found["sobolev_value"].item() == pytest.approx(difference.square().sum(1).mean().item(), rel=1e-5)
    many = vectors(20000).batch(range(20000))
    drawn = terms(teacher, student, Sobolev(), many)["sobolev_1"].item()
    assert drawn == pytest.approx(exact / CLASSES, rel=0.03)
    assert set(terms(teacher, student, Sobolev(), many)) == {"sobolev_value", "sobolev_1"}


@pytest.mark.parametrize("order", [1, 2])
def test_the_gradient_is_that_of_finite_differences(order):
    teacher, student = spread(mlp()).double(), spread(mlp(), 1).double()
    rows = Rows({"inputs": vectors().table["inputs"].double()})
    batch, name = rows.batch(range(5)), f"sobolev_{order}"
    terms(teacher, student, Sobolev(order, None), batch)[name].backward()
    weight, step = student[0].weight, 1e-6
    for place in [(0, 0), (3, 2), (7, 5)]:
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[place] += sign * step
            values.append(terms(teacher, student, Sobolev(order, None), batch)[name].item())
            with torch.no_grad():
                weight[place] -= sign * step
        assert weight.grad[place].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4)


def test_tokens_are_compared_at_the_embedding_of_the_teacher():
    """By hand: everything after the embedding, as a function of it, with attention of a second derivative."""
    teacher, student = (each.double() for each in (spread(bert(2)), spread(bert(1), 1)))
    batch = text(4).batch(range(4))
    mask = torch.zeros(4, 1, 1, batch["input_ids"].shape[1], dtype=torch.float64)
    mask = mask.masked_fill(batch["attention_mask"][:, None, None] == 0, torch.finfo(torch.float64).min)

    def above(model):
        def answers(states):
            for layer in model.bert.encoder.layer:
                states = layer(states, mask)
            return model.classifier(model.bert.pooler(states))

        return answers

    points = teacher.bert.embeddings(batch["input_ids"]).detach()
    expected = sobolev_terms(above(student), above(teacher), points, 2, None)
    found = terms(teacher, student, Sobolev(2, None), batch)
    for name, term in expected.items():
        assert found[name].item() == pytest.approx(term.item(), rel=1e-8)
    sum(found.values()).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert student.bert.encoder.layer[0].attention.self.query.weight.grad.abs().sum() > 0
    assert student.bert.embeddings.word_embeddings.weight.grad is None


@pytest.mark.parametrize("make", [lambda: bert(2), lambda: gpt2(2)])
@pytest.mark.parametrize("objective", [lambda: Sobolev(1, 3), lambda: Sobolev(2, None)])
def test_padding_changes_nothing(make, objective):
    teacher, student = spread(make()), spread(make(), 1)
    batch = text(4).batch(range(4))
    longer = {
        name: torch.cat([column, torch.full((4, 3), pad)], 1) if column.ndim == 2 else column
        for (name, column), pad in zip(batch.items(), (0, 0, 1, -100), strict=True)
    }
    found, padded = (terms(teacher, student, objective(), each) for each in (batch, longer))
    for name, term in found.items():
        assert padded[name].item() == pytest.approx(term.item(), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", [lambda: Sobolev(), lambda: Sobolev(2, 2), lambda: Sobolev(1, None)])
def test_on_many_models(kind, objective):
    make, data = KINDS[kind]
    teacher, student = spread(make()), spread(make(), 1)
    before = weights_of(teacher)
    records = list(steps(teacher, student, None, data(), objective=objective(), schedule=SHORT))
    assert all(value > 0 for value in records[0].terms.values())
    assert not same(weights_of(student), weights_of(spread(make(), 1)))
    assert same(weights_of(teacher), before)
    assert all(p.grad is None for p in teacher.parameters())


def test_a_model_compared_with_itself():
    for make, data in KINDS.values():
        model = spread(make())
        found = terms(model, model, Sobolev(2, 2), data().batch(range(3)))
        assert all(term.item() == pytest.approx(0, abs=1e-9) for term in found.values())


def test_training_lowers_value_and_derivative():
    teacher, student = spread(mlp()), spread(mlp(), 1)
    schedule = Schedule(steps=100, batch_size=8, lr=2e-2)
    records = list(steps(teacher, student, None, vectors(), objective=Sobolev(), schedule=schedule))
    for name in ("sobolev_value", "sobolev_1"):
        first, last = (sum(r.terms[name] for r in part) for part in (records[:10], records[-10:]))
        assert last < 0.3 * first


def test_at_another_place_also_of_a_recurrent_model():
    teacher, student = spread(LSTM()), spread(LSTM(), 1)
    with pytest.raises(Exception, match="needs blocks and this LSTM has none"):
        list(steps(teacher, student, None, text(24, 5, 5), objective=Sobolev(), schedule=SHORT))
    objective = Sobolev(2, at=Location(module="embed"))
    records = list(steps(teacher, student, None, text(24, 5, 5), objective=objective, schedule=SHORT))
    assert all(value > 0 for value in records[0].terms.values())
    both = Sobolev(1, None, at=(Location(module="conv1"), Location(module="bn1")))
    assert terms(spread(CNN()), spread(CNN(), 1), both, images(3).batch(range(3)))["sobolev_1"] > 0


def test_dropout_is_the_same_for_value_and_derivative():
    """One forward a step, besides that of other objectives: the derivative of a student ‖D ∘ A x‖ shows its mask."""
    calls = []

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.drop = nn.Linear(6, CLASSES), nn.Dropout(0.5)

        def forward(self, inputs):
            calls.append(torch.is_grad_enabled())
            return self.drop(self.fc(inputs))

    student, teacher = Counted().train(), linear()
    terms(teacher, student, Sobolev(1, None), vectors(4).batch(range(4)))
    assert calls == [True]


def test_parts_of_a_step_are_exact():
    found = []
    for parts in (1, 3):
        student = spread(mlp(), 1)
        schedule = Schedule(steps=2, batch_size=7, lr=1e-2, accumulate=parts)
        records = list(steps(spread(mlp()), student, None, vectors(), objective=Sobolev(1, None), schedule=schedule))
        found.append((records[-1].terms, student[0].weight))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6)


def test_same_draws_for_a_seed_and_none_of_others():
    def first(seed, objective=None):
        schedule = Schedule(steps=1, batch_size=24, seed=seed)
        return next(steps(spread(mlp()), spread(mlp(), 1), None, vectors(), objective=objective or Sobolev(),
                          schedule=schedule)).terms  # fmt: skip

    assert first(0) == first(0)
    assert first(0)["sobolev_1"] != first(1)["sobolev_1"]
    assert first(0, [KD(), Sobolev()])["sobolev_1"] == first(0)["sobolev_1"]


def naive(teacher, student, objective, batch):
    """The terms from runs of their own: a step has no runs that are shared before gradients are enabled."""
    computation = Computation(teacher, student, (), [KD(), objective])
    with torch.no_grad():
        step = computation.step(batch, torch.Generator().manual_seed(0))
    assert step.derivable is None
    return {**KD()(step), **objective(step)}


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", [*KINDS, "masked_lm"])
@pytest.mark.parametrize("objective", [lambda: Sobolev(), lambda: Sobolev(2, 2), lambda: Sobolev(1, None)])
def test_shared_runs_give_values_and_gradients_of_separate_runs(kind, objective):
    """In double precision; the gradients are those of all terms together, KD's too."""
    make, data = {**KINDS, "masked_lm": (lambda: masked_lm(2), lambda: text(labels=False))}[kind]
    teacher, (one, other) = spread(make()).double(), (spread(make(), 1).double() for _ in range(2))
    batch = {n: c.double() if c.is_floating_point() else c for n, c in data().batch(range(4)).items()}
    found = Computation(teacher, one, (), [KD(), objective()])(batch, torch.Generator().manual_seed(0), Moment())
    expected = naive(teacher, other, objective(), batch)
    for terms_ in (found, expected):
        sum(terms_.values()).backward()
    assert found.keys() == expected.keys()
    for name, term in expected.items():
        torch.testing.assert_close(found[name], term, rtol=1e-10, atol=1e-12)
    assert gradients(one).keys() == gradients(other).keys() != set()
    for name, gradient in gradients(other).items():
        torch.testing.assert_close(gradients(one)[name], gradient, rtol=1e-10, atol=1e-10)
    assert not gradients(teacher)


@contextmanager
def counted(*modules):
    """How often each module runs."""
    counts = [0] * len(modules)

    def count(number):
        def add(module, inputs):
            counts[number] += 1

        return add

    handles = [module.register_forward_pre_hook(count(number)) for number, module in enumerate(modules)]
    yield counts
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(("kind", "runs"), [("mlp", [1, 1]), ("cnn", [1, 1]), ("vit", [1, 1]), ("bert", [1, 2])])
@pytest.mark.parametrize("beside", [[], [KD(), Labels()]])
def test_no_run_is_made_twice(kind, runs, beside):
    """Only on tokens the student runs once more, at the teacher's embedding."""
    make, data = KINDS[kind]
    teacher, student, batch = spread(make()), spread(make(), 1), data().batch(range(4))
    computation = Computation(teacher, student, (), [*beside, Sobolev(1, None)])
    with counted(teacher, student) as counts:
        computation(batch, torch.Generator().manual_seed(0), Moment())
    assert counts == ([1, 1] if not beside and kind == "bert" else runs)


@pytest.mark.parametrize("kind", ["cnn", "bert"])
def test_other_objectives_see_what_they_see_alone(kind):
    """The same answers and activations of the teacher, without a graph, also beside interchanges."""
    make, data = KINDS[kind]
    at = Location(module="conv2") if kind == "cnn" else Location(1)
    others = [KD, lambda: (AT if kind == "cnn" else PKD)({at: at})]
    batch, found = data().batch(range(4)), []
    for extra in ([], [Sobolev()]):
        teacher, student = spread(make()), spread(make(), 1)
        computation = Computation(teacher, student, (), [*(each() for each in others), *extra])
        step = computation.step(batch, torch.Generator().manual_seed(0))
        assert not step.taught.logits.requires_grad
        assert not step.taught.vectors(at).requires_grad
        with counted(teacher) as counts:
            found.append([term for each in computation.objectives[:2] for term in each(step).values()])
        assert counts == [0]
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    objective = [KD(), DIITO(positions=None), Sobolev()]
    for record in steps(spread(make()), spread(make(), 1), {at: at}, data(), objective=objective, schedule=SHORT):
        assert math.isfinite(record.loss)


def test_examples_without_a_token_that_counts_are_left_out_without_a_look():
    """Their terms are those of the other examples; if none is left they are 0, with a graph."""
    teacher, student = (spread(masked_lm(2), seed) for seed in (0, 1))
    batch = text(6).batch(range(6))
    batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    batch["labels"][2:] = -100
    step = Computation(teacher, student, (), [Sobolev(1, None)]).step(batch, torch.Generator().manual_seed(0))
    few = {name: column[:2] for name, column in batch.items()}
    less = Computation(teacher, student, (), [Sobolev(1, None)]).step(few, torch.Generator().manual_seed(0))
    token = _draw_tokens(step)
    assert torch.equal(token[:2], _draw_tokens(less))
    for name, term in Sobolev(1, None)(less).items():
        assert Sobolev(1, None)(step)[name].item() == pytest.approx(term.item(), rel=1e-5)
    batch["labels"][:] = -100
    none = terms(teacher, student, Sobolev(), batch)
    assert all(term.item() == 0 for term in none.values())
    sum(none.values()).backward()
    assert all(gradient.abs().max() == 0 for gradient in gradients(student).values())


@pytest.fixture
def half():
    """An accelerator in bfloat16, which would else be that of all later tests."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("kind", ["cnn", "bert"])
def test_under_autocast_it_is_computed_in_single_precision(kind, half):
    make, data = KINDS[kind]
    teacher, student, batch = spread(make()), spread(make(), 1), data().batch(range(4))
    expected = terms(teacher, student, Sobolev(), batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = terms(teacher, student, Sobolev(), batch)
    for name, term in expected.items():  # the base run, that is shared in single precision, has a fused attention
        assert found[name].item() == pytest.approx(term.item(), rel=1e-6 if kind == "bert" else 0)
    objective = [KD(), Sobolev(2)]
    for record in steps(teacher, student, None, data(), objective=objective, accelerator=half, schedule=SHORT):
        assert math.isfinite(record.loss)


def test_by_fit(tmp_path):
    result = fit(spread(bert(2)), spread(bert(1), 1), data=text(), objective=[KD(), Sobolev()], steps=2, batch_size=5,
                 console=QUIET, output_dir=tmp_path)  # fmt: skip
    assert result is not None


def test_what_cannot_be_derived():
    with pytest.raises(DistillError, match=r"Sobolev\(order=3, projections=1\): derivatives are of order 1 or 2"):
        Sobolev(3)
    with pytest.raises(DistillError, match=r"Sobolev\(order=1, projections=0\)"):
        Sobolev(1, 0)
    with pytest.raises(
        DistillError, match=r"teacher are \(2, \d, 16\) and those of the student \(2, \d, 8\).*distill.from_layers"
    ):
        next(steps(spread(bert(2)), spread(bert(2, width=8)), None, text(), objective=Sobolev(), schedule=SHORT))
    with pytest.raises(DistillError, match="this objective compares with a teacher and there is none"):
        next(steps(None, spread(mlp()), None, vectors(), objective=Sobolev(), schedule=SHORT))


def test_recurrent_models_run_without_cudnn():
    """Its kernels have no second derivative, and in eval mode none at all."""
    seen = []

    class Watched(LSTM):
        def forward(self, input_ids):
            seen.append(torch.backends.cudnn.enabled)
            return super().forward(input_ids)

    before = torch.backends.cudnn.enabled
    objective = Sobolev(at=Location(module="embed"))
    terms(spread(Watched()), spread(Watched(), 1), objective, text(4, 5, 5).batch(range(4)))
    assert seen[-2:] == [False, False]
    assert torch.backends.cudnn.enabled == before
