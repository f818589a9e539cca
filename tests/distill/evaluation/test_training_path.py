import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import distill
from distill import DistillError, Record, Rows
from distill.evaluation.similarity import cka, representational_similarity
from distill.evaluation.training_path import representations, snapshots, training_path
from distill.networks import CNN, MLP, LSTMClassifier, TransformerClassifier
from interventions import InterventionError, Location, Picture, run
from tests.distill.tiny_models import QUIET, VOCABULARY, bert, images, same, spread, text, weights


def drawn(seed, n=20, dims=5):
    return torch.randn(n, dims, generator=torch.Generator().manual_seed(seed))


def moving(start, end, count=4):
    return [torch.lerp(drawn(start), drawn(end), share) for share in torch.linspace(0, 1, count).tolist()]


def planar(places):
    """Checkpoints and a similarity by which they lie exactly at these places of a plane."""
    states = [torch.tensor([place]) for place in places]
    return states, lambda a, b: 1 - (a - b).norm()


@pytest.mark.parametrize("similarity", [representational_similarity, cka])
def test_distances_are_one_minus_the_similarity_of_every_two_checkpoints(similarity):
    runs = {"one": moving(0, 1), "other": moving(2, 1, 3), "teacher": [drawn(1)]}
    path = training_path(runs, similarity=similarity)
    states = [state for run in runs.values() for state in run]
    for i, one in enumerate(states):
        for j, other in enumerate(states):
            expected = 0 if i == j else 1 - similarity(one, other).item()
            assert path.distances[i, j].item() == pytest.approx(expected, abs=1e-6)
    assert {name: tuple(points.shape) for name, points in path.points.items()} == {
        "one": (4, 2), "other": (3, 2), "teacher": (1, 2)
    }  # fmt: skip
    assert torch.equal(path.between("other", "one"), path.distances[4:7, :4])
    assert path.between("teacher", "one")[0, -1] < 1e-6
    assert path.between("teacher", "one")[0, 0] > 0.1
    with pytest.raises(DistillError, match="there is no run 'two'; the runs are 'one', 'other', 'teacher'"):
        path.between("two", "one")


def test_points_of_a_plane_are_found_again():
    places = [[0.0, 0.0], [0.4, 0.1], [0.5, 0.5], [0.1, 0.6], [0.9, 0.2], [0.3, 0.9]]
    states, similarity = planar(places)
    path = training_path({"run": states[:4], "other": states[4:]}, similarity=similarity)
    points = torch.cat(list(path.points.values()))
    assert torch.allclose(torch.cdist(points, points), path.distances, atol=1e-3)
    assert path.stress < 1e-3
    assert (points.var(0)[0] > points.var(0)[1]).item()  # the longest way lies across
    assert (points[0] <= 0).all()


def test_stress_is_kruskals():
    """Four points, all as far from each other: they fit into space, not into the plane."""
    path = training_path({"run": [drawn(i) for i in range(4)]}, similarity=lambda a, b: torch.tensor(0.0))
    points = path.points["run"]
    sums = [0.0, 0.0]
    for i in range(4):
        for j in range(i):
            shown = math.dist(points[i].tolist(), points[j].tolist())
            sums[0] += (shown - 1) ** 2
            sums[1] += shown**2
    assert path.stress == pytest.approx(math.sqrt(sums[0] / sums[1]))
    assert path.stress > 0.1


def test_the_same_seed_gives_the_same_points_and_no_generator_is_touched():
    runs = {"one": moving(0, 1), "other": moving(2, 3)}
    before = torch.get_rng_state()
    one, again = training_path(runs, seed=5), training_path(runs, seed=5)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one.points[name], again.points[name]) for name in runs)


def test_checkpoints_that_are_all_the_same_are_one_point():
    path = training_path({"run": [drawn(0)] * 3})
    assert path.distances.max() < 1e-6
    assert path.points["run"].abs().max() < 1e-3
    assert math.isfinite(path.stress)
    assert isinstance(path.plot(), Picture)


