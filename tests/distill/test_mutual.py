import copy
import itertools
import math

import pytest
import torch

from distill import (
    CRD,
    DIITO,
    KD,
    Cosine,
    DistillError,
    FitNets,
    Labels,
    Objective,
    Ramp,
    Rows,
    Schedule,
    Task,
    accuracy,
    fit,
    mutual,
)
from distill.losses import cross_entropy, kd
from distill.objectives import Moment
from distill.training.mutual_computation import Together
from distill.training.run_folder import read_log
from interventions import Location
from tests.distill.tiny_models import CLASSES, QUIET, bert, mlp, same, spread, text, vectors, weights

SHORT = Schedule(steps=6, batch_size=5, lr=1e-2)
ONE = dict(schedule=SHORT, console=QUIET)


def mlps(count, first=0):
    return [spread(mlp(), first + seed, scale=0.6) for seed in range(count)]


def on_labels(network, rows=None, **settings):
    return fit(None, network, data=rows or vectors(), objective=Labels(), **{**ONE, **settings})


@pytest.mark.parametrize("clip", [None, 0.05])
def test_one_network_alone_learns_the_labels_bit_for_bit(clip):
    schedule = Schedule(steps=6, batch_size=5, lr=1e-2, clip=clip)
    one, other = spread(bert(2, dropout=0.2)), spread(bert(2, dropout=0.2))
    expected = on_labels(one, text(), schedule=schedule)
    (found,) = mutual([other], text(), schedule=schedule, console=QUIET)
    assert found.records == expected.records
    assert same(weights(one), weights(other))


@pytest.mark.parametrize("clip", [None, 0.05])
def test_without_edges_each_goes_its_own_way_bit_for_bit(clip):
    """One optimizer is as good as one each, and gradients are clipped network by network."""
    schedule = Schedule(steps=6, batch_size=5, lr=1e-2, clip=clip)
    networks, alone = mlps(3), mlps(3)
    results = mutual(networks, vectors(), edges=[], schedule=schedule, console=QUIET)
    for network, twin, result in zip(networks, alone, results, strict=True):
        assert result.records == on_labels(twin, schedule=schedule).records
        assert same(weights(network), weights(twin))


@pytest.mark.parametrize("count", [2, 3])
def test_identical_networks_have_nothing_to_tell_each_other(count):
    first = spread(mlp(), scale=0.6)
    networks = [copy.deepcopy(first) for _ in range(count)]
    expected = on_labels(first)
    results = mutual(networks, vectors(), **ONE)
    for network, result in zip(networks, results, strict=True):
        assert [r.terms["kd"] for r in result.records] == [0.0] * 6
        assert [r.loss for r in result.records] == pytest.approx([r.loss for r in expected.records], abs=1e-6)
        assert same(weights(network), weights(networks[0]))  # to the last bit as each other
        for ours, theirs in zip(network.parameters(), first.parameters(), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)  # the gradient of a KL of 0 is 0 up to rounding
    apart = mutual(mlps(count), vectors(), **ONE)
    assert all(result.records[0].terms["kd"] > 1e-3 for result in apart)


