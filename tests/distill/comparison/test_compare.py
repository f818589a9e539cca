"""Students compared: exact figures of networks wired by hand, planted differences, and laws of differences."""

import copy

import pytest
import torch
from torch import nn

from distill import (
    DistillError,
    Evaluation,
    FitResult,
    InContext,
    Kind,
    Rows,
    Scattered,
    Span,
    compare,
    interchange_accuracy,
)
from distill.comparison.compared_figure import ALL, TRAINED, UNTRAINED
from distill.data.seen_rows import SeenRows
from interventions import Location
from tests.distill.tiny_models import bert, images, mlp, spread, text, vectors, vit
from tests.distill.wired import SUM, Wired

PARTS = {Location(module="hidden", dims=[number]): Location(module="hidden", dims=[number]) for number in (0, 1)}
INNER, C = (f"module:hidden[dims={n}] ↔ module:hidden[dims={n}]" for n in ("0", "1"))
GRID = torch.cartesian_prod(torch.arange(3), torch.arange(3), torch.arange(3)).float()
ALL_ROWS = Rows({"x": GRID, "labels": (GRID.sum(1) % 3).long()})
ACROSS = {Location(0): Location(0), Location(2): Location(1)}


class Constant(Wired):
    """Answers one class, whatever is written into its state, which moves its logits a little."""

    def forward(self, x):
        return super().forward(x) / 1000 + torch.tensor([1.0, 0.0, 0.0])


class Copying(Wired):
    """Answers by what is in dim 0, which is all; dim 1 moves its logits a little."""

    def __init__(self):
        super().__init__()
        self.hidden.weight = nn.Parameter(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 1e-3], [0.0, 0.0, 0.0]]))


class Deaf(Wired):
    """Answers as the teacher does, and reads c from a dim that nobody writes to; dim 1 moves its logits a little."""

    def __init__(self):
        super().__init__()
        self.hidden.weight = nn.Parameter(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1e-3], [0.0, 0.0, 1.0]]))

    def forward(self, x):
        state = self.hidden(x)
        total = state.sum(1)
        return self.scale * (2 * torch.pi / 3 * (total[:, None] - torch.arange(3.0))).cos()


def wired(students, **settings):
    return compare(Wired(), students, PARTS, ALL_ROWS, pairs=200, **settings)


def value(found, figure, student, kind="as mapped", entry="overall"):
    return found.find(figure, student, kind, entry).value.estimate.value


def difference(found, figure, student, kind="as mapped", entry="overall"):
    return found.find(figure, student, kind, entry).difference.estimate


def test_networks_wired_by_hand_have_the_figures_that_they_must_have():
    """Every combination of a, b, c is a row; the answer is (a + b + c) mod 3."""
    students = {"perfect": Wired(), "deaf": Deaf(), "constant": Constant(), "copying": Copying()}
    found = wired(students)
    for entry in ("overall", INNER, C):
        for figure in ("iia", "effective", "normalized", "correlation"):
            assert value(found, figure, "perfect", entry=entry) == pytest.approx(1)
        assert value(found, "kl", "perfect", entry=entry) == 0
        assert value(found, "normalized", "constant", entry=entry) == 0
        assert value(found, "effective", "copying", entry=entry) == 0
    assert value(found, "effective", "deaf", entry=INNER) == 1
    assert value(found, "effective", "deaf", entry=C) == value(found, "normalized", "deaf", entry=C) == 0
    for name in ("accuracy", "agreement"):
        assert [value(found, name, each) for each in ("perfect", "deaf", "copying")] == [1, 1, 1]
    assert value(found, "accuracy", "constant") == pytest.approx(1 / 3)
    (test,) = found.discordance["constant"]
    assert (test.won, test.lost) == (0, 18)


def test_a_difference_is_found_at_its_entry_and_nowhere_else():
    found = wired({"perfect": Wired(), "deaf": Deaf()}, kinds={"all": Kind(None)})
    for kind in found.kinds:
        for figure in ("iia", "effective", "normalized"):
            same = difference(found, figure, "deaf", kind, INNER)
            assert (same.value, same.low, same.high) == (0, 0, 0)
        assert difference(found, "effective", "deaf", kind, C).value == -1
    assert difference(found, "accuracy", "deaf") == difference(found, "agreement", "deaf")
    assert difference(found, "accuracy", "deaf").high == 0


