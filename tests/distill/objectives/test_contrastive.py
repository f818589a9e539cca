import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import distributed
from torch.nn.functional import normalize

from distill import CRD, DIITO, ICD, KD, DistillError, Rows, Schedule, fit, steps
from distill.losses import contrast, invariance
from distill.models.inputs import inputs_of
from distill.objectives import Moment
from distill.objectives.contrastive import pool
from distill.objectives.memories import Classes, Memory
from distill.processes import gather
from distill.training.checkpoints import Checkpoints
from distill.training.computation import Computation
from interventions import Location, run
from tests.distill.tiny_models import CNN, QUIET, bert, gpt2, images, mlp, same, spread, text, vectors, vit, weights
from tests.process_group import run_together

SHORT = Schedule(steps=6, batch_size=5, lr=1e-2)
ROWS = torch.tensor([3, 0, 7, 11])


def couple(make=mlp):
    return spread(make()), spread(make(), 1)


def prepared(objective, data=None, make=mlp):
    """A computation of it alone, ready to train."""
    data = vectors() if data is None else data
    computation = Computation(*couple(make), (), [objective])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        computation.eval().prepare(data.batch([0, 1]), torch.Generator().manual_seed(0), data)
    return computation


def terms(computation, data, rows=ROWS, training=True, **moment):
    computation.train(training)
    generator = torch.Generator().manual_seed(0)
    return computation(data.batch(rows), generator, Moment(rows, **moment))


def features(computation, data, rows=ROWS):
    """On the unit sphere, by hand: what the last layer is given, through the linear map."""
    teacher, student = computation._frozen[0], computation.trained
    embedded = computation.objectives[0].embedded
    inputs = data.batch(rows)["inputs"]
    return normalize(embedded.student(student[:4](inputs)), dim=1), normalize(
        embedded.teacher(teacher[:4](inputs)), dim=1
    )


@pytest.mark.parametrize("negatives", [1, 6])  # more rows than products with the chosen ones, and fewer
def test_crd_by_hand(negatives):
    data, tau = vectors(40), 0.5
    computation = prepared(CRD(8, negatives, tau), data)
    crd = computation.objectives[0]
    step = computation.step(data.batch(ROWS), torch.Generator().manual_seed(0), Moment(ROWS))
    drawn = crd.classes.others(ROWS, negatives, step.drawing("crd"))
    total = 0.0
    for mine, memory in zip(features(computation, data), (crd.teacher_memory, crd.student_memory), strict=True):
        scores = torch.empty(4, 1 + negatives)
        for i, row in enumerate(ROWS):
            for j, other in enumerate([row, *drawn[i]]):
                scores[i, j] = math.exp((mine[i] @ memory.features[other]).item() / tau)
        p, noise = scores / (scores.mean() * 40), negatives / 40
        total -= (p[:, 0] / (p[:, 0] + noise + 1e-7)).log().mean()
        total -= (noise / (p[:, 1:] + noise + 1e-7)).log().sum(1).mean()
    assert terms(computation, data, training=False)["crd"].item() == pytest.approx(total.item(), rel=1e-5)


def test_crd_of_the_example_of_the_paper():
    """P⁺ = .3, P⁻ = .02, 4 negatives of 100 rows: 1.747024 on each side."""
    data, tau = vectors(100), 0.07
    computation = prepared(CRD(2, 4, tau), data)
    crd = computation.objectives[0]
    with torch.no_grad():
        for side in (crd.embedded.student, crd.embedded.teacher):
            side.weight.zero_()
            side.bias.copy_(torch.tensor([1.0, 0.0]))
        for memory in (crd.student_memory, crd.teacher_memory):
            memory.features = torch.tensor([tau * math.log(0.02), 0.0]).repeat(100, 1)
            memory.features[5, 0] = tau * math.log(0.3)
            memory.normaliser.fill_(1.0)
    assert terms(computation, data, torch.tensor([5]))["crd"].item() == pytest.approx(2 * 1.747024, abs=5e-5)


