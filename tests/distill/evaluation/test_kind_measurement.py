"""Several kinds of interchange in one pass: each is what it is alone."""

import copy

import pytest
import torch
from torch import nn

from distill import DIITO, KD, DistillError, InContext, Kind, Rows, Scattered, Shuffle, Span, fit, interchange_accuracy
from distill.errors import NothingToMeasure
from distill.evaluation.interchange_accuracy import MAPPED
from distill.interchange.kinds import usual_kinds
from interventions import Location
from tests.distill.every_site import FAMILIES
from tests.distill.tiny_models import QUIET, bert, gpt2, images, mlp, spread, text, vectors, vit
from tests.distill.wired import Wired

MAPPING = {(Location(0), Location(1)): Location(0), Location(2): Location(1)}
KINDS = {
    "one": Kind(Scattered(1)), "heads": Kind(site="attention_heads"), "half": Kind(Span(0.5), dims=0.5),
    "context": Kind(sources=InContext(0.4)), "mlp": Kind(Scattered(2), site="mlp_output", sources=InContext(0.4)),
}  # fmt: skip


def couple(make, **settings):
    return spread(make(4, **settings), 3, 0.8), spread(make(3, **settings), 13, 0.8)


def measured(make=bert, rows=None, pairs=30, **settings):
    return interchange_accuracy(*couple(make), MAPPING, text(14) if rows is None else rows, pairs=pairs, **settings)


def figures(accuracy):
    return accuracy.overall, accuracy.per_pair


def test_a_kind_among_others_is_the_kind_alone():
    """Runs are shared between kinds, draws are not: the same bits, whichever are measured beside."""
    found = measured(kinds=KINDS)
    assert figures(found) == figures(measured())
    for name, kind in KINDS.items():
        assert figures(found.kinds[name]) == figures(measured(kinds=[kind]).kinds[repr(kind)]), name
    assert figures(found.kinds["one"]) == figures(measured(positions=Scattered(1)))
    assert figures(found.kinds["context"]) == figures(measured(sources=InContext(0.4)))


def test_effective_pairs_of_a_kind_are_those_of_the_kind_alone():
    """The same bits: each kind is measured on its own pairs, however many others are."""
    settings = {"effective_only": True, "pairs": 12}
    found = measured(kinds=KINDS, **settings)
    assert figures(found) == figures(measured(**settings))
    for name, kind in KINDS.items():
        alone = measured(kinds=[kind], **settings).kinds[repr(kind)]
        assert figures(found.kinds[name]) == figures(alone), name