def test_the_step_of_three_networks_by_hand():
    networks, twins = mlps(3), mlps(3)
    schedule = Schedule(steps=1, batch_size=24, lr=1e-2, clip=0.05, warmup=0)
    results = mutual(networks, vectors(), objective=KD(2.0), schedule=schedule, console=QUIET)
    batch = vectors().batch(range(24))
    answers = [twin(batch["inputs"]) for twin in twins]
    for i, (network, twin) in enumerate(zip(networks, twins, strict=True)):
        ce = cross_entropy(answers[i], batch["labels"])
        imitation = sum(kd(answers[i], answers[j].detach(), 2.0) for j in range(3) if j != i) / 2
        (ce + imitation).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
        torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.01).step()
        (record,) = results[i].records
        assert record.terms == {"labels": pytest.approx(ce.item()), "kd": pytest.approx(imitation.item())}
        assert record.loss == pytest.approx((ce + imitation).item())
        for ours, theirs in zip(network.parameters(), twin.parameters(), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(
    "objective", [lambda: KD(), lambda: FitNets({Location(module="2"): Location(module="2")}), lambda: CRD(negatives=8)]
)
def test_what_one_is_told_does_not_reach_who_tells(objective):
    networks = mlps(3)
    edges = {(0, 1): (), (2, 1): (), (1, 2): ()}
    together = Together(networks, [objective()], [], edges, {})
    rows, generator = vectors(), torch.Generator().manual_seed(0)
    moment = Moment(torch.arange(len(rows)))
    together.prepare(rows.batch(range(24)), generator, rows, moment)
    terms = together(rows.batch(range(24)), generator, moment)
    assert {name.rpartition(".")[2] for name in terms} == {"1", "2"}
    for number in (1, 2):
        together.zero_grad()
        sum(term for name, term in terms.items() if name.endswith(f".{number}")).backward(retain_graph=True)
        touched = [any(p.grad is not None for p in network.parameters()) for network in networks]
        assert touched == [other == number for other in range(3)]


def test_projections_are_made_for_each_edge():
    networks = [spread(mlp(width), seed) for seed, width in enumerate((8, 6, 10))]
    objective, rows = FitNets({Location(module="2"): Location(module="2")}), vectors()
    pairs = dict.fromkeys(itertools.permutations(range(3), 2), ())
    together = Together(networks, [objective, KD()], [Labels()], pairs, {})
    together.prepare(rows.batch([0, 1]), torch.Generator(), rows)
    theirs = sum(parameter.numel() for network in networks for parameter in network.parameters())
    made = sum(parameter.numel() for parameter in together.parameters()) - theirs
    widths = [(8, 6), (8, 10), (6, 8), (6, 10), (10, 8), (10, 6)]
    assert made >= sum(one * other for one, other in widths)
    assert not list(objective.parameters())
    results = mutual(networks, rows, objective=[objective, KD()], **ONE)
    record = results[0].records[0]
    assert list(record.terms) == ["labels", "hint", "kd"]
    paper = objective.weights.get("hint", 1.0)
    assert record.loss == pytest.approx(record.terms["labels"] + paper * record.terms["hint"] + record.terms["kd"])


def test_an_online_teacher_is_not_taught():
    (teacher, student), (alone, frozen) = mlps(2), mlps(2)
    schedule = Schedule(steps=40, batch_size=8, lr=1e-2)
    taught = mutual([teacher, student], vectors(), edges=[(0, 1)], schedule=schedule, console=QUIET)
    expected = on_labels(alone, schedule=schedule)
    assert taught[0].records == expected.records
    assert same(weights(teacher), weights(alone))
    assert list(taught[0].records[0].terms) == ["labels"]
    assert list(taught[1].records[0].terms) == ["labels", "kd"]
    offline = fit(mlps(1)[0], frozen, data=vectors(), objective=[Labels(), KD(1.0)], schedule=schedule, console=QUIET)
    assert offline.records[0].terms == taught[1].records[0].terms  # until the teacher moves
    assert offline.records[-1].terms != taught[1].records[-1].terms


def test_peers_interchange_with_each_other():
    networks = [spread(bert(3)), spread(bert(2), 1)]
    before = [weights(network) for network in networks]
    results = mutual(networks, text(), objective=[KD(1.0), DIITO(), Cosine()], **ONE)
    for result, old in zip(results, before, strict=True):
        assert list(result.records[0].terms) == ["labels", "kd", "kd_cf", "cosine"]
        assert all(record.terms["kd_cf"] > 0 for record in result.records)
        assert not same(weights(result.student), old)
    assert results[0].settings["mapping"] == {
        "0 to 1": ["block_output.0 ↔ block_output.0", "block_output.1 + block_output.2 ↔ block_output.1"],
        "1 to 0": ["block_output.0 ↔ block_output.0", "block_output.1 ↔ block_output.1 + block_output.2"],
    }
    given = {(0, 1): {Location(1): Location(0)}, (1, 0): {Location(0): Location(1)}}
    again = mutual(networks, text(), objective=DIITO(), mapping=given, **ONE)
    assert again[0].settings["mapping"] == {
        "0 to 1": ["block_output.1 ↔ block_output.0"],
        "1 to 0": ["block_output.0 ↔ block_output.1"],
    }


def test_as_with_a_frozen_teacher_while_nothing_moves():
    """The first step of an edge is that of `fit` with the peer as the teacher: the same draws, the same runs."""
    teacher, student, twin = spread(bert(3)), spread(bert(2), 1), spread(bert(2), 1)
    objective = [KD(), DIITO()]
    schedule = Schedule(steps=1, batch_size=8)
    results = mutual(
        [teacher, student], text(), objective=objective, own=[], edges=[(0, 1), (1, 0)], schedule=schedule,
        console=QUIET, weights={"kd.0": 0.0, "kd_cf.0": 0.0},
    )  # fmt: skip
    expected = fit(spread(bert(3)), twin, data=text(), objective=objective, schedule=schedule, console=QUIET)
    assert results[1].records[0].terms["kd"] == pytest.approx(expected.records[0].terms["kd"], rel=1e-6)
    assert results[0].records[0].loss == 0


def test_weights_for_all_and_for_one():
    schedule = Schedule(steps=4, batch_size=5, lr=1e-3)
    given = {"kd": 0.5, "kd.1": 2.0, "labels": Ramp(1.0, 0.0)}
    results = mutual(mlps(3), vectors(), weights=given, schedule=schedule, console=QUIET)
    for result, weight in zip(results, (0.5, 2.0, 0.5), strict=True):
        for record in result.records:
            label = 1 - (record.step - 1) / 4
            assert record.loss == pytest.approx(weight * record.terms["kd"] + label * record.terms["labels"], rel=1e-5)
    for wrong in ({"kdd": 1.0}, {"kdd.1": 1.0}, {"kd.3": 1.0}):
        with pytest.raises(DistillError, match=r"weights names '(kdd|kdd.1|kd.3)' and the terms are"):
            mutual(mlps(3), vectors(), weights=wrong, **ONE)
    mutual(mlps(2), vectors(), weights={"kd": 2.0}, edges=[(0, 1)], **ONE)  # network 0 has no such term


@pytest.mark.parametrize("accumulate", [2, 3])
def test_a_step_in_parts_is_the_same_step(accumulate):
    rows, networks, parts = vectors(), mlps(2), mlps(2)
    whole = mutual(networks, rows, schedule=Schedule(steps=3, batch_size=7), console=QUIET)
    cut = mutual(parts, rows, schedule=Schedule(steps=3, batch_size=7, accumulate=accumulate), console=QUIET)
    assert [r.terms["labels"] for r in whole[1].records] == pytest.approx([r.terms["labels"] for r in cut[1].records])


def test_without_labels_they_only_imitate_each_other():
    rows = Rows({"inputs": vectors().table["inputs"]})
    with pytest.warns(UserWarning, match=r"no labels, so Labels\(\) is left out; what remains: KD"):
        results = mutual(mlps(2), rows, schedule=Schedule(steps=80, lr=2e-2), weights={"labels": 2.0}, console=QUIET)
    assert list(results[0].records[0].terms) == ["kd"]
    assert results[0].records[-1].terms["kd"] < 0.1 * results[0].records[0].terms["kd"]


class PowerCut(Objective):
    """KD that raises in one call."""

    def __init__(self):
        super().__init__()
        self.calls, self._at = 0, math.inf

    def forward(self, step):
        self.calls += torch.is_grad_enabled()
        if self.calls == self._at:
            raise RuntimeError("power cut")
        return KD(1.0)(step)

    def extra_repr(self):
        return "like KD"


def test_resumed_as_if_uninterrupted(tmp_path):
    make = lambda: [spread(bert(2, dropout=0.2), seed) for seed in range(2)]  # noqa: E731
    whole, again = make(), make()
    settings = dict(schedule=Schedule(steps=7, batch_size=5, lr=1e-2), console=QUIET)
    expected = mutual(whole, text(), objective=[PowerCut(), DIITO()], **settings)
    settings |= {"output_dir": tmp_path / "run", "every": 2}
    cut = PowerCut()
    cut._at = 11
    with pytest.raises(RuntimeError, match="power cut"):
        mutual(make(), text(), objective=[cut, DIITO()], **settings)
    torch.rand(3)
    settings["resume"] = True
    results = mutual(again, text(), objective=[PowerCut(), DIITO()], **settings)
    assert [result.records for result in results] == [result.records for result in expected]
    assert all(same(weights(a), weights(b)) for a, b in zip(whole, again, strict=True))
    for number in range(2):
        names = sorted(path.name for path in (tmp_path / "run" / str(number)).iterdir())
        assert names == ["log.jsonl", "result.json", "settings.json", "student"]
        assert read_log(tmp_path / "run" / str(number)) == list(results[number].records)
    with pytest.raises(DistillError, match="was started with edges="):
        mutual(make(), text(), objective=[PowerCut(), DIITO()], edges=[(0, 1)], **settings)


def test_each_is_measured_on_a_task():
    task = Task("t", vectors(), vectors(16, seed=1), tuple("abc"[:CLASSES]))
    results = mutual(mlps(2), task, **ONE)
    assert [result.accuracy for result in results] == [accuracy(r.student, task.test).value for r in results]
    assert mutual(mlps(2), vectors(), **ONE)[0].accuracy is None


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        ([], {}, r"mutual was given no networks; give torch modules"),
        ([mlp(), "other"], {}, r"mutual was given str, which is no network"),
        (
            mlps(2),
            {"edges": [(0, 2)]},
            r"\(0, 2\) is no pair \(teacher, student\) of two different networks from 0",
        ),
        (mlps(2), {"edges": [(0, 0)]}, r"\(0, 0\) is no pair"),
        (mlps(2), {"edges": [(0, 1), (0, 1)]}, r"each pair once"),
        (mlps(2), {"own": [], "edges": [(0, 1)]}, r"network 0 has no teacher and no objective of its own"),
        (mlps(2), {"own": [Labels(), KD()]}, r"compares with a teacher and there is none"),
        (mlps(2), {"objective": [KD(), Labels()]}, r"objective and own both return the term 'labels'"),
        (mlps(2), {"resume": True}, r"resume=True needs the folder"),
        ([mlp(), torch.nn.Linear(6, 5)], {}, r"the teacher has 3 classes and the student 5"),
    ],
)
def test_what_cannot_learn_together(given, settings, message):
    with pytest.raises(DistillError, match=message):
        mutual(given, vectors(), **{**ONE, **settings})


