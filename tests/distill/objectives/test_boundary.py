import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from distill import BSS, KD, DistillError, Labels, Ramp, Rows, Schedule, fit, steps
from distill.losses import boundary, kd
from distill.objectives import Moment
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
    mlp,
    same,
    spread,
    text,
    vectors,
    vit,
)
from tests.distill.tiny_models import weights as weights_of

SHORT = Schedule(steps=2, batch_size=12, lr=1e-2)
KINDS = {
    "mlp": (mlp, vectors),
    "cnn": (CNN, images),
    "vit": (lambda: vit(2), images),
    "bert": (lambda: bert(2), text),
    "gpt2": (lambda: gpt2(2), text),
}


def terms(teacher, student, objective, batch, **moment):
    generator = torch.Generator().manual_seed(0)
    return Computation(teacher, student, (), [objective])(batch, generator, Moment(**moment))


def two_classes(seed=0):
    return spread(nn.Sequential(nn.Linear(6, 2)), seed)


def answered(teacher, data):
    """The data with labels that are the teacher's answers."""
    return {**data, "labels": teacher(data["inputs"]).argmax(1)}


@pytest.mark.parametrize("lr", [0.3, 1.0])
def test_one_step_of_a_linear_teacher_by_hand(lr):
    """It goes η (gap + ε) along the unit normal, and the student learns the teacher's answers there."""
    teacher, student = two_classes(), two_classes(1)
    batch = answered(teacher, vectors(8).batch(range(8)))
    labels, x = batch["labels"], batch["inputs"]
    normal = teacher[0].weight[1 - labels] - teacher[0].weight[labels]
    logits = teacher(x)
    gap = logits.gather(1, labels[:, None]) - logits.gather(1, 1 - labels[:, None])
    moved = (x + lr * (gap + 1e-4) * normal / normal.norm(dim=1, keepdim=True)).detach()
    expected = kd(student(moved), teacher(moved).detach(), 3.0, scale_t2=False)
    found = terms(teacher, student, BSS(lr=lr, steps=1, both=False), batch)["bss"]
    old = terms(teacher, student, BSS(lr=lr, steps=1, both=False, scale_t2=True), batch)["bss"]
    assert old.item() == pytest.approx(9 * found.item(), rel=1e-5)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    found.backward()
    (gradient,) = torch.autograd.grad(expected, [student[0].weight])
    assert torch.allclose(student[0].weight.grad, gradient, atol=1e-6)
    assert all(p.grad is None for p in teacher.parameters())


def seen_by(student):
    """Where the student is asked besides the base run."""
    asked = []
    student.register_forward_pre_hook(lambda module, inputs: asked.append(inputs[0].detach().clone()))
    return asked