def test_only_the_rows_of_the_batch_are_remembered_with_momentum_and_by_their_own_side():
    data = vectors()
    computation = prepared(CRD(8, 5, momentum=0.75), data)
    crd = computation.objectives[0]
    memories = (crd.student_memory, crd.teacher_memory)
    before = [memory.features.clone() for memory in memories]
    terms(computation, data, training=False)
    assert all(torch.equal(m.features, old) for m, old in zip(memories, before, strict=True))
    assert all(m.normaliser == 0 for m in memories)
    terms(computation, data)["crd"].backward()
    other = [row for row in range(24) if row not in ROWS.tolist()]
    for memory, old, new in zip(memories, before, features(computation, data), strict=True):
        assert torch.equal(memory.features[other], old[other])
        expected = 0.75 * old[ROWS] + 0.25 * new
        expected = expected / expected.norm(dim=1, keepdim=True)
        assert torch.allclose(memory.features[ROWS], expected, atol=1e-6)
        assert not memory.features.requires_grad


def test_the_constants_are_those_of_the_first_batch_for_good():
    data = vectors()
    computation = prepared(CRD(8, 5), data)
    crd = computation.objectives[0]
    computation(data.batch([0, 1]), torch.Generator().manual_seed(0), Moment(torch.arange(2)))  # the loop's trial
    assert crd.student_memory.normaliser == crd.teacher_memory.normaliser == 0
    terms(computation, data)
    first = [memory.normaliser.item() for memory in (crd.student_memory, crd.teacher_memory)]
    assert first[0] != first[1]
    assert all(value > 0 for value in first)
    terms(computation, data, torch.tensor([4, 5]))
    assert [memory.normaliser.item() for memory in (crd.student_memory, crd.teacher_memory)] == first


def test_a_memory_begins_near_the_unit_sphere():
    torch.manual_seed(0)
    memory = Memory(2000, 128).features
    assert memory.abs().max() <= math.sqrt(3 / 128)
    assert memory.square().sum(1).mean().item() == pytest.approx(1, abs=0.01)


def test_aligned_features_score_below_random_ones():
    data = vectors(24)
    computation = prepared(CRD(8, 50, 0.2), data)
    crd = computation.objectives[0]
    everything = torch.arange(24)
    student, teacher = (side.detach() for side in features(computation, data, everything))
    values = {}
    for name, order in {"aligned": everything, "random": everything.roll(7)}.items():
        for memory, own in ((crd.student_memory, teacher), (crd.teacher_memory, student)):
            memory.features, memory.normaliser = own[order], torch.tensor(24.0)
        values[name] = terms(computation, data, everything, training=False)["crd"].item()
    assert values["aligned"] < values["random"] - 0.1


def test_training_lowers_the_terms():
    for objective, name in ((CRD(8, 20, 0.5), "crd"), (ICD(8), "icd_contrast")):
        records = list(steps(*couple(), None, vectors(), objective=objective,
                             schedule=Schedule(steps=60, batch_size=8, lr=1e-2)))  # fmt: skip
        first, last = (sum(r.terms[name] for r in part) for part in (records[:6], records[-6:]))
        assert last < 0.8 * first


def test_negatives_are_of_other_classes_and_equally_probable():
    labels = torch.tensor([0, 1, 1, 0, 2, -100, -100, 1])
    classes = Classes.of(Rows({"inputs": torch.zeros(8, 1), "labels": labels}))
    rows = torch.arange(8)
    drawn = classes.others(rows, 8000, torch.Generator().manual_seed(0))
    for row in rows:
        mine = labels[row]
        allowed = {i for i in range(8) if i != row and (labels[i] != mine or mine == -100)}
        counts = drawn[row].bincount(minlength=8)
        assert {i for i in range(8) if counts[i]} == allowed
        assert counts[list(allowed)].float().std() < 0.1 * 8000 / len(allowed)