@pytest.mark.parametrize("effective_only", [False, pytest.param(True, marks=pytest.mark.full)])
def test_figures_do_not_depend_on_the_batch_size(effective_only):
    """With 512 rounds of tries are tried together, with 7 one after the other."""
    settings = {"kinds": KINDS, "effective_only": effective_only, "pairs": 12 if effective_only else 30, "seed": 3}
    small, large = (measured(batch_size=size, **settings) for size in (7, 512))
    for name, one in {"": small, **small.kinds}.items():
        other = large.kinds[name] if name else large
        for field in ("iia", "effect_rate", "effective", "do_nothing", "replace_all", "count", "left_out", "tried"):
            assert getattr(one.overall, field) == getattr(other.overall, field), (name, field)
        assert one.overall.correlation == pytest.approx(other.overall.correlation, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_usual_kinds_of_every_family(family):
    """Each usual kind is measured, or the result says why it is not."""
    make, rows = FAMILIES[family].make, FAMILIES[family].data(14)
    teacher, student = spread(make(4), 3, 0.8), spread(make(3), 13, 0.8)
    stack = FAMILIES[family].stack
    mapping = {Location(1, stack=stack): Location(1, stack=stack)}
    found = interchange_accuracy(teacher, student, mapping, rows, pairs=12, kinds="usual")
    missing = found.settings.get("missing", {})
    assert {*found.kinds, *missing} == {*usual_kinds()}
    assert {"one token, same place", "two tokens, same places", "mlp output", "half of the dims"} <= {*found.kinds}
    assert found.kinds["mlp output"].settings["site"] == "mlp_output"
    assert all(why for why in missing.values())
    assert all(each.overall.iia is None or 0 <= each.overall.iia.value <= 1 for each in found.kinds.values())
    assert str(found).count("not measured: ") == len(missing)


def test_where_there_are_no_tokens_the_kinds_about_them_measure_the_same():
    teacher, student = spread(mlp()), spread(mlp(), 1)
    part = Location(module="2", dims=range(3))
    kinds = {"half": Kind(dims=0.5), "one": Kind(Scattered(1))}
    found = interchange_accuracy(teacher, student, {part: part}, vectors(30), pairs=20, kinds=kinds)
    assert found.kinds["half"].per_pair.keys() == {"module:2[dims=0:4] ↔ module:2[dims=0:4]"}
    assert figures(found.kinds["one"]) == figures(found)


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 1.0])
def test_a_share_of_the_dims_of_each_side(share):
    teacher, student = spread(bert(4, width=32)), spread(bert(3), 1)
    kinds = {"dims": Kind(dims=share)}
    found = interchange_accuracy(teacher, student, {Location(1): Location(0)}, text(9), pairs=9, kinds=kinds)
    (name,) = found.kinds["dims"].per_pair
    wide, narrow = (max(1, int(width * share)) for width in (32, 16))
    places = [str(Location(layer, dims=range(n))) for layer, n in ((1, wide), (0, narrow))]
    assert name == " ↔ ".join(places)


def test_only_effective_pairs_are_measured():
    """The first pairs, of those that are tried in turn, whose interchange changes the teacher's answer."""
    every, found = measured(), measured(effective_only=True)
    assert found.overall.effect_rate == 1
    assert found.overall.effective == found.overall.iia
    for name, outcome in found.per_pair.items():
        assert outcome.count + outcome.left_out == 30
        assert outcome.tried >= 30
        rate = every.per_pair[name].effect_rate
        assert outcome.tried == pytest.approx(30 / rate, rel=0.5)
    assert found.overall.tried == sum(each.tried for each in found.per_pair.values())
    assert "pairs that change the teacher's answer, of" in found.notes[0]


def test_a_kind_without_an_effective_pair_has_no_figures():
    """Beside others that have some: all pairs were tried, and none is counted."""
    teacher, student = couple(bert)
    with torch.no_grad():
        output = teacher.bert.encoder.layer[1].output.dense
        output.weight.mul_(1e-6)
        output.bias.zero_()
    kinds, mapping = {"mlp": Kind(Span(0.3, same=True), site="mlp_output")}, {Location(1): Location(1)}
    found = interchange_accuracy(teacher, student, mapping, text(14), kinds=kinds, pairs=10, effective_only=True)
    assert found.overall.count > 0
    nothing = found.kinds["mlp"].overall
    assert (nothing.iia, nothing.effective, nothing.count, nothing.left_out, nothing.tried) == (None, None, 0, 0, 200)
    assert str(found)


def test_no_effective_pair_is_an_error_of_one_line():
    teacher, student = couple(bert)
    with torch.no_grad():
        teacher.classifier.weight.mul_(1e-4)
        teacher.classifier.bias.copy_(torch.tensor([9.0, 0.0, 0.0]))
    with pytest.raises(DistillError, match=r"found no pair that changes the teacher's answer among 600 tried; map"):
        interchange_accuracy(teacher, student, MAPPING, text(14), pairs=30, effective_only=True)