def test_one_network_twice_and_columns_of_a_teacher():
    network = mlp()
    with pytest.raises(DistillError, match="one network twice, which would teach itself"):
        mutual([network, network], vectors(), **ONE)
    rows = Rows({**vectors().table, "teacher_inputs": torch.zeros(24, 6)})
    with pytest.raises(DistillError, match="'teacher_inputs', a column for a teacher alone"):
        mutual(mlps(2), rows, **ONE)


def test_callbacks_see_the_numbers_of_all_and_end_the_training():
    seen = []

    def called(record):
        seen.append(record)
        return "stop" if record.step == 2 else None

    results = mutual(mlps(2), vectors(), callbacks=called, **ONE)
    assert [each.step for each in seen] == [1, 2]
    assert {"kd.0", "kd.1", "ce.0", "ce.1"} <= {*seen[0].terms} | {"ce.0", "ce.1"}
    assert [len(each.records) for each in results] == [2, 2]
    assert {each.stopped for each in results} == {"a callback ended the training"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": "answers"}, "answer anew in each step"),
        ({"eval_every": 2}, "no one evaluation is the best for all"),
        ({"lr": 0.1}, r"say it in the schedule: schedule=Schedule"),
    ],
)
def test_arguments_of_fit_without_use_are_refused(settings, message):
    with pytest.raises(DistillError, match=message):
        mutual(mlps(2), vectors(), **ONE, **settings)
    with pytest.raises(TypeError, match="unexpected keyword argument 'cahce'"):
        mutual(mlps(2), vectors(), **ONE, cahce="answers")