def with_values_reversed(model, layer):
    """The same function, with the dims of the values of every head of a layer in reverse order."""
    changed = copy.deepcopy(model)
    attention = changed.bert.encoder.layer[layer].attention
    width, heads = attention.self.value.weight.shape[0], attention.self.num_attention_heads
    order = torch.arange(width).view(heads, -1).flip(1).flatten()
    with torch.no_grad():
        for parameter in (attention.self.value.weight, attention.self.value.bias):
            parameter.copy_(parameter[order])
        attention.output.dense.weight.copy_(attention.output.dense.weight[:, order])
    return changed


def test_a_difference_is_found_at_its_kind_and_layer_and_nowhere_else():
    """Dims of the heads of layer 1 are exchanged: answers, heads as wholes and all other places are as before."""
    teacher = spread(bert(3), 3, 0.8)
    student, mapping = with_values_reversed(teacher, 1), {Location(i): Location(i) for i in (0, 1)}
    same = Span(0.5, same=True)
    kinds = {
        "heads": Kind(same, site="attention_heads"), "parts of heads": Kind(same, site="attention_heads", dims=0.5),
        "mlp": Kind(same, site="mlp_output"), "half": Kind(same, dims=0.5),
    }  # fmt: skip
    found = compare(teacher, {"copy": copy.deepcopy(teacher), "changed": student}, mapping, text(20), kinds=kinds,
                    pairs=40, effective_only=True)  # fmt: skip
    entries = [each.entry for each in found.figures if (each.kind, each.figure) == ("parts of heads", "effective")]
    for kind in found.kinds:
        for entry in {each.entry for each in found.figures if each.kind == kind} - {"overall"}:
            changed = difference(found, "effective", "changed", kind, entry)
            if kind == "parts of heads" and "heads.1" in entry:
                assert changed.high < 0
            else:
                assert (changed.value, changed.low, changed.high) == (0, 0, 0), (kind, entry)
    assert len(set(entries)) == 3
    for name in ("accuracy", "agreement"):
        assert difference(found, name, "changed").value == 0
    assert found.sentence.endswith("(exactly as much: as mapped, heads, mlp, half).")


FAMILIES = {"bert": (bert, text), "vit": (vit, images)}


def couple(family, seeds=(13, 14)):
    make, rows = FAMILIES[family]
    return spread(make(4), 3, 0.8), [spread(make(3), seed, 0.8) for seed in seeds], rows(24)


@pytest.mark.parametrize(
    ("family", "count"),
    [("bert", 2), pytest.param("bert", 1, marks=pytest.mark.full), pytest.param("vit", 1, marks=pytest.mark.full)],
)
def test_a_student_and_itself_do_not_differ_at_all(family, count):
    """Exactly 0, from 0 to 0, for every figure, kind, entry and mean of kinds; whatever the seed."""
    teacher, students, rows = couple(family)
    same = students[:count]
    found = compare(teacher, {"a": same, "b": same}, ACROSS, rows, kinds="usual", pairs=15, seed=3)
    changes = [each.difference for each in found.figures if each.difference is not None]
    assert len(changes) > 50
    assert {(each.estimate.value, each.estimate.low, each.estimate.high) for each in changes} == {(0, 0, 0)}
    assert {each.runs for each in changes} == {(0.0,) * count}
    assert "b is exactly as accurate as a and computes exactly as much like the teacher on average" in found.sentence
    assert [(each.won, each.lost) for each in found.discordance["b"]] == [(0, 0)] * count


def all_values(found, digits=12):
    return {
        (e.figure, e.kind, e.entry, e.student): [
            round(x, digits) for x in (vars(e.value.estimate) | vars((e.difference or e.value).estimate)).values()
        ]
        for e in found.figures
    }


@pytest.mark.parametrize("effective_only", [False, pytest.param(True, marks=pytest.mark.full)])
def test_figures_do_not_depend_on_the_batch_size(effective_only):
    teacher, (one, other), rows = couple("bert")
    kinds = {"one": Kind(Scattered(1)), "heads": Kind(site="attention_heads")}
    small, large = (
        compare(teacher, {"a": one, "b": other}, ACROSS, rows, kinds=kinds, pairs=30, batch_size=size,
                effective_only=effective_only)
        for size in (7, 64)
    )  # fmt: skip
    first, second = all_values(small), all_values(large)
    assert first.keys() == second.keys()
    for key, numbers in first.items():
        assert numbers == pytest.approx(second[key], abs=1e-4), key


