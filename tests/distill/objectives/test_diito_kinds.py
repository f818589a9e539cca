"""DIITO over several kinds of interchange, and without the entries at which nothing can be seen."""

import copy
import warnings

import pytest
import torch

from distill import DIITO, KD, Answer, DistillError, InContext, Scattered, Served, Span, fit
from distill.interchange.kinds import at_site
from distill.interchange.mapping import entries_of
from distill.training.computation import Computation
from distill.training.fingerprints import of_objective
from interventions import Location, Noise
from tests.distill.tiny_models import QUIET, bert, gpt2_lm, same, spread, text, weights

INNER = {Location(0): Location(0), Location(1): Location(1)}


def couple(deep=3, shallow=3):
    return spread(bert(deep), 0, 0.5), spread(bert(shallow), 1, 0.5)


def trained(objective, mapping, *, make=bert, steps=4, teacher=None, **settings):
    """The weights of a student after some steps, and the losses."""
    above, student = spread(make(3), 0, 0.5), spread(make(3), 1, 0.5)
    rows = text(12, 5, 9, labels=False)
    result = fit(teacher or above, student, mapping, rows, objective=[KD(), objective], steps=steps, batch_size=4,
                 console=QUIET, **settings)  # fmt: skip
    return weights(student), [record.loss for record in result.records]


def step_of(objective, mapping):
    """A step on four rows, to draw from."""
    teacher, student = couple()
    computation = Computation(teacher, student, entries_of(mapping, teacher, student), [objective])
    return computation.step(text(4).batch(range(4)), torch.Generator().manual_seed(0))


# --- what cannot be seen ----------------------------------------------------------------------------------------------


def test_full_without_its_last_entry_is_the_mapping_without_it():
    """Bit for bit; the published draws are others, and a mapping that has nothing to drop has the same in both."""
    dropped, inner = trained(DIITO(), "full"), trained(DIITO(), INNER)
    kept = trained(DIITO(vacuous="keep"), "full")
    assert same(dropped[0], inner[0])
    assert dropped[1] == inner[1]
    assert kept[1] != dropped[1]
    assert same(trained(DIITO(vacuous="keep"), INNER)[0], inner[0])
    one = {Location(2): Location(2)}
    assert same(trained(DIITO(vacuous="keep"), one)[0], trained(DIITO(), one)[0])


def test_a_language_model_keeps_all_entries():
    assert same(*(trained(DIITO(vacuous=each), "full", make=gpt2_lm)[0] for each in ("drop", "keep")))


def test_what_is_dropped_is_said_and_never_drawn():
    objective = DIITO(positions=[Span(0.3), Answer()], at=["block_output", "mlp_output"])
    trained(objective, "full", steps=1)
    last = [(kind.site, str(entry)) for kind, entry in objective.dropped]
    assert last == [("block_output", "block_output.2 ↔ block_output.2")] * 2
    step = step_of(objective, "full")
    drawn = [objective._draw(step) for _ in range(300)]
    assert len({(repr(kind), str(entry)) for kind, entry in drawn}) == 2 * 5
    assert not any(choice in objective.dropped for choice in drawn)
    assert {kind.positions for kind, _ in drawn} == {Span(0.3), Answer(0)}


def test_where_nothing_at_all_can_be_seen_all_is_drawn_with_a_warning():
    mapping = {Location(2): Location(2), Location(2, dims=range(16)): Location(2, dims=range(16))}
    objective = DIITO()
    with pytest.warns(UserWarning, match=r"DIITO: no interchange of this mapping can be seen.*Map a block below"):
        found = trained(objective, mapping)
    assert objective.dropped == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(found[0], trained(DIITO(vacuous="keep"), mapping)[0])


def test_a_served_teacher_sends_nothing_more_and_draws_the_same():
    teacher = Served(spread(bert(3), 0, 0.5))
    assert trained(DIITO(), "full", teacher=teacher)[1] == pytest.approx(trained(DIITO(), "full")[1], rel=1e-5)


def test_noise_is_dropped_where_nothing_reads_it():
    objective = DIITO(op=Noise(1.0), positions=Answer(1))
    trained(objective, "full")
    assert [str(entry) for _, entry in objective.dropped] == ["block_output.2 ↔ block_output.2"]
    objective = DIITO(op=Noise(1.0))
    trained(objective, "full")
    assert objective.dropped == ()