def test_it_prints_and_draws():
    path = training_path({"CNN": moving(0, 1), "CNN → MLP": moving(2, 1), "teacher": [drawn(1)]}, similarity=cka)
    lines = str(path).splitlines()
    assert lines[0].startswith("1 − cka: how far")
    assert lines[1].split() == ["run", "checkpoints", "moved", "CNN", "CNN", "→", "MLP", "teacher"]
    moved = 1 - cka(drawn(0), drawn(1)).item()
    assert lines[2].split() == ["CNN", "4", f"{moved:.3f}", "0.000", "0.000", "0.000"]
    assert lines[-1] == f"stress in the plane {path.stress:.3f}"
    assert len({len(line) for line in lines[2:-1]}) == 1
    axes = path.plot().axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["CNN", "CNN → MLP", "teacher"]
    drawn_lines = [line.get_xydata() for line in axes.get_lines()]
    for line, points in zip(drawn_lines, path.points.values(), strict=True):
        assert torch.allclose(torch.tensor(line), points)
    assert path._repr_html_().startswith('<img src="data:image/png;base64,')
    assert "checkpoints" in path._repr_html_()
    assert path.to_dict()["points"]["teacher"] == path.points["teacher"].tolist()


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ({}, "0 checkpoints make no path"),
        ({"one": [drawn(0)]}, "1 checkpoints make no path"),
        ({"one": [drawn(0), drawn(1)], "other": []}, "run 'other' has no checkpoints"),
        ({"one": [drawn(0), drawn(1, n=19)]}, "of 20 and of 19 examples"),
    ],
)
def test_what_makes_no_path_is_said(runs, message):
    with pytest.raises(DistillError, match=message):
        training_path(runs)


@pytest.mark.parametrize("batch_size", [5, 64])
def test_representations_are_the_activations_in_eval_mode(batch_size):
    torch.manual_seed(0)
    network, rows = CNN((4, 6), 3).train(), images(12)
    before = weights(network)
    found = representations(network, rows, Location(1), batch_size=batch_size)
    assert same(before, weights(network))  # also the statistics of batch norm
    assert network.training
    pixels = rows.batch(range(12))["pixel_values"]
    maps = network.eval().blocks[1](network.blocks[0](pixels))
    assert torch.allclose(found.reshape(12, 2, 2, 6), maps.permute(0, 2, 3, 1), atol=1e-6)
    assert torch.allclose(representations(network, rows, "logits", batch_size=batch_size), network(pixels), atol=1e-6)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("position", [0, 1, -1])
def test_a_position_counts_real_tokens(side, position):
    torch.manual_seed(0)
    model, rows = TransformerClassifier(VOCABULARY, 3, width=8).eval(), text(10, side=side)
    found = representations(model, rows, "block_output.0", positions=position, batch_size=4)
    for i in range(10):
        ids = rows.table["input_ids"][i][None]
        alone = run(model, {"input_ids": ids}, Location(0)).vectors(Location(0))
        assert torch.allclose(found[i], alone[0, position], atol=1e-5)


def test_rows_of_several_lengths_need_a_position():
    torch.manual_seed(0)
    model = LSTMClassifier(VOCABULARY, 3, width=8)
    for batch_size in (1, 4):
        with pytest.raises(DistillError, match="the rows have several lengths, .* name one: positions=0"):
            representations(model, text(10), Location(0), batch_size=batch_size)
    assert representations(model, text(10, 5, 5), Location(0)).shape == (10, 40)
    with pytest.raises(InterventionError):
        representations(model, text(10, 5, 5), Location(0), positions=7)


def test_heads_lie_side_by_side():
    model, rows = spread(bert(2)), text(6, 5, 5)
    assert representations(model, rows, Location(0, "query"), positions=2).shape == (6, 16)


def blobs():
    labels = torch.arange(30) % 3
    pixels = torch.randn(30, 1, 4, 4, generator=torch.Generator().manual_seed(0)) + 2.0 * labels[:, None, None, None]
    return Rows({"pixel_values": pixels, "labels": labels})