@pytest.mark.parametrize("labels", [None, torch.randn(6), torch.zeros(6, 2, dtype=torch.long)])
def test_without_classes_any_other_row_is_a_negative(labels):
    table = {"inputs": torch.zeros(6, 1)} | ({} if labels is None else {"labels": labels})
    drawn = Classes.of(Rows(table)).others(torch.arange(6), 500, torch.Generator().manual_seed(0))
    for row in range(6):
        assert set(drawn[row].tolist()) == set(range(6)) - {row}


def test_what_crd_cannot_learn_from():
    data = vectors()
    with pytest.raises(DistillError, match=r"other classes, and all 24 are of one; give data of several classes"):
        prepared(CRD(8, 5), Rows({**data.table, "labels": torch.zeros(24, dtype=torch.long)}))
    computation = prepared(CRD(8, 5), data)
    with pytest.raises(DistillError, match=r"these have no numbers; train by distill.fit"):
        computation(data.batch(ROWS), torch.Generator().manual_seed(0))
    step = computation.step(data.batch(ROWS), torch.Generator().manual_seed(0), Moment(ROWS))
    with pytest.raises(DistillError, match=r"these rows have no numbers; give rows of data, or use ICD\(\)"):
        CRD(8, 5).prepare(step, 24)
    with pytest.raises(DistillError, match=r"were not made yet; call objective.prepare"):
        ICD(8)(step)
    with pytest.raises(DistillError, match=r"CRD\(negatives=0, temperature=0.07, momentum=0.5\): one negative"):
        CRD(negatives=0)
    with pytest.raises(DistillError, match=r"width=0 cannot be compared; the papers' is width=128"):
        ICD(0)


@pytest.mark.parametrize("at", [1, 3, 5])
@pytest.mark.parametrize("make", [lambda: CRD(8, 20), lambda: ICD(8)])
def test_resumed_as_if_uninterrupted(make, at, tmp_path):
    teacher, whole = couple()
    expected = list(steps(teacher, whole, None, vectors(), objective=[KD(), make()], schedule=SHORT))
    objective = make()
    running = steps(teacher, spread(mlp(), 1), None, vectors(), objective=[KD(), objective], schedule=SHORT,
                    checkpoints=Checkpoints(tmp_path, every=1))  # fmt: skip
    records = list(itertools.islice(running, at))
    running.close()
    again, other = spread(mlp(), 1), make()
    records += steps(teacher, again, None, vectors(), objective=[KD(), other], schedule=SHORT,
                     checkpoints=Checkpoints(tmp_path, every=100, resume=True))  # fmt: skip
    assert records == expected
    assert same(weights(whole), weights(again))


def test_the_state_holds_the_memories_and_not_the_classes():
    state = prepared(CRD(8, 5)).objectives[0].state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "embedded.student.weight": (8, 8), "embedded.student.bias": (8,),
        "embedded.teacher.weight": (8, 8), "embedded.teacher.bias": (8,),
        "student_memory.features": (24, 8), "student_memory.normaliser": (),
        "teacher_memory.features": (24, 8), "teacher_memory.normaliser": (),
    }  # fmt: skip


def test_two_trainings_are_alike_and_the_second_may_be_of_other_models():
    for objective in (CRD(8, 20), ICD(8)):
        runs = []
        for _ in range(2):
            student = spread(mlp(), 1)
            records = list(steps(spread(mlp()), student, None, vectors(), objective=objective, schedule=SHORT))
            runs.append((records, weights(student)))
        assert runs[0][0] == runs[1][0]
        assert same(runs[0][1], runs[1][1])
        assert len(list(steps(*couple(CNN), None, images(), objective=objective, schedule=SHORT))) == 6


