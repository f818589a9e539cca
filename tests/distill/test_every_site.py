"""Interchanges between networks at every site of several families: DIITO and interchange accuracy against loops."""

import copy
from math import prod

import pytest
import torch

from distill import (
    DIITO,
    KD,
    Crossway,
    DistillError,
    InContext,
    Served,
    Shuffle,
    Span,
    interchange_accuracy,
    search_alignment,
)
from distill.data.seeds import seed_from
from distill.errors import NothingToMeasure
from distill.evaluation.drawn_positions import uniform
from distill.evaluation.example_pairs import examples_of_rows
from distill.interchange.attention_keys import KEYED, move_to_keys, over_keys
from distill.interchange.mapping import entries_of
from distill.interchange.random_vectors import Attended, narrow
from distill.losses import kd
from distill.models.inputs import answer_mask, inputs_of, real_tokens
from distill.training.computation import Computation
from interventions import Location, Mixup, Noise, Rotation, architecture, interchange, run
from interventions.locations import HEAD_SITES
from tests.distill.every_site import FAMILIES, SITES, at, exists
from tests.distill.tiny_models import VOCABULARY, bert, gpt2_lm, llama, spread, text

WHOLE = ("block_input", "block_output", "embedding", "final_norm", "logits")
SMALL = {family: of.make(2) for family, of in FAMILIES.items()}
CASES = [(family, site) for family, small in SMALL.items() for site in SITES if exists(small, at(family, site))]


def cases(*families):
    return [case for case in CASES if case[0] in families]


def couple(family):
    make = FAMILIES[family].make
    return spread(make(3), 0, 0.5), spread(make(2), 1, 0.5)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def term(teacher, student, mapping, objective, batch, seed=0):
    pairs = entries_of(mapping, teacher, student)
    return Computation(teacher, student, pairs, [objective])(batch, generator(seed))["kd_cf"]


def inputs(model, batch):
    return inputs_of(model, batch)


def by_hand(teacher, student, places, objective, batch):
    """The term of DIITO from plain calls of `interchange`, with the draws of the objective."""
    draws, rows = generator(), len(next(iter(batch.values())))
    torch.randint(1, (), generator=draws)
    drawn = None if objective.sources is None else objective.sources.draw(batch, VOCABULARY, draws)
    source = drawn if isinstance(drawn, dict) else batch
    if isinstance(drawn, torch.Tensor):
        source = {name: column[drawn] for name, column in batch.items()}
    shapes = [tuple(run(m, inputs(m, batch)).vectors(p).shape) for m, p in zip((teacher, student), places, strict=True)]
    written = read = None
    if len(shapes[0]) > 2 and objective.positions is not None:
        column = architecture(student).place(places[1]).mask
        real, other = (
            real_tokens(each, rows, shapes[0][1], torch.device("cpu"), column=column) for each in (batch, source)
        )
        uniform = torch.rand(rows, 2, shapes[0][1], generator=draws)
        aligned = objective.sources is None or objective.sources.aligned
        written, read = objective.positions.draw(real, other, uniform, aligned=aligned)
    logits, units = [], [shape[2:] if len(shape) > 2 else shape[1:] for shape in shapes]
    if objective.sources is None:
        count = (int(written.sum()),) if written is not None else shapes[0][: 2 if len(shapes[0]) > 2 else 1]
        normal = torch.randn(*count, max(map(prod, units)), generator=draws)
    for model, place, unit in zip((teacher, student), places, units, strict=True):
        if objective.sources is None:
            op = type(objective.op)(objective.op.sigma, normal=narrow(normal, prod(unit)).reshape(*count, *unit))
            if place.site == "attention_pattern":  # what is hidden stays hidden
                op = Attended(op)
            after = interchange(model, inputs(model, batch), None, {place: op}, positions=written, resume=False)
        else:
            given = inputs(model, source)
            if place.site in KEYED:  # in the columns of the base's keys
                here, there = (run(model, each, [place]) for each in (inputs(model, batch), given))
                given = over_keys(here, there, [place], batch, source)
            after = interchange(model, inputs(model, batch), given, place, positions=written, source_positions=read)
        logits.append(after.logits)
    mask = answer_mask(student, batch) if logits[0].ndim == 3 else None
    return kd(logits[1], logits[0], 2.0, mask=mask)