def test_the_order_of_students_changes_signs_only():
    teacher, (one, other), rows = couple("bert")
    there, back = (
        compare(teacher, students, ACROSS, rows, kinds={"one": Kind(Scattered(1))}, pairs=30)
        for students in ({"a": one, "b": other}, {"b": other, "a": one})
    )
    for each in there.figures:
        if each.difference is None:
            continue
        mirrored = back.find(each.figure, "a", each.kind, each.entry) if "mean" not in each.kind else None
        if mirrored is not None:
            expected = mirrored.difference.estimate
            assert vars(each.difference.estimate) == pytest.approx(
                {"value": -expected.value, "low": -expected.high, "high": -expected.low}, abs=1e-15
            )
            assert back.find(each.figure, "b", each.kind, each.entry).value == each.value
    won, lost = there.discordance["b"][0], back.discordance["a"][0]
    assert (won.won, won.lost) == (lost.lost, lost.won)


def test_figures_of_a_student_are_those_that_are_measured_of_it_alone():
    """Where nothing is left out for another one."""
    teacher, (one, other), rows = couple("bert")
    kinds = {"one": Kind(Scattered(1)), "heads": Kind(site="attention_heads")}
    found = compare(teacher, {"a": one, "b": other}, ACROSS, rows, kinds=kinds, pairs=30)
    for name, student in (("a", one), ("b", other)):
        alone = interchange_accuracy(teacher, student, ACROSS, rows, kinds=kinds, pairs=30)
        for kind, each in {"as mapped": alone, **alone.kinds}.items():
            assert value(found, "iia", name, kind) == each.iia
            assert found.find("iia", name, kind).value.estimate.low == each.overall.iia.low
            assert value(found, "kl", name, kind) == pytest.approx(each.overall.kl)
            assert value(found, "correlation", name, kind) == pytest.approx(each.overall.correlation)
            assert value(found, "normalized", name, kind) == pytest.approx(each.overall.normalized.value)


def test_what_is_left_out_for_one_student_is_left_out_for_all():
    """A student whose last layer is mapped: what is written there is all that it reads, or nothing."""
    teacher, (one, other), rows = couple("bert")
    inner, last = {Location(1): Location(1)}, {Location(1): Location(2)}
    found = compare(teacher, {"a": one, "b": other}, {"a": inner, "b": inner}, rows, pairs=60)
    fewer = compare(teacher, {"a": one, "b": other, "c": one}, {"a": inner, "b": inner, "c": inner}, rows, pairs=60)
    assert value(found, "iia", "b") == value(fewer, "iia", "b")
    assert found.settings["counted"]["as mapped"] == 60
    assert [each.entry for each in found.figures if each.kind == "as mapped"][-1] == "block_output.1 ↔ block_output.1"
    with pytest.raises(DistillError, match=r"student 'b': every write of this mapping replaces all"):
        compare(teacher, {"a": one, "b": other}, {"a": inner, "b": last}, rows, pairs=20)


def test_several_seeds_are_paired_by_their_place():
    teacher, students, rows = couple("bert", (13, 14, 15, 16))
    found = compare(teacher, {"a": students[:2], "b": students[2:]}, ACROSS, rows, pairs=30)
    single = [compare(teacher, {"a": one, "b": other}, ACROSS, rows, pairs=30)
              for one, other in zip(students[:2], students[2:], strict=True)]  # fmt: skip
    for figure in ("accuracy", "agreement", "iia", "effective", "kl"):
        change = found.find(figure, "b").difference
        assert change.runs == pytest.approx([difference(each, figure, "b").value for each in single])
        assert change.estimate.value == pytest.approx(sum(change.runs) / 2)
        assert change.sd == pytest.approx(abs(change.runs[0] - change.runs[1]) / 2**0.5)
        assert found.find(figure, "a").value.runs == pytest.approx([value(each, figure, "a") for each in single])
    assert [vars(each) for each in found.discordance["b"]] == [vars(each.discordance["b"][0]) for each in single]
    assert found.sentence.startswith("Over 2 seeds, ")
    unpaired = compare(teacher, {"a": students[:2], "b": students[1:]}, ACROSS, rows, pairs=30)
    assert unpaired.find("iia", "b").difference.runs == ()
    assert "they are compared by their means (Welch), not run by run" in str(unpaired)
    assert unpaired.discordance == {"b": ()}


def test_students_of_other_depths_have_mappings_of_their_own():
    teacher, (student, _), rows = couple("bert")
    mapping = {"three": {Location(1): Location(1)}, "four": {Location(1): Location(1)}}
    found = compare(teacher, {"three": student, "four": copy.deepcopy(teacher)}, mapping, rows, pairs=30)
    assert value(found, "effective", "four") == 1
    mapping["four"] = {Location(1): Location(2)}
    assert {
        each.entry for each in compare(teacher, {"three": student, "four": teacher}, mapping, rows, pairs=9).figures
    } == {"overall", "entry 1"}


