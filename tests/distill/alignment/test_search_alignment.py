"""A search: each cell is what would be measured, and learned, alone."""

import pytest
import torch
from rich.console import Console
from torch import nn

import distill
from distill import CausalModel, DistillError
from distill.evaluation import variable_accuracy
from interventions import Location, Rotation
from tests.distill.wired import SUM, TOKENS, TWICE, Reader, turned, twice

QUIET = Console(quiet=True)


def deep(seed=0):
    """Three places that run one after the other."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))


def test_whole_vectors_at_every_token_are_found_where_they_are():
    found = distill.search_alignment(TOKENS, Reader(), at=["module:hidden"], pairs=300)
    assert (found.variables, found.locations, found.positions) == (
        ("first", "last"),
        ("module:hidden",),
        ("first", "last"),
    )
    assert found.iia[0, 0, 0] == found.iia[1, 0, 1] == 1.0
    assert max(found.iia[0, 0, 1], found.iia[1, 0, 0]) < 0.7
    assert found.best.positions == {Location(module="hidden"): "last"} or found.best.iia == 1.0
    numbered = distill.search_alignment(TOKENS, Reader(), "first", ["module:hidden"], positions=[0, -1], pairs=300)
    assert numbered.positions == ("0", "-1")
    assert numbered.iia[0, 0].tolist() == found.iia[0, 0].tolist()


def test_a_cell_is_what_is_aligned_and_measured_alone():
    network, settings = deep(), dict(steps=15, batch_size=32, seed=3, console=QUIET)
    places = ["module:0", "module:1"]
    found = distill.search_alignment(
        SUM, network, ["inner", "c"], places, subspace=lambda: Rotation(2), pairs=200, **settings
    )
    assert found.iia.shape == (2, 2, 1)
    for i, name in enumerate(found.variables):
        for j, place in enumerate(places):
            mine = Location(module=place.removeprefix("module:"), subspace=Rotation(2))
            alone = distill.align(SUM, network, {name: mine}, pairs=200, **settings)
            learned = found.pairs[2 * i + j].student[0].subspace.reflections
            torch.testing.assert_close(learned, mine.subspace.reflections, rtol=1e-3, atol=1e-4)
            assert found.iia[i, j, 0] == pytest.approx(alone.iia, abs=0.02)


def test_the_best_is_an_alignment_with_its_figures():
    network = turned()
    found = distill.search_alignment(
        SUM,
        network,
        at=["module:hidden"],
        subspace=lambda: Rotation(1),
        steps=200,
        batch_size=64,
        lr=0.05,
        console=QUIET,
    )
    assert found.best.iia == float(found.iia.max()) == 1.0
    assert distill.interchange_accuracy(SUM, network, found.best, pairs=500).iia == 1.0


def test_it_prints_and_draws():
    found = distill.search_alignment(TOKENS, Reader(), at=["module:hidden"], pairs=50)
    head, first = str(found).splitlines()[:2]
    assert head.split() == ["first", "first", "last"]
    assert first.split()[:2] == ["module:hidden", "1.000"]
    labels = [text.get_text() for text in found.plot().axes[0].get_xticklabels()]
    assert labels == ["first @ first", "first @ last", "last @ first", "last @ last"]
    assert [t.get_text() for t in found.plot("last").axes[0].get_xticklabels()] == ["first", "last"]
    assert found.to_dict()["iia"][0][0][0] == 1.0
    with pytest.raises(DistillError, match=r"'frst' was not searched; plot one of first, last"):
        found.plot("frst")


def test_what_cannot_be_searched_says_why():
    with pytest.raises(DistillError, match=r"Sequential has no blocks that repeat; name the places"):
        distill.search_alignment(SUM, deep())
    with pytest.raises(DistillError, match=r"nothing to search: 1 variables × 0 locations"):
        distill.search_alignment(SUM, deep(), at=[])
    with pytest.raises(DistillError, match=r"'iner', which is no variable .*did you mean 'inner'"):
        distill.search_alignment(SUM, deep(), "iner", ["module:0"])
    with pytest.raises(DistillError, match=r"inner is aligned with all of module:0, and to swap that is to run the"):
        distill.search_alignment(SUM, deep(), at=["module:0"])
    with pytest.raises(DistillError, match=r"no position 'lst'.*did you mean 'last'"):
        distill.search_alignment(TOKENS, Reader(), at=["module:hidden"], positions=["lst"])
    with pytest.raises(DistillError, match=r"module 'hiden'|no module"):
        distill.search_alignment(TOKENS, Reader(), at=["module:hiden"])


def test_real_answers_have_errors():
    found = distill.search_alignment(TWICE, twice(), at=["module:0[dims=0]", "module:0[dims=1]"], pairs=50)
    assert found.iia.isnan().all()
    assert found.error[0, 0, 0] < 1e-5 < 0.2 < found.error[0, 1, 0]
    assert found.best["inner"] == (Location(module="0", dims=0),)
    assert found.plot().axes[1].get_ylabel().split() == "mean absolute error of inner".split()


def test_the_default_places_are_those_that_locations_mean():
    from transformers import T5Config, T5ForConditionalGeneration

    for encoder, decoder in ((3, 2), (2, 3)):
        config = T5Config(
            vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_heads=2, num_layers=encoder, num_decoder_layers=decoder,
            decoder_start_token_id=0,
        )  # fmt: skip
        network = T5ForConditionalGeneration(config).eval()
        found = distill.search_alignment(_translated(), network, positions=[-1], pairs=20)
        assert found.locations == tuple(f"block_output.{i}" for i in range(decoder))


def _translated():
    def encode(values):
        ids = torch.stack([values["a"], values["b"]], 1)
        return {"input_ids": ids, "decoder_input_ids": ids}

    return CausalModel(
        {"a": range(8), "b": range(8)}, {"inner": lambda a: a + 0, "answer": lambda inner, b: inner > b}, "answer",
        encode=encode, decode=lambda logits, values: logits[:, -1, :2],
    )  # fmt: skip


def test_a_subspace_is_made_for_every_cell():
    one = Rotation(1)
    with pytest.raises(
        DistillError, match=r"gave one object twice; make a new one in each call: lambda: Rotation\(8\)"
    ):
        distill.search_alignment(SUM, deep(), at=["module:0", "module:1"], subspace=lambda: one, steps=1, console=QUIET)
    with pytest.raises(DistillError, match=r"would be shared by all cells; give a function that makes one"):
        distill.search_alignment(SUM, deep(), at=["module:0"], subspace=one)


def test_one_name_or_place_will_do():
    found = distill.search_alignment(TOKENS, Reader(), "first", "module:hidden", positions="first", pairs=50)
    assert found.iia.tolist() == [[[1.0]]]
    both = distill.search_alignment(
        TOKENS, Reader(), [("first", "last")], Location(module="hidden"), positions=[-1], pairs=50
    )
    assert both.variables == ("first+last",)
    assert "first+last" in str(both)


def test_a_place_runs_once_for_all_variables(monkeypatch):
    """What a network answers after an interchange does not depend on the variable that it is compared with."""
    calls, places = [], ["module:hidden"]
    swapped = variable_accuracy.swapped
    monkeypatch.setattr(variable_accuracy, "swapped", lambda *given: calls.append(given[2]) or swapped(*given))
    found = distill.search_alignment(TOKENS, Reader(), ["first", "last"], places, positions=[0, -1], pairs=300)
    assert len(calls) == 2  # two positions
    calls.clear()
    for number, name in enumerate(found.variables):
        alone = distill.search_alignment(TOKENS, Reader(), name, places, positions=[0, -1], pairs=300)
        assert alone.outcomes == found.outcomes[2 * number : 2 * number + 2]
    assert len(calls) == 2 * 2


@pytest.mark.parametrize("variables", ["first", ["first", "last"]])
def test_runs_do_not_grow_with_the_cells_but_for_one_a_place(variables):
    """Two that show whether a place is everything, one that shows how many pairs fit, base and source of the pairs."""
    network, runs = Reader(), []
    for positions in ([0], [0, -1], [0, 1, -1]):
        runs.clear()
        handle = network.register_forward_hook(lambda *given: runs.append(given))
        distill.search_alignment(TOKENS, network, variables, ["module:hidden"], positions=positions, pairs=100)
        handle.remove()
        assert len(runs) == 2 + 1 + 2 + len(positions)