@pytest.mark.parametrize("kind", ["cnn", "bert"])
def test_the_teacher_runs_what_has_not_crossed_and_nothing_twice(kind):
    """One run for the base, whose answers are reused; then each point of the move once, the last without a graph."""
    make, data = KINDS[kind]
    teacher, student = spread(make(), scale=1.0).eval(), spread(make(), 1)
    batch = data().batch(range(12))
    shown = {name: column for name, column in batch.items() if name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        given = teacher(**shown)
    batch["labels"] = getattr(given, "logits", given).argmax(1)
    seen = []
    (teacher.classifier if kind == "bert" else teacher.fc).register_forward_pre_hook(
        lambda module, inputs: seen.append((len(inputs[0]), torch.is_grad_enabled()))
    )
    terms(teacher, student, BSS(lr=2.0, both=False), batch)
    assert seen[:2] == [(12, False), (12, True)]
    counts = [count for count, _ in seen[1:]]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < 12
    assert len(seen) <= 12
    assert all(graph for _, graph in seen[1:11])


def test_what_is_wrong_is_left_alone():
    teacher, student = two_classes(), two_classes(1)
    batch = answered(teacher, vectors(8).batch(range(8)))
    labels = batch["labels"].clone()
    labels[:3], labels[3] = 1 - labels[:3], -100
    asked = seen_by(student)
    terms(teacher, student, BSS(lr=3.0, both=False), {**batch, "labels": labels})
    base, there = asked
    assert [bool((a != b).any()) for a, b in zip(base, there, strict=True)] == [False] * 4 + [True] * 4
    assert (teacher(there[4:]).argmax(1) != labels[4:]).all()


def test_only_what_both_get_right():
    teacher, student = two_classes(), two_classes(1)
    batch = answered(teacher, vectors(16).batch(range(16)))
    right = student(batch["inputs"]).argmax(1) == batch["labels"]
    assert 0 < right.sum() < 16
    asked = seen_by(student)
    terms(teacher, student, BSS(), batch)
    assert torch.equal((asked[0] != asked[1]).any(1), right)
    terms(teacher, student, BSS(both=False), batch)
    assert (asked[2] != asked[3]).any(1).all()


def test_those_are_taken_where_the_two_differ_most():
    teacher, student = two_classes(), two_classes(1)
    batch = answered(teacher, vectors(16).batch(range(16)))
    theirs, ours = (model(batch["inputs"]).softmax(1) for model in (teacher, student))
    differ = (theirs - ours).gather(1, 1 - batch["labels"][:, None])[:, 0].square()
    asked = seen_by(student)
    terms(teacher, student, BSS(samples=5, both=False), batch)
    moved = (asked[0] != asked[1]).any(1).nonzero()[:, 0]
    assert set(moved.tolist()) == set(differ.topk(5).indices.tolist())


def test_the_settings_of_the_move():
    teacher, student = two_classes(), two_classes(1)
    batch = answered(teacher, vectors(8).batch(range(8)))
    asked = seen_by(student)
    terms(teacher, student, BSS(lr=5.0, clamp=(-1.0, 1.0), both=False), batch)
    changed = (asked[0] != asked[1]).any(1)
    assert asked[1][changed].abs().max() <= 1
    assert asked[0].abs().max() > 1
    others = ({}, {"steps": 1}, {"probabilities": True}, {"temperature": 1.0}, {"eps": 1.0})
    values = [terms(teacher, student, BSS(both=False, **settings), batch)["bss"].item() for settings in others]
    assert len({round(value, 6) for value in values}) == 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{"both": False}, {"samples": 2, "both": False}, {}])
def test_on_many_models(kind, settings):
    make, data = KINDS[kind]
    teacher, student = spread(make()), spread(make(), 1)
    before = weights_of(teacher)
    records = list(steps(teacher, student, None, data(), objective=[KD(), BSS(**settings)], schedule=SHORT))
    assert records[0].terms["bss"] >= 0
    assert not settings or records[0].terms["bss"] > 0
    assert not same(weights_of(student), weights_of(spread(make(), 1)))
    assert same(weights_of(teacher), before)
    assert all(p.grad is None for p in teacher.parameters())


def test_text_is_moved_at_the_embedding_and_a_move_of_nothing_is_kd():
    """η so small that nothing moves: the student is asked at the teacher's embedding, with its own blocks and mask."""
    teacher, student = spread(bert(2)), spread(bert(2), 1)
    student.bert.embeddings.load_state_dict(teacher.bert.embeddings.state_dict())
    batch = text(8).batch(range(8))
    with torch.no_grad():
        batch["labels"] = teacher(batch["input_ids"], batch["attention_mask"]).logits.argmax(1)
    logits = [model(batch["input_ids"], batch["attention_mask"]).logits for model in (student, teacher)]
    found = terms(teacher, student, BSS(lr=1e-12, both=False), batch)["bss"]
    assert found.item() == pytest.approx(kd(*logits, 3.0).item() / 9, rel=1e-4)
    assert terms(teacher, student, BSS(both=False), batch)["bss"].item() != pytest.approx(found.item(), rel=1e-3)
    found.backward()
    assert student.bert.encoder.layer[0].attention.self.query.weight.grad.abs().sum() > 0
    assert student.bert.embeddings.word_embeddings.weight.grad is None