def trained(student, kinds, seen=None):
    """What fit returns of a student that was trained on some kinds."""
    settings = {} if kinds is None else {"kinds": [repr(each) for each in kinds]}
    return FitResult(student, (), Evaluation(None, None), settings, seen=seen)


def test_kinds_that_were_trained_on_are_told_apart():
    teacher, (one, other), rows = couple("bert")
    kinds = {"one": Kind(Scattered(1)), "heads": Kind(site="attention_heads")}
    students = {"KD": trained(one, []), "both": trained(other, [kinds["one"]]), "plain": copy.deepcopy(other)}
    found = compare(teacher, students, ACROSS, rows, kinds=kinds, pairs=30)
    flags = {(each.student, each.kind): each.trained for each in found.figures if each.figure == "effective"}
    assert flags["both", "one"] is True
    assert flags["both", "heads"] is flags["KD", "one"] is False
    assert flags["plain", "one"] is None
    one, others = (found.find("effective", "both", kind).difference for kind in (TRAINED, UNTRAINED))
    assert one == found.find("effective", "both", "one").difference
    two = [difference(found, "effective", "both", kind) for kind in ("as mapped", "heads")]
    assert others.estimate.value == pytest.approx(sum(each.value for each in two) / 2)
    assert min(each.low for each in two) < others.estimate.low
    assert "on the kind that was trained" in found.sentences["both"]
    assert "on average over the 2 others" in found.sentences["both"]
    assert "on average over 3 kinds of interchange, none of which was trained" in found.sentences["plain"]
    unknown = compare(
        teacher,
        {"a": other, "b": teacher},
        {"a": {Location(1): Location(1)}, "b": {Location(1): Location(1)}},
        rows,
        pairs=9,
    )
    assert unknown.find("effective", "b", ALL) is not None


@pytest.mark.parametrize("effective_only", [False, pytest.param(True, marks=pytest.mark.full)])
def test_the_mean_of_kinds_is_over_the_same_pairs(effective_only):
    """Two kinds that are one, and kinds of other pairs: in context, or effective ones alone."""
    teacher, (one, other), rows = couple("bert")
    again = {"again": Kind(Span(0.3))}
    found = compare(teacher, {"a": one, "b": other}, ACROSS, rows, kinds=again, pairs=60)
    mean, own = difference(found, "iia", "b", ALL), difference(found, "iia", "b")
    assert vars(mean) == pytest.approx(vars(own))
    kinds = {"one": Kind(Scattered(1)), "context": Kind(sources=InContext(0.4))}
    found = compare(teacher, {"a": one, "b": other}, ACROSS, rows, kinds=kinds, pairs=20, effective_only=effective_only)
    every = [difference(found, "iia", "b", kind) for kind in found.kinds]
    mean = difference(found, "iia", "b", ALL)
    assert mean.value == pytest.approx(sum(each.value for each in every) / 3)
    assert mean.high - mean.low < max(each.high - each.low for each in every)


def test_without_labels_agreement_is_told():
    teacher, (one, other), _ = couple("bert")
    found = compare(teacher, {"a": one, "b": other}, ACROSS, text(24, labels=False), pairs=30)
    assert found.find("accuracy", "a") is None
    assert found.discordance == {}
    assert "agreement with the teacher" in found.sentence or "answers as the teacher does on" in found.sentence


def test_real_valued_answers_have_errors():
    def network(seed):
        return spread(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)), seed)

    place = Location(module="2", dims=range(4))
    rows = Rows(
        {
            "inputs": vectors(30).table["inputs"],
            "labels": torch.randn(30, 1, generator=torch.Generator().manual_seed(0)),
        }
    )
    found = compare(network(0), {"far": network(1), "same": network(0)}, {place: place}, rows, pairs=60)
    assert value(found, "error", "same") == 0
    assert difference(found, "error", "same").value == -value(found, "error", "far") < 0
    assert found.find("effective", "same") is found.find("accuracy", "same") is None
    assert "same computes more like the teacher on the kind of interchange that was measured: error" in found.sentence
    found.plot()