OBJECTIVES = {
    "shuffle": DIITO(positions=Span(0.4)),
    "all": DIITO(positions=Span(1.0)),
    "in-context": DIITO(InContext(0.5), positions=Span(0.5, consecutive=False)),
    "mixup": DIITO(op=Mixup(1.0), positions=Span(0.5)),
    "noise": DIITO(op=Noise(0.7), positions=None),
}


@pytest.mark.parametrize(("family", "site"), CASES)
def test_diito_is_what_interchanges_by_hand_give(family, site):
    teacher, student = couple(family)
    batch, places = FAMILIES[family].data(5).batch(range(5)), (at(family, site), at(family, site, 0))
    names = [name for name in OBJECTIVES if name != "in-context" or "input_ids" in batch]
    turn = CASES.index((family, site))
    for name in dict.fromkeys(("shuffle", names[1 + turn % (len(names) - 1)], "mixup")):
        objective = OBJECTIVES[name]
        found = term(teacher, student, {places[0]: places[1]}, objective, batch)
        expected = by_hand(teacher, student, places, objective, batch)
        assert found.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-7), name
        if name == "shuffle":
            found.backward()
            gradients = [p.grad for p in student.parameters() if p.grad is not None]
            assert gradients
            assert all(bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize(("family", "site"), cases("bert", "llama", "vit"))
def test_a_copy_of_the_teacher_loses_nothing_and_is_always_right(family, site):
    teacher, _ = couple(family)
    student, place = copy.deepcopy(teacher), at(family, site)
    rows = FAMILIES[family].data(8)
    for objective in (DIITO(Crossway(), positions=Span(0.5)), DIITO(op=Mixup(1.0), positions=None)):
        assert term(teacher, student, {place: place}, objective, rows.batch(range(8))).item() == pytest.approx(
            0, abs=1e-6
        )
    if site == "logits" and FAMILIES[family].make in (bert,):
        return  # the answer itself
    try:
        found = interchange_accuracy(teacher, student, {place: place}, rows, pairs=10, positions=Span(0.5))
    except NothingToMeasure:
        assert site in WHOLE
        return
    assert found.iia == 1


@pytest.mark.parametrize(("family", "site"), cases("bert", "gpt2", "t5"))
def test_what_is_left_out_is_what_has_no_effect_or_all(family, site):
    """By brute force: of rows of one length with every position swapped, each layer of both models."""
    teacher, student = couple(family)
    rows, layers = FAMILIES[family].data(8, even=True), (0, 1) if site not in ("embedding", "final_norm") else (0,)
    examples = examples_of_rows(rows, 9, Shuffle(), VOCABULARY, 0)
    base, source = examples.base, examples.source
    for layer in layers:
        place = at(family, site, layer)
        kept = torch.ones(9, dtype=torch.bool)
        for model in (teacher, student):
            with torch.no_grad():
                here, there = (run(model, inputs(model, each.batch(range(9)))) for each in (base, source))
                after = interchange(model, here, there, place).logits
            for other in (here, there):
                kept &= ~torch.isclose(after, other.logits, rtol=1e-5, atol=1e-6).flatten(1).all(1)
        for positions in (None, Span(1.0))[layer:]:
            try:
                found = interchange_accuracy(teacher, student, {place: place}, rows, pairs=9, positions=positions)
                assert found.overall.count == int(kept.sum())
                assert found.overall.left_out == int((~kept).sum())
            except NothingToMeasure:
                assert not kept.any(), (place, kept)


@pytest.mark.parametrize("site", ["key", "attention_scores", "attention_pattern", "attention_heads", "mlp_output"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_interchange_accuracy_at_heads_is_that_of_single_pairs(family, site):
    """One pair at a time by plain interchanges, and in batches of other sizes; rows are padded with other rows."""
    teacher, student = couple(family)
    places = (at(family, site), at(family, site, 0))
    rows, pairs, span = FAMILIES[family].data(9), 14, Span(0.5)
    examples = examples_of_rows(rows, pairs, Shuffle(), VOCABULARY, 0)
    base, source = examples.base, examples.source
    right = total = 0
    for i in range(pairs):
        one, other = base.batch([i]), source.batch([i])
        masks = [each["attention_mask"].bool() for each in (one, other)]
        written, read = span.draw(*masks, uniform(1, [seed_from(0, i, 0)]))
        answers = []
        for model, place in zip((teacher, student), places, strict=True):
            with torch.no_grad():
                here, there = (run(model, inputs(model, each), [place]) for each in (one, other))
            if site in ("attention_scores", "attention_pattern"):
                hidden = 0.0 if site == "attention_pattern" else torch.finfo(torch.float32).min
                state = move_to_keys(there.activations[place], masks[1], masks[0], hidden)
                there.activations.put(place, [state])
            with torch.no_grad():
                after = interchange(model, here, there, place, positions=written, source_positions=read)
            answers.append((here.logits, after.logits))
        # A first token that looks at itself alone does so whatever its score is, which no output can see.
        if site == "attention_scores" and any(torch.equal(before, after) for before, after in answers):
            continue
        agree = answers[0][1].argmax(-1) == answers[1][1].argmax(-1)
        right, total = right + int(agree.sum()), total + agree.numel()
    for size in (14, 4):
        found = interchange_accuracy(
            teacher, student, {places[0]: places[1]}, rows, pairs=pairs, positions=span, batch_size=size
        )
        assert found.iia == pytest.approx(right / total, abs=1e-12)
        assert found.overall.iia.count == total


@pytest.mark.parametrize("site", ["attention_scores", "attention_pattern", "attention_heads"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_diito_is_the_same_whichever_side_is_padded(family, site):
    """Rows of other lengths: what a source attends to is the token of the same number, wherever it stands."""
    teacher, student = couple(family)
    right = FAMILIES[family].data(6).batch(range(6))
    lengths, width = right["attention_mask"].sum(1), right["attention_mask"].shape[1]
    shift = (torch.arange(width) - (width - lengths)[:, None]) % width
    left = {name: column.gather(1, shift) if column.ndim > 1 else column for name, column in right.items()}
    mapping = {at(family, site): at(family, site, 0)}
    here, there = (term(teacher, student, mapping, DIITO(positions=Span(1.0)), each) for each in (right, left))
    assert here.item() == pytest.approx(there.item(), rel=1e-4)


def test_keys_of_a_served_teacher_are_not_moved():
    teacher, student = couple("bert")
    mapping, rows = {at("bert", "attention_pattern"): at("bert", "attention_pattern", 0)}, FAMILIES["bert"].data
    even = rows(5, even=True).batch(range(5))
    found, wanted = (term(each, student, mapping, DIITO(), even) for each in (Served(teacher), teacher))
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    refused = r"of a served teacher has a column for each key.*give the model itself"
    with pytest.raises(DistillError, match=refused):
        term(Served(teacher), student, mapping, DIITO(), rows(5).batch(range(5)))
    with pytest.raises(DistillError, match=refused):
        interchange_accuracy(Served(teacher), student, mapping, rows(5), pairs=5, positions=Span(0.5))


@pytest.mark.parametrize(
    ("family", "paths"),
    [
        ("bart encoder", ("model.decoder.layers.1.self_attn", "model.decoder.layers.1.encoder_attn")),
        ("t5", ("decoder.block.1.layer.0.SelfAttention", "decoder.block.1.layer.1.EncDecAttention")),
    ],
)
@torch.no_grad()
def test_keys_of_a_decoder_are_masked_by_what_they_are_of(family, paths):
    """Of sentences as wide as their targets: a key that the source has not is attended to by nobody."""
    model = SMALL[family].eval()
    ids = torch.randint(5, VOCABULARY, (2, 2, 6), generator=generator())
    masks = torch.tensor([[[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]])
    batch = {"input_ids": ids[0], "attention_mask": masks[0]}
    batch |= {"decoder_input_ids": ids[1], "decoder_attention_mask": masks[1]}
    other = {name: column.flip(0) for name, column in batch.items()}
    for path, own in zip(paths, (masks[1], masks[0]), strict=True):
        at = Location(module=path, io="attention_pattern")
        here, there = (run(model, each, [at]) for each in (batch, other))
        found = over_keys(here, there, [at], batch, other).activations[at]
        wanted = move_to_keys(there.activations[at], own.flip(0).bool(), own.bool(), 0.0)
        assert torch.equal(found, wanted)


def test_heads_of_other_numbers_and_sizes():
    """A teacher of 4 heads and 2 of keys, a student of 2 and 1; one random vector serves a place of each kind."""
    from transformers import LlamaConfig, LlamaForCausalLM

    teacher = spread(llama(3), 0, 0.5)
    student = spread(
        LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
                                     num_key_value_heads=1, intermediate_size=24, head_dim=12)), 1, 0.5,
    )  # fmt: skip
    batch, rows = text(5, labels=False).batch(range(5)), text(8, labels=False)
    places = [(Location(1, site), Location(0, site)) for site in HEAD_SITES] + [
        ((Location(0, "attention_heads", heads=[0, 3]), Location(1, "attention_heads", heads=1)), Location(0, "value")),
        (Location(1, "attention_heads", heads=2, dims=range(2)), Location(0)),
        (Location(1, "query", subspace=Rotation(2, 4)), (Location(0, "mlp_output"), Location(1, "key"))),
    ]
    for above, below in places:
        for objective in (DIITO(), DIITO(op=Noise(1.0))):
            assert term(teacher, student, {above: below}, objective, batch).isfinite()
        found = interchange_accuracy(teacher, student, {above: below}, rows, pairs=12, controls="all")
        assert found.overall.count
        assert "labels" in found.controls
        assert str(found)
        assert found.plot() is not None


@pytest.mark.parametrize("site", HEAD_SITES)
@pytest.mark.parametrize("make", [bert, gpt2_lm])
def test_noise_lets_nothing_look_at_padding(make, site):
    """What stands under the mask changes no counterfactual."""
    teacher, student = spread(make(3), 0, 0.5), spread(make(2), 1, 0.5)
    batch = text(5, labels=False).batch(range(5))
    other = batch | {"input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 7)}
    assert not torch.equal(batch["input_ids"], other["input_ids"])
    place = Location(0, site)
    values = [term(teacher, student, {place: place}, DIITO(op=Noise(2.0)), each).item() for each in (batch, other)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_parts_that_are_together_all_of_a_place_are_the_place():
    teacher, student = couple("bert")
    rows = FAMILIES["bert"].data(8, even=True)
    halves = (Location(0, dims=range(8)), Location(0, dims=range(8, 16)))
    for places in (halves, (Location(0, subspace=Rotation(16, 16)),), (Location(0), Location(1, "mlp_output"))):
        with pytest.raises(NothingToMeasure):
            interchange_accuracy(teacher, student, {places: Location(0, "mlp_output")}, rows, pairs=6, positions=None)
    for places in (halves[:1], (Location(0, subspace=Rotation(12, 16)),), (Location(0, "query"), Location(0, "value"))):
        mapping = {places: Location(0, "mlp_output")}
        assert interchange_accuracy(teacher, student, mapping, rows, pairs=6, positions=None).overall.count == 6


@pytest.mark.parametrize("site", ["mlp_output", "attention_output", "attention_heads"])
@pytest.mark.parametrize("positions", [None, Span(1.0)])
def test_training_and_measuring_beside_the_residual_stream(site, positions):
    from distill import fit

    teacher, student = couple("bert")
    rows = FAMILIES["bert"].data(8, even=True)
    mapping = {Location(2, site): Location(1, site)}
    fit(teacher, student, mapping, rows, objective=[KD(), DIITO(positions=positions)], steps=1, batch_size=4)
    assert interchange_accuracy(teacher, student, mapping, rows, pairs=8, positions=positions).overall.count == 8


def test_a_search_among_two_networks_names_what_will_do_it():
    teacher, student = couple("gpt2")
    with pytest.raises(DistillError, match=r"GPT2LMHeadModel is none; of two networks .*search_mapping\(teacher"):
        search_alignment(teacher, student, at=[Location(0)], data={"input_ids": torch.ones(2, 3).long()})
