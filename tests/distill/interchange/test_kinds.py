import pytest
import torch

from distill import DistillError, InContext, Kind, Shuffle, Span
from distill.interchange.kinds import at_site, kinds_of
from distill.interchange.mapping import Entry
from interventions import Location
from interventions.locations import BLOCK_SITES, MODEL_SITES
from tests.distill.every_site import FAMILIES, at, exists
from tests.distill.tiny_models import mlp

MAPPED = (Entry((Location(0), Location(1)), (Location(0),)), Entry((Location(2),), (Location(1),)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", BLOCK_SITES)
def test_every_site_of_the_mapped_layers_or_an_error(family, site):
    make, stack = FAMILIES[family].make, FAMILIES[family].stack
    teacher, student = make(4), make(2)
    entries = (Entry((at(family, "block_output", 2),), (at(family, "block_output", 1),)),)
    if not exists(student, at(family, site)):
        with pytest.raises(DistillError, match=f"teacher has no {site} at"):
            at_site(entries, site, teacher, student)
        return
    (moved,) = at_site(entries, site, teacher, student)
    assert moved.teacher == (Location(2, site, stack=stack),)
    assert moved.student == (Location(1, site, stack=stack),)


def test_all_places_of_all_entries_move_and_lose_their_parts():
    teacher, student = FAMILIES["bert"].make(4), FAMILIES["bert"].make(2)
    parts = (Entry((Location(0, dims=range(4)), Location(1)), (Location(0, dims=range(4)),)), MAPPED[1])
    assert at_site(parts, "mlp_output", teacher, student) == (
        Entry((Location(0, "mlp_output"), Location(1, "mlp_output")), (Location(0, "mlp_output"),)),
        Entry((Location(2, "mlp_output"),), (Location(1, "mlp_output"),)),
    )


def test_a_kind_without_a_site_keeps_the_mapping():
    assert Kind().entries(MAPPED, None, None) is MAPPED
    teacher, student = FAMILIES["bert"].make(4), FAMILIES["bert"].make(2)
    found = Kind(site="attention_heads").entries(MAPPED, teacher, student)
    assert [str(each) for each in found] == [
        "attention_heads.0 + attention_heads.1 ↔ attention_heads.0",
        "attention_heads.2 ↔ attention_heads.1",
    ]


@pytest.mark.parametrize("place", [Location(module="classifier"), Location(site="embedding")])
def test_a_place_without_a_layer(place):
    model = FAMILIES["bert"].make(2)
    with pytest.raises(DistillError, match=r"of the teacher belongs to no layer, so it has no mlp_output; map layers:"):
        at_site([Entry((place,), (Location(0),))], "mlp_output", model, model)


def test_a_side_that_lacks_the_site_is_named():
    with pytest.raises(DistillError, match="the student has no attention_heads at"):
        at_site([Entry((Location(0),), (Location(0),))], "attention_heads", FAMILIES["bert"].make(2), mlp())
    with pytest.raises(DistillError, match="the teacher has no mlp_output at"):
        at_site([Entry((Location(0),), (Location(0),))], "mlp_output", mlp(), FAMILIES["bert"].make(2))


@pytest.mark.parametrize("site", [*MODEL_SITES, "heads"])
def test_no_site_of_a_layer(site):
    with pytest.raises(DistillError, match=rf"Kind\(site='{site}'\) is no site of a layer"):
        Kind(site=site)


@pytest.mark.parametrize("dims", [0.0, -0.5, 1.5])
def test_no_share_of_dims(dims):
    with pytest.raises(DistillError, match="is no share above 0 and up to 1"):
        Kind(dims=dims)


def test_no_rule():
    with pytest.raises(DistillError, match="draws no tokens; use positions=Span"):
        Kind(positions=Span)
    with pytest.raises(DistillError, match="draws no tokens"):
        Kind(positions=3)


def test_what_two_kinds_share_is_their_text():
    assert repr(Kind(Span(0.5))) == repr(Kind(Span(0.5), sources=Shuffle()))
    assert repr(Kind()) != repr(Kind(sources=InContext(0.3))) != repr(Kind(sources=InContext(0.5)))
    assert len({repr(Kind(site=site)) for site in (None, *BLOCK_SITES)}) == len(BLOCK_SITES) + 1
    assert repr(Kind(dims=0.5)) != repr(Kind())


def test_kinds_that_print_the_same_need_names():
    """Rules of sources print without their words, so two kinds may; neither takes the place of the other."""
    two = [Kind(sources=InContext(0.3, words=torch.tensor([word]))) for word in (7, 8)]
    with pytest.raises(DistillError, match="holds two kinds of one name, as they print the same; name them: {'first'"):
        kinds_of(two)
    assert kinds_of({"seven": two[0], "eight": two[1]}) == {"seven": two[0], "eight": two[1]}


@pytest.mark.parametrize("sources", [None, Shuffle, 0.3])
def test_what_draws_no_sources(sources):
    with pytest.raises(DistillError, match=r"sources=.* draws no sources; use sources=Shuffle\(\) or InContext\(0.3\)"):
        Kind(sources=sources)