def test_a_teacher_that_never_changes_its_answer():
    teacher, (one, other), rows = couple("bert")
    with torch.no_grad():
        teacher.classifier.weight.mul_(1e-3)
        teacher.classifier.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    found = compare(teacher, {"a": one, "b": other}, ACROSS, rows, pairs=30)
    assert "b cannot be said to compute more or less like the teacher, as no interchange changes" in found.sentence
    assert "as mapped: no interchange changed the teacher's answer." in found.notes
    found.plot()


@pytest.mark.parametrize("effective_only", [False, True])
def test_a_kind_without_figures_is_told(effective_only):
    teacher, (one, other), rows = couple("bert")
    with torch.no_grad():
        output = teacher.bert.encoder.layer[1].output.dense
        output.weight.mul_(1e-6)
        output.bias.zero_()
    kinds, mapping = {"mlp": Kind(Span(0.3, same=True), site="mlp_output")}, {Location(1): Location(1)}
    found = compare(teacher, {"a": one, "b": other}, mapping, rows, kinds=kinds, pairs=9, effective_only=effective_only)
    why = "no figures: no pair was found that changes" if effective_only else "no interchange changed"
    assert f"mlp: {why} the teacher's answer." in found.notes
    assert (found.find("iia", "b", "mlp") is None) == effective_only
    assert any("over the bases of effective pairs alone" in note for note in found.notes) == effective_only


TEACHER, (ONE, OTHER), ROWS = couple("bert")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"students": {"a": ONE}}, r"compare\(students=\['a'\]\) has 1 to compare; give at least two: students=\{"),
        ({"students": [ONE, OTHER]}, r"has no names for its table; write students=\{\"KD\": kd"),
        ({"students": {"a": ONE, "b": []}}, r"student 'b' has no run; give a network, or several"),
        ({"students": {"a": ONE, "b": 3}}, r"student 'b' is neither a network nor what fit returned: 3;"),
        ({"students": {"a": ONE, "b": bert(3, labels=5)}}, r"5"),
        ({"mapping": {"a": ACROSS}}, r"mapping names 'a' and not student 'b'; give one for each student"),
        (
            {"mapping": {"a": ACROSS, "b": {Location(1): Location(1)}}},
            r"different numbers of entries \(2 for 'a', 1 for 'b'\), which are matched by their place; give each",
        ),
        ({"data": None}, r"the teacher is a network and no data was given"),
        ({"teacher": SUM}, r"compare\(teacher=CausalModel\(…\)\) has no kinds of interchange"),
        ({"kinds": "none"}, r"are no kinds of interchange; use kinds='usual'"),
        ({"pairs": 0}, r"pairs=0 measures nothing"),
        (
            {"students": {"a": ONE, "b": trained(OTHER, [], SeenRows.of(ROWS.take(torch.arange(3)).table))}},
            r"the data holds rows that were trained on, 3 of the 24 \(first: row 0\); measure on others",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(settings, message):
    given = {"teacher": TEACHER, "students": {"a": ONE, "b": OTHER}, "mapping": ACROSS, "data": ROWS, "pairs": 9}
    with pytest.raises(DistillError, match=message) as refused:
        compare(**{**given, **settings})
    assert "\n" not in str(refused.value)


def test_sources_made_for_other_vocabularies_are_refused():
    kinds = {"context": Kind(sources=InContext(0.3))}
    wide = spread(bert(3, vocab_size=50), 1, 0.8)
    with pytest.raises(DistillError, match=r"kind 'context' makes sources of other tokens for each vocabulary, and"):
        compare(TEACHER, {"a": ONE, "b": wide}, ACROSS, ROWS, kinds=kinds, pairs=9)


def test_what_is_asked_of_a_comparison_and_is_not_in_it():
    found = compare(TEACHER, {"a": ONE, "b": OTHER}, ACROSS, ROWS, pairs=9)
    assert found.find("error", "a") is found.find("iia", "a", "no kind") is None
    with pytest.raises(DistillError, match=r"the comparison has no 'iou' of 'a'; its figures are accuracy, "):
        found.find("iou", "a")
    with pytest.raises(DistillError, match=r"has no 'iia' of 'c'; its figures are .* and its students a, b"):
        found.find("iia", "c")


def test_networks_without_layers():
    teacher, one, other = (spread(mlp(), seed) for seed in range(3))
    part = Location(module="2", dims=range(3))
    found = compare(teacher, {"a": one, "b": other}, {part: part}, vectors(30), kinds="usual", pairs=40)
    assert {"one token, same place", "half of the dims"} <= set(found.kinds)
    assert any("attention heads: not measured: " in note for note in found.notes)