@pytest.mark.parametrize(("every", "count"), [(2, 5), (3, 4), (7, 2), (100, 2)])
def test_snapshots_are_taken_at_the_start_on_the_way_and_at_the_end(every, count):
    rows = blobs()

    def trained():
        torch.manual_seed(0)
        student = MLP(16, (6,), 3)
        schedule = distill.Schedule(steps=7, batch_size=10, lr=1e-2)
        return student, distill.steps(None, student, data=rows, objective=distill.Labels(), schedule=schedule)

    student, records = trained()
    first = representations(student, rows, Location(0))
    taken = snapshots(records, student, rows, Location(0), every=every)
    assert len(taken) == count
    assert torch.equal(taken[0], first)
    assert torch.equal(taken[-1], representations(student, rows, Location(0)))
    student, records = trained()
    by_hand = [representations(student, rows, Location(0))]
    by_hand += [
        representations(student, rows, Location(0))
        for record in records
        if record.step % every == 0 or record.step == 7
    ]
    assert all(torch.equal(one, other) for one, other in zip(taken, by_hand, strict=True))


def test_looking_on_changes_nothing_about_the_training():
    rows, ends = blobs(), []
    for looks in (False, True):
        torch.manual_seed(0)
        student = MLP(16, (6,), 3)
        schedule = distill.Schedule(steps=6, batch_size=10, lr=1e-2)
        records = distill.steps(None, student, data=rows, objective=distill.Labels(), schedule=schedule)
        if looks:
            snapshots(records, student, rows, "logits", every=1)
        else:
            list(records)
        ends.append(weights(student))
    assert same(*ends)


def test_every_needs_a_step():
    with pytest.raises(DistillError, match="every=0 steps is no distance"):
        snapshots([], MLP(16, (6,), 3), blobs(), Location(0), every=0)


def test_a_student_comes_nearer_to_its_teacher():
    rows = blobs()
    torch.manual_seed(0)
    teacher, student = MLP(16, (6,), 3, dropout=0.0), MLP(16, (6,), 3, dropout=0.0)
    given = dict(data=rows, steps=60, batch_size=10, lr=1e-2, console=QUIET)
    distill.fit(None, teacher, objective=distill.Labels(), **given)
    schedule = distill.Schedule(steps=60, batch_size=10, lr=1e-2)
    records = distill.steps(teacher, student, data=rows, objective=distill.KD(5.0), schedule=schedule)
    path = training_path(
        {"student": snapshots(records, student, rows, "logits", every=20),
         "teacher": [representations(teacher, rows, "logits")]},
        similarity=cka,
    )  # fmt: skip
    apart = path.between("student", "teacher")[:, 0]
    assert apart[-1] < 0.5 * apart[0]


FORMS = {
    "columns": lambda table: table,
    "rows": lambda table: [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)],
    "pairs": lambda table: list(zip(table["inputs"], table["labels"], strict=True)),
    "a data set": lambda table: TensorDataset(table["inputs"], table["labels"]),
    "a loader": lambda table: DataLoader(TensorDataset(table["inputs"], table["labels"]), batch_size=4),
    "once": lambda table: iter(FORMS["pairs"](table)),
}


@pytest.mark.filterwarnings("ignore:a .* without length")
@pytest.mark.parametrize("form", FORMS)
def test_data_in_any_form(form):
    torch.manual_seed(0)
    model, table = (
        nn.Sequential(nn.Linear(6, 4), nn.Tanh()).eval(),
        {"inputs": torch.randn(10, 6), "labels": torch.arange(10) % 2},
    )
    wanted = representations(model, Rows(table), Location(module="0"))
    assert torch.equal(representations(model, FORMS[form](table), Location(module="0")), wanted)
    records = [Record(step, 2, 1.0, {}, 0.1) for step in (1, 2)]
    taken = snapshots(records, model, FORMS[form](table), Location(module="0"), every=1)
    assert [torch.equal(each, wanted) for each in taken] == [True] * 3


def test_data_that_does_not_fit_is_said_in_one_line():
    with pytest.raises(DistillError, match=r"the model \(Sequential\) fails on input 0 \[10, 5\] float32"):
        representations(nn.Sequential(nn.Linear(6, 4)), {"inputs": torch.randn(10, 5)}, Location(module="0"))
