"""Which entries can be seen: held to what interchange accuracy leaves out, over families, sites and rules."""

import pytest
import torch

from distill import Answer, InContext, Kind, Scattered, Shuffle, Span, interchange_accuracy
from distill.errors import NothingToMeasure
from distill.interchange.answer import resolved
from distill.interchange.mapping import Entry, entries_of
from distill.interchange.visible_kinds import can_be_seen
from interventions import Location
from tests.distill.every_site import FAMILIES, SITES, at
from tests.distill.test_every_site import cases, couple
from tests.distill.tiny_models import bert, gpt2, gpt2_lm, llama, mlp, spread, text, vectors, vit

RULES = [Span(0.3), Scattered(1), Answer(), None]


def seen(teacher, student, mapping, rule, rows, *, sources=None, has_source=True):
    batch = rows.batch(range(min(8, len(rows))))
    kind = Kind(resolved(rule, student, batch), sources=sources or Shuffle())
    choices = [(kind, entry) for entry in entries_of(mapping, teacher, student)]
    return can_be_seen(choices, teacher, student, batch, has_source=has_source)


def ruled():
    """Every site of every family with one rule, so that each site, and each family, is there with every rule."""
    families = ("bert", "gpt2", "vit", "t5")
    return [
        pytest.param(family, site, rule, id=f"{family}-{site}-{rule!r}")
        for family, site in cases(*families)
        for rule in [RULES[(families.index(family) + SITES.index(site)) % len(RULES)]]
        if site != "logits"  # nothing is computed behind it
    ]


@pytest.mark.parametrize(("family", "site", "rule"), ruled())
def test_what_can_be_seen_is_what_interchange_accuracy_does_not_leave_out(family, site, rule):
    teacher, student = couple(family)
    rows = FAMILIES[family].data(8, even=True)
    for layer in (1, 2) if site not in ("embedding", "final_norm") else (1,):
        mapping = {at(family, site, layer): at(family, site, layer - 1)}
        try:
            found = bool(interchange_accuracy(teacher, student, mapping, rows, pairs=16, positions=rule).overall.count)
        except NothingToMeasure:
            found = False
        assert seen(teacher, student, mapping, rule, rows) == [found], (layer, mapping)


@pytest.mark.parametrize(
    ("make", "found"), [(bert, [True, True, False]), (gpt2, [True, True, False]), (vit, [True, True, False]),
                        (gpt2_lm, [True, True, True]), (llama, [True, True, True])],
)  # fmt: skip
@pytest.mark.parametrize("rule", RULES[:3], ids=repr)
def test_the_last_block_of_a_head_that_reads_one_token(make, found, rule):
    """Where every token answers, a span at the last block changes some of the answers and leaves the others."""
    teacher, student = spread(make(6), 0, 0.5), spread(make(3), 1, 0.5)
    rows = FAMILIES["vit"].data(8) if make is vit else text(8, 5, labels=False)
    assert seen(teacher, student, "full", rule, rows) == found
    if make is not vit:
        assert seen(teacher, student, "full", rule, rows, sources=InContext(0.4)) == found


def test_random_values_are_no_source():
    """Noise at all that is read is not the answer to a source; noise where nothing is read is not seen."""
    teacher, student = spread(bert(6), 0, 0.5), spread(bert(3), 1, 0.5)
    rows = text(8, 5, labels=False)
    assert seen(teacher, student, "full", None, rows, has_source=False) == [True] * 3
    assert seen(teacher, student, "full", Answer(1), rows, has_source=False) == [True, True, False]
    assert seen(teacher, student, "full", None, rows) == [False] * 3


def test_without_positions_a_layer_is_all_that_is_read():
    teacher, student, rows = mlp(8), mlp(8), vectors(8)
    mapping = {Location(module="1"): Location(module="1"), Location(module="1", dims=range(4)): Location(module="3")}
    assert seen(teacher, student, mapping, Span(0.3), rows) == [False, False]
    part = {Location(module="1", dims=range(4)): Location(module="1", dims=range(4))}
    assert seen(teacher, student, part, Span(0.3), rows) == [True]


def test_what_starts_at_zero_may_be_used_later():
    """An attention that the student does not use yet counts as used; the teacher's, which it never uses, does not."""
    teacher, student, rows = spread(bert(4), 0, 0.5), spread(bert(2), 1, 0.5), text(8, 5, labels=False)
    mapping = {Location(1, "attention_heads"): Location(0, "attention_heads")}
    for model, layer, wanted in ((student, 0, True), (teacher, 1, False)):
        with torch.no_grad():
            model.bert.encoder.layer[layer].attention.output.dense.weight.zero_()
        assert seen(teacher, student, mapping, Span(0.3), rows) == [wanted]


def test_a_teacher_that_is_left_out_decides_nothing():
    teacher, student, batch = spread(bert(4), 0, 0.5), spread(bert(2), 1, 0.5), text(8, 5, labels=False).batch(range(8))
    choices = [(Kind(), Entry((Location(3),), (Location(0),))), (Kind(), Entry((Location(0),), (Location(1),)))]
    assert can_be_seen(choices, teacher, student, batch) == [False, False]
    assert can_be_seen(choices, None, student, batch) == [True, False]


def test_nothing_is_drawn_from_the_generators_of_the_caller():
    teacher, student, rows = spread(bert(4, dropout=0.5), 0, 0.5), bert(2, dropout=0.5).train(), text(8, 5)
    before = torch.random.get_rng_state()
    seen(teacher, student, "full", Span(0.3), rows)
    assert torch.equal(before, torch.random.get_rng_state())
    assert student.training
    assert all(parameter.grad is None for parameter in (*teacher.parameters(), *student.parameters()))