def test_where_none_qualifies_the_term_is_0_with_a_graph():
    teacher, student = two_classes(), two_classes(1)
    batch = answered(teacher, vectors(8).batch(range(8)))
    for labels in (1 - batch["labels"], torch.full((8,), -100)):
        term = terms(teacher, student, BSS(), {**batch, "labels": labels})["bss"]
        assert term.item() == 0
        term.backward()
        assert student[0].weight.grad.abs().sum() == 0


def test_batch_normalisation_sees_the_whole_batch():
    """One example alone qualifies, which in train mode has no variance."""
    student = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    teacher = two_classes()
    batch = answered(teacher, vectors(8).batch(range(8)))
    batch["labels"] = torch.cat([batch["labels"][:1], 1 - batch["labels"][1:]])
    assert terms(teacher, student, BSS(both=False), batch)["bss"] > 0


def test_the_published_schedule_is_the_default():
    """max(2 (1 − 4e / (3E)), 0), and nothing is moved once that is 0."""
    for share in (0.0, 0.3, 0.75, 0.9):
        assert BSS().weights["bss"](share) == pytest.approx(max(2 * (1 - 4 * share / 3), 0))
    teacher, student = two_classes(), two_classes(1)
    batch = answered(teacher, vectors(8).batch(range(8)))
    assert terms(teacher, student, BSS(both=False), batch, epoch=0.7)["bss"] > 0
    assert terms(teacher, student, BSS(both=False), batch, epoch=0.75)["bss"] == 0
    assert terms(teacher, student, BSS(both=False, until=1.0), batch, epoch=0.75)["bss"] > 0
    schedule = Schedule(epochs=4, batch_size=8, lr=1e-3)
    data = Rows(answered(teacher, vectors(8).table))
    weights = {"kd": Ramp(4, 1)}
    records = list(steps(teacher, student, None, data, objective=[Labels(), KD(3.0), BSS(both=False)], weights=weights,
                         schedule=schedule))  # fmt: skip
    for i, record in enumerate(records):
        loss = record.terms["labels"] + (4 - 3 * i / 4) * record.terms["kd"]
        assert record.loss == pytest.approx(loss + max(2 * (1 - i / 3), 0) * record.terms["bss"], rel=1e-5)
    assert [record.terms["bss"] > 0 for record in records] == [True, True, True, False]
    (fixed, *_) = steps(
        teacher, student, None, data, objective=BSS(both=False), weights={"bss": 0.5}, schedule=schedule
    )
    assert fixed.loss == pytest.approx(0.5 * fixed.terms["bss"])


def test_same_draws_for_a_seed_and_none_of_others():
    def first(seed, objective=None):
        schedule = Schedule(steps=1, batch_size=24, seed=seed)
        return next(steps(spread(mlp()), spread(mlp(), 1), None, vectors(), objective=objective or BSS(both=False),
                          schedule=schedule)).terms["bss"]  # fmt: skip

    assert first(0) == first(0)
    assert len({first(seed) for seed in range(4)}) > 1
    assert first(0, [KD(), BSS(both=False)]) == first(0)


