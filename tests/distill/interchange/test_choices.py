import pytest

from distill import Answer, DistillError, InContext, Scattered, Shuffle, Span
from distill.interchange.choices import choices_of, kinds_of
from distill.interchange.mapping import Entry
from interventions import Location

MAPPED = (Entry((Location(0), Location(1)), (Location(0),)), Entry((Location(2),), (Location(1, dims=range(4)),)))


def test_every_rule_at_every_site_of_every_entry():
    sources = InContext(0.2)
    kinds = kinds_of("DIITO", [Span(0.3), None], ["block_output", "mlp_output"], sources)
    assert [(kind.positions, kind.site) for kind in kinds] == [
        (Span(0.3), "block_output"), (Span(0.3), "mlp_output"), (None, "block_output"), (None, "mlp_output"),
    ]  # fmt: skip
    assert all(kind.sources is sources for kind in kinds)
    choices = choices_of(kinds, MAPPED)
    assert len(choices) == 8
    assert [str(entry) for kind, entry in choices if kind is kinds[1]] == [
        "mlp_output.0 + mlp_output.1 ↔ mlp_output.0",
        "mlp_output.2 ↔ mlp_output.1",
    ]


def test_one_rule_at_the_places_of_the_mapping_is_the_mapping():
    for given in (Span(0.3), [Span(0.3)], (Span(0.3),)):
        (kind,) = kinds_of("DIITO", given, None, Shuffle())
        assert kind.positions == Span(0.3)
        assert choices_of([kind], MAPPED) == [(kind, entry) for entry in MAPPED]
    assert [kind.site for kind in kinds_of("DIITO", Answer(), "mlp_output", Shuffle())] == ["mlp_output"]


@pytest.mark.parametrize(
    ("positions", "at", "refused"),
    [
        ([], None, r"DIITO\(positions=\[\]\) interchanges nothing; use \[Span\(0.3\)\]"),
        (Span(), [], r"DIITO\(at=\[\]\) interchanges nothing; use at=None for the places of the mapping"),
        ([Span(), "CLS"], None, r"DIITO\(positions='CLS'\) draws no tokens; use positions=Span\(0.3\)"),
        ([Scattered, Span()], None, r"DIITO\(positions=.*Scattered.*\) draws no tokens"),
        (Span(), "mlp", r"Kind\(site='mlp'\) is no site of a layer"),
        (Span(), ["mlp_output", "embedding"], r"Kind\(site='embedding'\) is no site of a layer"),
    ],
)
def test_what_is_refused(positions, at, refused):
    with pytest.raises(DistillError, match=refused):
        kinds_of("DIITO", positions, at, Shuffle())