def test_where_too_few_effective_pairs_are_found_all_tries_are_counted():
    teacher, student = spread(bert(4), 3, 0.4), couple(bert)[1]
    kinds = {"dim": Kind(Scattered(1), dims=0.01)}
    found = interchange_accuracy(teacher, student, MAPPING, text(14), pairs=30, kinds=kinds, effective_only=True)
    counts = [(each.count + each.left_out, each.tried) for each in found.kinds["dim"].per_pair.values()]
    assert any(count < 30 and tried == 20 * 30 for count, tried in counts)
    assert all(count == 30 or tried == 20 * 30 for count, tried in counts)


def test_no_pair_is_looked_for_where_nothing_can_be_seen():
    """The last block of a classifier is read at one token: its entry is left out, and costs no tries."""
    mapping = {Location(1): Location(0), Location(3): Location(2)}
    found = interchange_accuracy(*couple(vit), mapping, images(14), pairs=30, effective_only=True)
    seen, void = found.per_pair.values()
    assert (seen.count + seen.left_out, void.count, void.left_out, void.tried) == (30, 0, 0, 0)
    assert found.overall.tried == seen.tried
    assert (
        "block_output.3 ↔ block_output.2: no interchange can be seen there, so no pair was looked for." in found.notes
    )
    with pytest.raises(DistillError, match="every write of this mapping replaces all that an output can see"):
        interchange_accuracy(*couple(vit), {Location(3): Location(2)}, images(14), pairs=9, effective_only=True)


@pytest.mark.parametrize("pairs", [1, 20])
def test_a_place_that_few_draws_reach_is_looked_at(pairs):
    """The feed-forward part of the last block is seen at [CLS] alone, so that one token of 16 is mostly none."""
    place, rule = Location(-1, "mlp_output"), Scattered(1)
    found = interchange_accuracy(*couple(bert), {place: place}, text(14, 16, 16), positions=rule, pairs=pairs,
                                 effective_only=True)  # fmt: skip
    assert found.overall.tried > pairs
    assert found.overall.count


@pytest.mark.parametrize("sources", [Shuffle(), InContext(0.4)])
def test_a_kind_without_effective_pairs_leaves_the_others_as_they_are(sources):
    teacher, student = couple(bert)
    with torch.no_grad():
        for block in teacher.bert.encoder.layer:
            for each in block.output.dense.parameters():
                each.zero_()
    kinds = {"dead": Kind(site="mlp_output", sources=sources), "two": Kind(Scattered(2))}
    settings = {"pairs": 10, "effective_only": True}
    found = interchange_accuracy(teacher, student, MAPPING, text(14), kinds=kinds, **settings)
    alone = interchange_accuracy(teacher, student, MAPPING, text(14), kinds={"two": kinds["two"]}, **settings)
    assert figures(found) == figures(alone)
    assert figures(found.kinds["two"]) == figures(alone.kinds["two"])
    dead = found.kinds["dead"].overall
    assert (dead.count, dead.left_out, dead.tried, dead.iia) == (0, 0, 2 * 20 * 10, None)
    assert "dead: none of 400 pairs that were tried changes the teacher's answer." in found.notes
    place, kinds = Location(1, "mlp_output"), {"blocks": Kind(site="block_output")}
    with pytest.raises(NothingToMeasure, match=r"found no pair that changes the teacher's answer among 200 tried"):
        interchange_accuracy(teacher, student, {place: place}, text(14), kinds=kinds, **settings)


@pytest.mark.parametrize(("rows", "pairs"), [(3, 9), (9, 1)])
def test_few_rows_and_pairs(rows, pairs):
    """The usual kinds are all there, with as many pairs as were found."""
    found = interchange_accuracy(*couple(bert), {Location(1): Location(1)}, text(rows), pairs=pairs, kinds="usual",
                                 effective_only=True)  # fmt: skip
    assert {*found.kinds} == {*usual_kinds()}
    for each in (found, *found.kinds.values()):
        taken = each.overall.count + each.overall.left_out
        assert taken == pairs or (taken < pairs and each.overall.tried == 20 * pairs)
    assert str(found)