def test_icd_by_hand():
    data = vectors()
    computation = prepared(ICD(8), data)
    icd = computation.objectives[0]
    student, teacher = features(computation, data)
    found = terms(computation, data)
    assert found["icd_contrast"].item() == pytest.approx(contrast(student, teacher, math.e).item(), rel=1e-5)
    assert found["icd_invariance"].item() == pytest.approx(invariance(student, teacher, math.e).item(), rel=1e-4)
    sum(found.values()).backward()
    trained = [*computation.trained[:4].parameters(), *icd.parameters()]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    with torch.no_grad():
        icd.log_scale.fill_(9.0)
    clamped = terms(computation, data)["icd_contrast"].item()
    assert clamped == pytest.approx(contrast(student, teacher, 10.0).item(), rel=1e-5)


def test_icd_of_orthonormal_features_and_of_one_row():
    data = vectors(5)
    computation = prepared(ICD(5), data)
    icd = computation.objectives[0]
    icd.embedded.forward = lambda step: (torch.eye(len(step.batch["labels"]), 5),) * 2
    assert terms(computation, data, torch.arange(5))["icd_contrast"].item() == pytest.approx(0.234243, abs=1e-5)
    assert terms(computation, data, torch.arange(5))["icd_invariance"].item() == pytest.approx(0, abs=1e-6)
    assert {name: term.item() for name, term in terms(computation, data, torch.arange(1)).items()} == {
        "icd_contrast": 0.0, "icd_invariance": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize("make", [lambda: CRD(8, 5), lambda: ICD(8)])
def test_weights_and_learning_rates(make):
    objective = make()
    objective.lr = 0.5
    schedule = Schedule(steps=1, batch_size=24, lr=1e-9, warmup=0, clip=None)
    (record,) = steps(*couple(), None, vectors(), objective=objective, schedule=schedule)
    weighted = sum(dict(objective.weights).get(name, 1.0) * term for name, term in record.terms.items())
    assert record.loss == pytest.approx(weighted)
    assert record.loss != pytest.approx(sum(record.terms.values()))
    moved = objective.embedded.student.weight
    assert (moved.abs() > 0.4).any()  # begins below 1/√8, and goes by 0.5


def test_features_are_the_mean_over_real_tokens():
    model, data, at = spread(gpt2(2)), text(6), Location(module="score", io="input")
    batch = data.batch(range(6))
    mask = batch["attention_mask"]
    found = pool(run(model, inputs_of(model, batch), [at]), at, mask)
    for i in range(6):
        alone = data.batch([i])
        states = run(model, inputs_of(model, alone), [at]).activations[at]
        assert torch.allclose(found[i], states[0].mean(0), atol=1e-5)
    heads = Location(1, "attention_heads")
    assert pool(run(model, inputs_of(model, batch), [heads]), heads, mask).shape == (6, 16)


PLACES = {
    "mlp": (mlp, vectors, Location(module="0")),
    "cnn": (CNN, images, Location(module="conv2")),
    "bert": (lambda: bert(2), text, Location(0)),
    "gpt2": (lambda: gpt2(2), text, (Location(1), Location(0))),
    "vit": (lambda: vit(2), images, Location(-1)),
}


@pytest.mark.parametrize("objective", [CRD, ICD])
@pytest.mark.parametrize("kind", PLACES)
def test_on_many_models_and_at_other_places(kind, objective):
    make, data, at = PLACES[kind]
    values = []
    for place in (None, at):
        student = spread(make(), 1)
        chosen = objective(8, at=place) if objective is ICD else CRD(8, 20, at=place)
        records = list(steps(spread(make()), student, None, data(), objective=chosen, schedule=SHORT))
        assert not same(weights(student), weights(spread(make(), 1)))
        values.append(records[0].loss)
    assert values[0] != values[1]


@pytest.fixture
def half():
    """An accelerator in bfloat16, which would else be that of all later tests."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_in_half_precision_features_are_compared_in_single(half):
    accelerator = half
    objectives = [CRD(8, 20), ICD(8)]
    records = list(steps(*couple(lambda: bert(2)), None, text(), objective=objectives, accelerator=accelerator,
                         schedule=Schedule(steps=2, batch_size=5)))  # fmt: skip
    assert all(math.isfinite(record.loss) for record in records)
    memory = objectives[0].student_memory.features
    assert memory.dtype == torch.float32
    assert (memory.norm(dim=1) - 1).abs().lt(1e-6).sum() == 10  # rows that half precision would not have so near
    data, computation = vectors(), prepared(ICD(8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = computation.objectives[0].embedded(computation.step(data.batch(ROWS), torch.Generator()))
    assert all(side.dtype == torch.float32 for side in found)
    assert all((side.norm(dim=1) - 1).abs().max() < 1e-6 for side in found)


def test_a_step_in_parts_remembers_the_same():
    memories = []
    for parts in (1, 3):
        objective = CRD(8, 20)
        schedule = Schedule(steps=1, batch_size=7, lr=1e-3, accumulate=parts)
        (record,) = steps(*couple(), None, vectors(), objective=objective, schedule=schedule)
        assert 5 < record.terms["crd"] < 50
        memories.append(objective.teacher_memory.features)
    assert torch.allclose(*memories, atol=1e-6)


def test_beside_an_interchange():
    """Their draws are apart: with CRD, DIITO draws as without."""

    def first(objective):
        teacher, student = couple(lambda: bert(2))
        return next(steps(teacher, student, "full", text(), objective=objective, schedule=SHORT)).terms

    assert first([DIITO(), CRD(8, 20)])["kd_cf"] == first([DIITO()])["kd_cf"]
    assert set(first(DIITO(match=[CRD(8, 20), ICD(8)]))) == {"crd_cf", "icd_contrast_cf", "icd_invariance_cf"}


def test_by_fit(tmp_path):
    result = fit(*couple(lambda: bert(2)), data=text(), objective=[KD(4.0), CRD(8, 20), ICD(8)], steps=2,
                 batch_size=5, console=QUIET, output_dir=tmp_path)  # fmt: skip
    assert result is not None


def test_one_process_gathers_its_own():
    rows = torch.randn(3, 2, requires_grad=True)
    assert torch.equal(gather(rows), rows)
    assert not gather(rows).requires_grad


def work(folder: str) -> None:
    """One of two processes: steps of 6 and of 1 of 7 rows, so that one process has none in the second step."""
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    sizes = gather(torch.full((2 * rank, 2), float(rank)))
    objective = CRD(8, 20)
    schedule = Schedule(steps=3, batch_size=6, lr=1e-12, weight_decay=0.0)
    both = [KD(), objective]
    records = list(steps(*couple(), None, vectors(7), objective=both, accelerator=accelerator, schedule=schedule))
    parts, both = replace(schedule, accumulate=2), [KD(), CRD(8, 20)]
    in_parts = list(steps(*couple(), None, vectors(7), objective=both, accelerator=accelerator, schedule=parts))
    found = {"memory": objective.student_memory.features.tolist(), "z": objective.student_memory.normaliser.item(),
             "sizes": sizes.tolist(), "losses": [record.loss for record in records],
             "parts": [record.loss for record in in_parts], "processes": accelerator.num_processes}  # fmt: skip
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


def test_several_processes_have_one_memory(tmp_path):
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("no gloo")
    code = f"from tests.distill.objectives.test_contrastive import work; work({str(tmp_path)!r})"
    run_together(["-W", "ignore", "-c", code])
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one["processes"] == 2
    assert one["sizes"] == [[1.0, 1.0]] * 2
    shared = ("memory", "z", "losses", "parts")
    assert {name: one[name] for name in shared} == {name: two[name] for name in shared}
    assert len(one["parts"]) == 3
    alone = CRD(8, 20)
    schedule = Schedule(steps=3, batch_size=6, lr=1e-12, weight_decay=0.0)
    list(steps(*couple(), None, vectors(7), objective=alone, schedule=schedule))
    assert torch.allclose(torch.tensor(one["memory"]), alone.student_memory.features, atol=1e-6)