@pytest.fixture
def half():
    """An accelerator in bfloat16, which would else be that of all later tests."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("kind", ["mlp", "cnn", "bert"])
def test_in_half_precision(kind, half):
    """The student is trained all the same: its weights were not cast where no gradient was asked for."""
    make, data = KINDS[kind]
    student = spread(make(), 1)
    schedule = Schedule(steps=2, batch_size=12, lr=1e-2, weight_decay=0.0)
    objective = BSS(both=False)
    records = list(
        steps(spread(make()), student, None, data(), objective=objective, accelerator=half, schedule=schedule)
    )
    assert all(math.isfinite(record.loss) for record in records)
    assert records[0].terms["bss"] > 0
    assert not same(weights_of(student), weights_of(spread(make(), 1)))


def test_at_another_place():
    at = Location(module="embed")
    objective = BSS(at=at, both=False)
    records = list(steps(spread(LSTM()), spread(LSTM(), 1), None, text(24, 5, 5), objective=objective, schedule=SHORT))
    assert records[0].terms["bss"] > 0


def test_by_fit(tmp_path):
    result = fit(spread(bert(2)), spread(bert(1), 1), data=text(), objective=[KD(), BSS()], steps=2, batch_size=5,
                 console=QUIET, output_dir=tmp_path)  # fmt: skip
    assert result is not None


def test_what_cannot_be_moved():
    with pytest.raises(DistillError, match=r"BSS\(steps=0, samples=64\) moves nothing"):
        BSS(steps=0)
    with pytest.raises(DistillError, match=r"BSS\(stop='k'\) does not exist; use stop='label' or stop='target'"):
        BSS(stop="k")
    with pytest.raises(DistillError, match=r"BSS\(\) needs a column 'labels'"):
        next(steps(spread(mlp()), spread(mlp(), 1), None, Rows({"inputs": torch.zeros(4, 6)}), objective=BSS()))
    with pytest.raises(DistillError, match=r"those of the teacher are \(2, \d, 16\) and those of the student"):
        next(steps(spread(bert(2)), spread(bert(2, width=8)), None, text(), objective=BSS(), schedule=SHORT))
    single, other = nn.Sequential(nn.Linear(6, 1)), nn.Sequential(nn.Linear(6, 1))
    with pytest.raises(DistillError, match=r"the answers are \(2, 1\); use it for a classifier"):
        next(steps(spread(single), spread(other, 1), None, Rows({**vectors().table, "labels": torch.zeros(24)}),
                   objective=BSS(), schedule=SHORT))  # fmt: skip
    assert CLASSES == 3


def official(teacher, student, x, labels, targets, temperature=3.0, steps=10):
    """The published program's term for the rows that both get right, step by step (bhheo/BSS_distillation, 6a318cb)."""
    chosen = (teacher(x).argmax(1) == labels) & (student(x).argmax(1) == labels)
    moved = []
    for row, label, target in zip(x[chosen], labels[chosen], targets[chosen], strict=True):
        at = row.detach()
        for _ in range(steps):
            point = at.clone().requires_grad_()
            logits = teacher(point[None])[0]
            if logits.argmax() != label:
                break
            (gradient,) = torch.autograd.grad(logits[target] - logits[label], point)
            at = at + 0.3 * ((logits[label] - logits[target]).detach() + 1e-4) * gradient / gradient.norm()
        moved.append(at)
    there = torch.stack(moved)
    taught, learnt = (model(there) / temperature for model in (teacher, student))
    return (taught.softmax(1) * (taught.log_softmax(1) - learnt.log_softmax(1))).sum(1).mean().item()


def ten_classes(seed):
    torch.manual_seed(seed)
    return spread(nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 10)), seed, scale=1.0).double()


def test_the_published_program(monkeypatch):
    """With 10 classes most moves end in a third class; each of the three settings changes the term."""
    teacher, student = ten_classes(0), ten_classes(0)
    with torch.no_grad():
        student[2].weight.add_(0.3 * torch.randn(10, 32, generator=torch.Generator().manual_seed(1)).double())
    x = 2 * torch.randn(64, 6, generator=torch.Generator().manual_seed(0)).double()
    labels = teacher(x).argmax(1)
    targets = (labels + 1 + torch.arange(64) % 9) % 10
    monkeypatch.setattr(boundary, "_draw_targets", lambda logits, mine, generator: targets[kept(mine)])
    chosen = {}

    def kept(mine):
        rows = chosen["rows"]
        assert torch.equal(labels[rows], mine)
        return rows

    original = BSS._choose
    monkeypatch.setattr(BSS, "_choose", lambda self, step: chosen.setdefault("rows", original(self, step)))

    def term(**settings):
        chosen.clear()
        return terms(teacher, student, BSS(samples=64, **settings), {"inputs": x, "labels": labels})["bss"].item()

    assert 10 < (student(x).argmax(1) == labels).sum() < 60
    assert term() == pytest.approx(official(teacher, student, x, labels, targets), rel=1e-9)
    others = [term(**each) for each in ({}, {"both": False}, {"stop": "target"}, {"scale_t2": True})]
    assert len({round(each, 9) for each in others}) == 4