def test_real_values_have_no_effective_pairs():
    with pytest.raises(DistillError, match=r"takes pairs that change the class .* by real values; leave it out"):
        interchange_accuracy(*couple(bert, labels=1), MAPPING, text(14), pairs=9, effective_only=True)


def test_no_kind_takes_the_place_of_the_mapped_one():
    with pytest.raises(
        DistillError, match="kinds names a kind 'as mapped', as the places and rules .*; give it another"
    ):
        measured(kinds={MAPPED: Kind(site="mlp_output")})


def test_a_kind_that_one_side_lacks_is_named():
    with pytest.raises(DistillError, match=r"kind 'context': InContext replaces tokens and this data has no input_ids"):
        interchange_accuracy(*couple(vit), MAPPING, images(14), pairs=9, kinds={"context": KINDS["context"]})
    teacher, student = spread(mlp()), spread(mlp(), 1)
    place = Location(module="2")
    with pytest.raises(DistillError, match="kind 'heads': module:2 of the teacher belongs to no layer, so it has no"):
        interchange_accuracy(teacher, student, {place: place}, vectors(30), pairs=9, kinds={"heads": KINDS["heads"]})


@pytest.mark.parametrize("kinds", [3, "heads", [Span(0.3)], {1: Kind()}, {"a": "b"}])
def test_what_is_no_kind(kinds):
    with pytest.raises(DistillError, match=r"are no kinds of interchange; use kinds='usual'"):
        measured(kinds=kinds)


def test_controls_are_those_of_the_mapped_kind():
    found = measured(kinds=KINDS, controls="labels")
    assert found.controls == measured(controls="labels").controls
    assert all(not each.controls for each in found.kinds.values())


@pytest.mark.parametrize("make", [bert, gpt2, vit])
def test_a_copy_of_the_teacher_is_right_at_every_kind(make):
    teacher = spread(make(3), 3, 0.8)
    rows = images(12) if make is vit else text(12)
    mapping = {Location(1): Location(1)}
    found = interchange_accuracy(teacher, copy.deepcopy(teacher), mapping, rows, pairs=20, kinds="usual")
    for each in (found, *found.kinds.values()):
        if each.overall.iia is None:
            continue
        assert each.iia == each.overall.agreement.value == 1
        assert each.overall.effective_iia in (1, None)
        assert each.overall.normalized is None or each.overall.normalized.value == 1
        assert each.overall.correlation is None or each.overall.correlation == pytest.approx(1)


@pytest.mark.parametrize("objective", [[KD(), DIITO(positions=Scattered(1))], [KD()]])
def test_the_result_of_a_training_says_which_kinds_were_trained_on(objective):
    teacher, student = couple(bert)
    rows = text(14)
    mapping = {Location(1): Location(0)}
    result = fit(
        teacher, student, mapping, text(20, seed=5), objective=objective, steps=1, eval_data=rows, console=QUIET
    )
    found = interchange_accuracy(teacher, student, mapping, rows, pairs=9, kinds=KINDS, exclude=result)
    trained = {name for name, each in found.kinds.items() if each.trained}
    assert trained == ({"one"} if len(objective) > 1 else set())
    assert found.trained is False
    assert {each.trained for each in found.kinds.values()} <= {True, False}
    assert measured().trained is None
    own = result.evaluation.interchange
    assert own.trained is (len(objective) > 1)  # measured as it was trained


class Ignoring(nn.Module):
    """Answers as `Wired` does, from a hidden state of its own: an interchange in `hidden` hardly touches its answer."""

    def __init__(self, touch: float = 1e-6) -> None:
        super().__init__()
        self.own, self.touch = Wired(), touch
        self.hidden = Wired().hidden

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.own(x) + self.touch * self.hidden(x)