# --- several kinds ----------------------------------------------------------------------------------------------------


def test_a_list_of_one_rule_at_the_places_of_the_mapping_changes_nothing():
    plain = trained(DIITO(positions=Span(0.4)), "full")
    assert same(plain[0], trained(DIITO(positions=[Span(0.4)]), "full")[0])
    assert same(plain[0], trained(DIITO(positions=Span(0.4), at="block_output"), "full")[0])


def test_at_replaces_the_sites_of_the_mapping():
    teacher, student = couple()
    entries = entries_of(INNER, teacher, student)
    for site in ("mlp_output", "attention_heads", "query", "attention_pattern"):
        moved = at_site(entries, site, teacher, student)
        assert same(trained(DIITO(at=[site]), INNER)[0], trained(DIITO(), {e.teacher: e.student for e in moved})[0])


def test_rules_sites_and_entries_are_drawn_equally_often():
    """3 rules × 2 sites × 2 entries: chi-squared of 12 counts below its 99.9 % quantile, 31.3."""
    objective = DIITO(positions=[Span(0.3), Scattered(), None], at=["block_output", "mlp_output"], vacuous="keep")
    step = step_of(objective, INNER)
    counts = {}
    for _ in range(2400):
        kind, entry = objective._draw(step)
        counts[repr(kind), entry] = counts.get((repr(kind), entry), 0) + 1
    assert len(counts) == 12
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 31.3


def test_the_kinds_that_are_trained():
    assert [repr(kind) for kind in DIITO(positions=[Scattered(2), Answer()], at="mlp_output").kinds] == [
        "Kind(Scattered(count=2, same=True, among='real'), site='mlp_output')",
        "Kind(Answer(token=None), site='mlp_output')",
    ]
    (kind,) = DIITO(InContext(0.3)).kinds
    assert (kind.positions, kind.site, kind.sources.share) == (Span(0.3), None, 0.3)
    assert DIITO(op=Noise(0.5)).kinds == ()
    objective = DIITO(positions=[Answer(), Span()])
    trained(objective, INNER)
    assert [each.positions for each in objective.kinds] == [Answer(), Span()]  # as asked


def test_reads_name_the_places_of_all_sites():
    teacher, student = couple()
    entries = entries_of({(Location(0), Location(1)): Location(0)}, teacher, student)
    found = DIITO(at=["block_output", "query", "mlp_output"]).reads(entries)
    assert found.student == (Location(0, "query"), Location(0, "mlp_output"))
    assert set(found.teacher) == {Location(i, site) for i in (0, 1) for site in ("query", "mlp_output")}


@pytest.mark.parametrize("sites", [["attention_heads", "block_output"], ["key"]])
def test_several_kinds_of_a_served_teacher(sites):
    settings = {"positions": [Span(0.4), Answer()], "at": sites}
    served = trained(DIITO(**settings), INNER, teacher=Served(spread(bert(3), 0, 0.5)))
    assert served[1] == pytest.approx(trained(DIITO(**settings), INNER)[1], rel=1e-4)


def test_what_is_written_down_of_the_settings():
    """Runs of before, which drew everything, have the text and so the settings of `vacuous="keep"`."""
    assert "at=" not in repr(DIITO(vacuous="keep"))
    assert "vacuous" not in repr(DIITO(vacuous="keep"))
    texts = [repr(each) for each in (
        DIITO(), DIITO(vacuous="keep"), DIITO(at="mlp_output"), DIITO(positions=[Span(0.3), Answer()]),
        DIITO(positions=[Span(0.3), Answer(0)]), DIITO(at=["mlp_output", "query"]),
    )]  # fmt: skip
    assert len(set(texts)) == len(texts)
    objective = DIITO(positions=[Span(0.3), Answer()])
    before = of_objective(objective)
    trained(objective, "full")
    assert objective.dropped
    assert of_objective(objective) == before == of_objective(copy.deepcopy(objective))


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"positions": []}, r"DIITO\(positions=\[\]\) interchanges nothing"),
        ({"at": "logits"}, r"Kind\(site='logits'\) is no site of a layer"),
        ({"vacuous": "weigh"}, r"DIITO\(vacuous='weigh'\): vacuous must be 'drop' or 'keep'"),
    ],
)
def test_what_is_refused(settings, refused):
    with pytest.raises(DistillError, match=refused):
        DIITO(**settings)
