"""The search for a mapping between two networks: copied and planted blocks are found, each cell is what is measured
alone, and the cost is that of all places, not of all pairs of them."""

import pytest
import torch
from torch import nn

from distill import DistillError, InContext, Kind, Served, Span, from_layers, interchange_accuracy, search_mapping
from distill.errors import NothingToMeasure
from distill.interchange.mapping import as_mapping, entries_of, parse_mapping
from interventions import Location
from tests.distill.tiny_models import (
    CNN,
    LSTM,
    batch_of,
    bert,
    gpt2,
    gpt2_lm,
    images,
    llama,
    masked_lm,
    mlp,
    same,
    spread,
    t5,
    text,
    vectors,
    vit,
    weights,
)
from tests.distill.wired import SUM

SAME = Span(0.3, same=True)
MODULUS = 5


class Part(nn.Module):
    """A block that returns what it receives."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.inner.weight)

    def forward(self, x):
        return self.inner(x)


class Adder(nn.Module):
    """Adds its inputs, modulo 5: block i holds the sum of the first `counts[i]` of them."""

    def __init__(self, *counts: int) -> None:
        super().__init__()
        self.counts, self.parts = counts, nn.ModuleList([Part() for _ in counts])

    def forward(self, inputs):
        state, done = torch.zeros(len(inputs), 1), 0
        for part, count in zip(self.parts, self.counts, strict=True):
            state, done = part(state + inputs[:, done:count].sum(1, keepdim=True)), count
        total = state + inputs[:, done:].sum(1, keepdim=True)
        return 20 * (2 * torch.pi / MODULUS * (total - torch.arange(float(MODULUS)))).cos()


def numbers(rows=200, width=4):
    draw = torch.Generator().manual_seed(0)
    return {"inputs": torch.randint(0, MODULUS, (rows, width), generator=draw).float()}


def still(model, *layers):
    """The model with blocks that return what they receive, as all that they add is 0."""
    with torch.no_grad():
        for layer in layers:
            block = model.vit.layers[layer] if hasattr(model, "vit") else model.transformer.h[layer]
            last = {"vit": ("attention.o_proj", "mlp.fc2"), "transformer": ("attn.c_proj", "mlp.c_proj")}
            for path in last["vit" if hasattr(model, "vit") else "transformer"]:
                for parameter in block.get_submodule(path).parameters():
                    parameter.zero_()
    return model


def rows_of(make):
    if make in (vit, CNN):
        return images(24)
    if make is mlp:
        return vectors(24)
    if make is t5:
        return batch_of(t5, 24)
    return text(24, labels=make not in (gpt2_lm, llama, masked_lm))


@pytest.mark.parametrize(
    ("above", "below", "mapping"),
    [
        ((1, 2, 3), (1, 2, 3), {0: [0], 1: [1], 2: [2]}),
        ((1, 2, 3), (2, 3), {1: [0], 2: [1]}),
        ((1, 1, 2, 2, 3), (1, 3), {0: [0], 4: [1]}),
        ((1, 3), (1, 1, 3, 3), {0: [0, 1], 1: [2, 3]}),
    ],
)
def test_a_planted_mapping_is_found(above, below, mapping):
    found = search_mapping(Adder(*above), Adder(*below), numbers(), pairs=400)
    assert found.mapping == {(Location(i),): tuple(map(Location, side)) for i, side in mapping.items()}
    effective, iia = found.grid(), found.grid("iia")
    for j, own in enumerate(below):
        for i, theirs in enumerate(above):
            if own == theirs:
                assert effective[j, i] == iia[j, i] == found.grid("normalized")[j, i] == 1.0
            else:  # the sums differ in an input of the base or of the source, which is alike in one of five
                assert effective[j, i] < 0.4
                assert iia[j, i] < 0.4
    for control in ("network", "labels"):
        assert float(found.grid(control=control).max()) < 0.5
    assert found.notes == ()


@pytest.mark.parametrize("make", [vit, gpt2])
def test_a_student_of_copied_blocks_has_those_blocks(make):
    teacher = still(spread(make(6), 3, 0.8), 1, 3)
    rows = images(60) if make is vit else text(60, shortest=4, side="left")
    shallow = from_layers(teacher, [0, 2, 4, 5])
    found = search_mapping(teacher, shallow, rows, pairs=150, controls=())
    assert found.mapping == {(Location(i),): (Location(j),) for i, j in ((0, 0), (2, 1), (4, 2))}
    assert all(value == 1.0 for value in (found.grid()[0, 0], found.grid()[0, 1], found.grid()[1, 3]))
    other_way = search_mapping(shallow, teacher, rows, pairs=150, controls=())
    assert other_way.mapping == {
        (Location(0),): (Location(0), Location(1)),
        (Location(1),): (Location(2), Location(3)),
        (Location(2),): (Location(4),),
    }
    torch.testing.assert_close(other_way.grid("iia"), found.grid("iia").T, equal_nan=True)


@pytest.mark.parametrize("make", [vit, bert, pytest.param(gpt2_lm, marks=pytest.mark.full)])
def test_a_cell_is_what_is_measured_alone(make):
    teacher, student, rows = spread(make(4), 3, 0.8), spread(make(2), 13, 0.8), rows_of(make)
    kinds = {"same": Kind(SAME), "mlp": Kind(Span(0.5), site="mlp_output"), "text": Kind(SAME, sources=InContext(0.5))}
    if make is vit:
        del kinds["text"]
    settings = dict(pairs=40, seed=5)
    found = search_mapping(teacher, student, rows, kinds=kinds, controls="all", **settings)
    for name, kind in kinds.items():
        site, compared = kind.site or "block_output", 0
        for i, j in ((0, 0), (2, 1), (3, 1)):
            entry = {Location(i, site): Location(j, site)}
            rule = dict(positions=kind.positions, sources=kind.sources, controls=["labels", "network"])
            cell = found.kinds[name][Location(i, site), Location(j, site)]
            try:
                alone = interchange_accuracy(teacher, student, entry, rows, **rule, **settings)
            except NothingToMeasure:
                assert cell.count == 0
                continue
            compared += 1
            figures = {cell: alone.overall}
            for control in ("labels", "network"):
                figures[found.controls[control][name][Location(i, site), Location(j, site)]] = alone.controls[control]
            for here, there in figures.items():
                assert (here.iia, here.effective_iia, here.effect_rate) == (
                    there.iia, there.effective_iia, there.effect_rate
                )  # fmt: skip
                assert (here.count, here.left_out, here.do_nothing) == (there.count, there.left_out, there.do_nothing)
                assert here.kl == pytest.approx(there.kl, rel=1e-4)
        assert compared


@pytest.mark.parametrize("make", [vit, text, pytest.param(gpt2_lm, marks=pytest.mark.full)])
def test_figures_do_not_depend_on_the_batch_size(make):
    make = bert if make is text else make
    teacher, student, rows = spread(make(3), 3, 0.8), spread(make(2), 13, 0.8), rows_of(make)
    one, other = (
        search_mapping(teacher, student, rows, kinds=[Kind(SAME), Kind(Span(0.5, consecutive=False))], pairs=30,
                       batch_size=size)
        for size in (7, 30)
    )  # fmt: skip
    for figure in ("iia", "effective", "effect_rate", "do_nothing"):
        for kind in one.kinds:
            assert torch.equal(one.grid(figure, kind).nan_to_num(-1), other.grid(figure, kind).nan_to_num(-1))
    assert one.mapping == other.mapping


class Counter:
    """Counts the calls of a model, and of a part of each of its blocks."""

    def __init__(self, model, blocks):
        self.model = self.blocks = 0
        model.register_forward_hook(self.called("model"))
        for block in blocks:
            block.register_forward_hook(self.called("blocks"))

    def called(self, name):
        def count(*_):
            setattr(self, name, getattr(self, name) + 1)

        return count


@pytest.mark.parametrize("visible", [True, False])
def test_the_cost_is_that_of_the_places_and_not_of_their_pairs(visible):
    """A batch more is, for a network of L blocks, two runs and L counterfactuals, which resume at their block."""

    def counted(batches, kinds):
        if visible:
            models, rows = (Adder(1, 2, 3, 4, 5), Adder(1, 3, 5)), numbers(width=6)
            parts = [[part.inner for part in model.parts] for model in models]
        else:
            models, rows = (spread(vit(5), 3), spread(vit(3), 4)), images(24)
            parts = [[block.mlp.fc1 for block in model.vit.layers] for model in models]
        counters = [Counter(*each) for each in zip(models, parts, strict=True)]
        rules = [Kind(SAME), Kind(Span(0.5, same=True))][:kinds]
        search_mapping(*models, rows, kinds=rules, pairs=20 * batches, batch_size=20, controls=())
        return [(counter.model, counter.blocks) for counter in counters]

    runs = 2 if visible else 3  # an answer that depends on one token: gradients of the head show on which
    for kinds in (1, 2):
        for deep, after, before in zip((5, 3), counted(2, kinds), counted(1, kinds), strict=True):
            assert after[0] - before[0] == runs + kinds * deep
            assert after[1] - before[1] == 2 * deep + kinds * deep * (deep - 1) // 2


@pytest.mark.parametrize("make", [bert, vit, gpt2, gpt2_lm, masked_lm, llama, t5])
def test_every_family_of_models_with_blocks(make):
    teacher, student, rows = spread(make(3), 1), spread(make(2), 2), rows_of(make)
    kept, modes = [weights(each) for each in (teacher, student)], (teacher.training, student.train().training)
    found = search_mapping(teacher, student, rows, kinds=[Kind(SAME), Kind(SAME, site="mlp_output")], pairs=30)
    assert len(found.kinds) == 2
    for cells in found.kinds.values():
        assert (len(cells.teacher), len(cells.student)) == (3, 2)
    mapping = found.mapping
    assert mapping
    assert as_mapping(entries_of(mapping, teacher, student)) == mapping
    assert interchange_accuracy(teacher, student, mapping, rows, pairs=10).overall.count
    assert (teacher.training, student.training) == modes
    assert all(same(weights(each), before) for each, before in zip((teacher, student), kept, strict=True))
    for model in (teacher, student):
        assert all(not (each._forward_hooks or each._forward_pre_hooks) for each in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())


def test_a_served_teacher_gives_the_same_figures():
    teacher, student, rows = spread(bert(3), 3, 0.8), spread(bert(2), 13, 0.8), rows_of(bert)
    settings = dict(kinds=[Kind(SAME), Kind(SAME, site="mlp_output")], pairs=30, controls="labels")
    here, there = (search_mapping(each, student, rows, **settings) for each in (teacher, Served(teacher)))
    assert here.to_dict()["mapping"] == there.to_dict()["mapping"]
    for kind in here.kinds:
        for control in (None, "labels"):
            one, other = (found.grid("iia", kind, control).nan_to_num(-1) for found in (here, there))
            assert torch.equal(one, other)


def test_the_usual_kinds_are_searched_as_far_as_the_models_have_them():
    found = search_mapping(spread(vit(3), 3, 0.8), spread(vit(2), 4, 0.8), images(24), kinds="usual", pairs=20)
    assert list(found.kinds) == [
        "one token, same place", "two tokens, same places", "answering token", "attention heads", "mlp output",
        "half of the dims",
    ]  # fmt: skip
    assert found.kinds["half of the dims"].teacher[0] == Location(0, dims=range(8))
    assert list(found.settings["kinds"]) == list(found.kinds)


def test_real_valued_answers_are_searched_by_their_error():
    teacher = spread(bert(3, labels=1), 3, 0.8)
    found = search_mapping(teacher, teacher, text(24), pairs=40, controls=())
    assert torch.equal(found.grid("error").diagonal()[:2], torch.zeros(2).double())
    assert found.mapping == {(Location(0),): (Location(0),), (Location(1),): (Location(1),)}
    assert "mean absolute error" in str(found)


def test_networks_without_blocks_are_searched_at_named_places():
    teacher, student = spread(mlp(), 1, 1.0), spread(mlp(12), 2, 1.0)
    places = (["module:0[dims=0:4]", "module:2[dims=0:4]"], [Location(module="0", dims=range(6))])
    found = search_mapping(teacher, student, vectors(40), places=places, pairs=100)
    assert found.grid().shape == (1, 2)
    assert list(found.mapping.values()) == [(Location(module="0", dims=range(6)),)]


def test_a_vacuous_last_pair_is_marked_and_not_chosen():
    model = spread(vit(3), 3, 0.8)
    found = search_mapping(model, model, images(40), pairs=60, controls=())
    assert found.grid("iia")[2].isnan().all()
    assert found.grid("iia")[:, 2].isnan().all()
    assert found.kinds["block_output"][Location(2), Location(2)].left_out == 60
    assert found.mapping == {(Location(0),): (Location(0),), (Location(1),): (Location(1),)}
    assert found.notes == (
        "block_output.2 of the student has no entry: each of its interchanges replaces all that an answer can see, or "
        "nothing that it can see.",
    )
    assert str(found).count("×") == 5


def test_places_of_other_positions_are_never_compared():
    teacher, rows = spread(t5(2), 1), batch_of(t5, 24)
    places = ["encoder/block_output.0", "decoder/block_output.0"]
    found = search_mapping(teacher, teacher, rows, places=(places, places), pairs=40, controls=())
    iia = found.grid("iia")
    assert (iia[0, 0], iia[1, 1]) == (1.0, 1.0)
    assert iia[0, 1].isnan()
    assert iia[1, 0].isnan()


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"teacher": SUM}, r"places of two networks.*search_alignment\(causal_model, network\)"),
        ({"teacher": LSTM()}, r"the teacher, LSTM, has no blocks that repeat; name the places of both: .*places="),
        ({"student": CNN()}, r"the student, CNN, has no blocks that repeat; name the places of both: .*places="),
        ({"kinds": "mlp_output"}, r"kinds='mlp_output' are no kinds of interchange; use kinds='usual', or \{"),
        ({"kinds": []}, r"kinds=\[\]\) has no kind of interchange; leave kinds out"),
        (
            {"teacher": Adder(1), "student": Adder(1), "data": numbers(), "kinds": Kind(SAME, site="mlp_output")},
            "the teacher has no mlp_output at block_output.0",
        ),
        ({"places": [Location(0)]}, r"names no places of a teacher and of a student; give two lists"),
        ({"places": ([Location(0)], [])}, r"names no places of a teacher and of a student; give two lists"),
        ({"places": ([Location(0)], [Location(0)] * 2)}, "names a place of the student twice; name each once"),
        ({"pairs": 0}, r"pairs=0 measures nothing; use e\.g\. pairs=2000"),
        ({"controls": "subspace"}, r"no control 'subspace'; controls are network, labels, or controls=\(\)"),
        ({"data": {"pixel_values": torch.zeros(1, 1, 8, 8)}}, "at least 2 rows to pair, and the data has 1"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line(given, problem):
    settings = {"teacher": vit(2), "student": vit(2), "data": images(8), "pairs": 8} | given
    with pytest.raises(DistillError, match=problem) as error:
        search_mapping(**settings)
    assert "\n" not in str(error.value)


def test_where_nothing_can_be_measured_that_is_said():
    with pytest.raises(NothingToMeasure, match=r"every interchange of every pair of places replaces all .*places="):
        search_mapping(vit(1), vit(1), images(8), pairs=8)


def test_the_mapping_as_text_is_read_back():
    found = search_mapping(Adder(1, 3), Adder(1, 1, 3), numbers(), pairs=100, controls=())
    written = found.to_dict()["mapping"]
    assert written == "block_output.0~block_output.0+block_output.1 block_output.1~block_output.2"
    assert parse_mapping(written) == found.mapping