class Constant(nn.Module):
    """Answers one class to everything."""

    def __init__(self, answer: int) -> None:
        super().__init__()
        self.hidden = Wired().hidden
        self.register_buffer("answer", 10 * nn.functional.one_hot(torch.tensor(answer), 3).float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.answer + 1e-6 * self.hidden(x)


def every_input():
    return Rows({"x": torch.cartesian_prod(*[torch.arange(3.0)] * 3)})


def outcomes(student):
    part = Location(module="hidden", dims=0)
    found = interchange_accuracy(
        Wired(), student, {part: part}, every_input(), pairs=400, kinds={"half": Kind(dims=0.5)}
    )
    return [found.overall, found.kinds["half"].overall]


def test_a_perfect_student():
    for outcome in outcomes(Wired()):
        figures = (outcome.iia.value, outcome.effective.value, outcome.normalized.value, outcome.agreement.value)
        assert figures == (1, 1, 1, 1)
        assert outcome.correlation == pytest.approx(1)
        assert outcome.kl == pytest.approx(0, abs=1e-6)


def test_a_student_that_ignores_interchanges():
    """It is right as often as doing nothing is, never where the answer changes, and agrees on every base."""
    for outcome in outcomes(Ignoring()):
        assert outcome.agreement.value == 1
        assert outcome.iia.value == outcome.do_nothing == pytest.approx(1 - outcome.effect_rate)
        assert outcome.effective.value == 0
        assert (outcome.normalized.value, outcome.normalized.low, outcome.normalized.high) == (0, 0, 0)


@pytest.mark.parametrize("answer", range(3))
def test_a_student_that_answers_one_class(answer):
    for outcome in outcomes(Constant(answer)):
        assert outcome.iia.value == outcome.do_nothing == outcome.replace_all
        assert outcome.iia.value == pytest.approx(1 / 3, abs=0.06)
        assert outcome.normalized.value == 0
        assert outcome.effective.value == pytest.approx(1 / 3, abs=0.09)


@pytest.mark.parametrize("part", [0, 1])
def test_a_student_that_is_wrong_in_one_part_is_wrong_there_alone(part):
    """Its part reacts to nothing, and what the other does is as in the teacher."""

    class Stuck(Wired):
        def forward(self, x):
            state, clean = self.hidden(x), nn.functional.linear(x, Wired().hidden.weight)
            kept = torch.where(torch.arange(3) == part, clean + 1e-6 * state, state)
            total = kept[:, 0] + kept[:, 1]
            return self.scale * (2 * torch.pi / 3 * (total[:, None] - torch.arange(3.0))).cos()

    mapping = {at: at for at in (Location(module="hidden", dims=0), Location(module="hidden", dims=1))}
    found = list(interchange_accuracy(Wired(), Stuck(), mapping, every_input(), pairs=400).per_pair.values())
    assert (found[part].effective.value, found[1 - part].effective.value) == (0, 1)
    assert (found[part].normalized.value, found[1 - part].normalized.value) == (0, 1)


def test_sources_are_made_of_tokens_that_both_networks_know():
    """A student with more token ids than its teacher is measured on those of the teacher."""
    teacher, student = spread(bert(4), 3, 0.8), spread(bert(3, vocab_size=400), 13, 0.8)
    found = interchange_accuracy(teacher, student, MAPPING, text(14), pairs=60, sources=InContext(0.9))
    assert found.overall.count > 0


def test_where_every_pair_is_effective_none_is_tried_in_vain():
    """Each row has a class of its own, in the dims that are swapped; the fifth dim stays that of the base."""
    network = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    with torch.no_grad():
        for layer in network:
            layer.weight.copy_(torch.eye(5))
            layer.bias.zero_()
    rows = Rows({"inputs": torch.cat([5 * torch.eye(4), torch.arange(4.0)[:, None] / 4], 1)})
    place = Location(module="0", dims=range(4))
    found = interchange_accuracy(network, copy.deepcopy(network), {place: place}, rows, pairs=30, effective_only=True)
    assert (found.overall.count, found.overall.tried, found.iia) == (30, 30, 1.0)
