"""DIITO against a naive implementation: three full runs of each model, with plain torch hooks."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn

from distill import DIITO, KD, PKD, Cosine, Crossway, DistillError, InContext, Labels, Objective, Shuffle, Span
from distill.interchange.mapping import entries_of
from distill.interchange.random_vectors import narrow
from distill.losses import kd
from distill.models.inputs import inputs_of
from distill.objectives import Reads, Step
from distill.training.computation import Computation
from interventions import Location, Mixup, Noise, run
from tests.distill.tiny_models import VOCABULARY, bert, gpt2, gpt2_lm, images, mlp, spread, t5, text, vectors, vit

MODELS = {"bert": bert, "vit": vit, "gpt2": gpt2, "gpt2_lm": gpt2_lm}
STACKS = {"bert": "bert.encoder.layer", "vit": "vit.layers", "gpt2": "transformer.h", "gpt2_lm": "transformer.h"}
MAPPINGS = {
    "one": {Location(1): Location(0)},
    "several": {(Location(0), Location(2)): Location(0)},
    "dims": {Location(1, dims=range(8)): Location(0, dims=range(4, 12))},
    "drawn": {Location(0): Location(0), (Location(1), Location(2)): Location(1)},
}
SOURCES = {
    "shuffle": DIITO,
    "in-context": partial(DIITO, InContext(0.4)),
    "mixup": partial(DIITO, op=Mixup(1.5, keep=0.6)),
    "noise": partial(DIITO, op=Noise(0.7)),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def couple(name: str, *, width: int = 16) -> tuple[nn.Module, nn.Module]:
    make = MODELS[name]
    return spread(make(4), 0), spread(make(2, width=width), 1).train()


def batch_of(name: str) -> dict[str, torch.Tensor]:
    return (images(6) if name == "vit" else text(6)).batch(range(6))


def terms_of(teacher, student, mapping, objectives, batch, seed=0):
    pairs = entries_of(mapping, teacher, student)
    return Computation(teacher, student, pairs, objectives)(batch, generator(seed))


# --- the oracle -------------------------------------------------------------------------------------------------------


def state_of(output):
    return output[0] if isinstance(output, tuple) else output


def ran(model, batch, stack, write=None):
    """Logits and the outputs of all blocks of one full run; `write` is {layer: function of the state}."""
    states, hooks = {}, []
    for number, block in enumerate(model.get_submodule(stack)):

        def hook(module, args, output, number=number):
            state = state_of(output)
            if write and number in write:
                state = write[number](state)
            states[number] = state
            return (state, *output[1:]) if isinstance(output, tuple) else state

        hooks.append(block.register_forward_hook(hook))
    try:
        return model(**inputs_of(model, batch)).logits, states
    finally:
        for hook in hooks:
            hook.remove()


def put(state, value, where, dims):
    """The state with `value` [n, d] at (row, column) pairs, one by one."""
    state = state.clone()
    for i, (row, column) in enumerate(where):
        state[row, column, dims] = value[i]
    return state


def naive(objective, teacher, student, mapping, batch, stack, seed=0, draws=None):
    """The terms kd and kd_cf from three full runs of each model; `draws` is a generator in place of that of a seed."""
    draws, pairs = draws or generator(seed), entries_of(mapping, teacher, student)
    pair = pairs[int(torch.randint(len(pairs), (), generator=draws))]
    source = batch
    drawn = None if objective.sources is None else objective.sources.draw(batch, VOCABULARY, draws)
    if isinstance(drawn, dict):
        source = drawn
    rows = len(next(iter(batch.values())))
    with torch.no_grad():
        width = ran(teacher, batch, stack)[1][0].shape[1]
    real = batch.get("attention_mask", torch.ones(rows, width)).bool()
    other = real[drawn] if isinstance(drawn, torch.Tensor) else real
    uniform = torch.rand(rows, 2, width, generator=draws)
    aligned = not isinstance(objective.sources, Shuffle)
    chosen, taken = (
        mask.nonzero().tolist() for mask in objective.positions.draw(real, other, uniform, aligned=aligned)
    )
    widest = max(int(model.config.hidden_size) for model in (teacher, student))
    spans = [len(at.dims) if at.dims is not None else widest for at in (*pair.teacher, *pair.student)]
    normal = torch.randn(len(chosen), max(spans), generator=draws) if objective.sources is None else None

    def sides(model, places):
        base, _ = ran(model, batch, stack)
        _, states = ran(model, source, stack)
        if objective.detach_source:
            states = {number: state.detach() for number, state in states.items()}

        def written(state, at):
            dims = slice(None) if at.dims is None else slice(at.dims.start, at.dims.stop)
            if objective.sources is not None:
                whole = states[at.layer][drawn] if isinstance(drawn, torch.Tensor) else states[at.layer]
                return put(state, torch.stack([whole[r, c, dims] for r, c in taken]), chosen, dims)
            h = torch.stack([state[r, c, dims] for r, c in chosen])
            z = objective.op.sigma * h.detach().square().mean(-1, keepdim=True).sqrt() * narrow(normal, h.shape[-1])
            keep = objective.op.keep if isinstance(objective.op, Mixup) else None
            return put(state, h + z if keep is None else keep * h + (1 - keep) * z, chosen, dims)

        after, _ = ran(model, batch, stack, {at.layer: partial(written, at=at) for at in places})
        return base, after

    with torch.no_grad():
        taught = sides(teacher, pair.teacher)
    learnt = sides(student, pair.student)
    mask = batch["attention_mask"] if taught[0].ndim == 3 else None
    return {name: kd(s, t, 2.0, mask=mask) for name, s, t in zip(("kd", "kd_cf"), learnt, taught, strict=True)}


def gradients(model, terms):
    model.zero_grad()
    sum(terms.values()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def differ(one, other):
    """The largest difference of two gradients, relative to their norm."""
    norm = torch.stack([g.norm() for g in other.values()]).norm()
    return float(torch.stack([(one[name] - other[name]).norm() for name in other]).norm() / norm)


CASES = [
    (model, source, mapping)
    for model in MODELS
    for source in SOURCES
    for mapping in MAPPINGS
    if (model, source) != ("vit", "in-context") and (model != "gpt2_lm" or mapping == "several")
]


@pytest.mark.parametrize(("model", "source", "mapping"), CASES)
def test_equal_to_three_runs_with_plain_hooks(model, source, mapping):
    teacher, student = couple(model)
    batch, objective, mapping = batch_of(model), SOURCES[source](), MAPPINGS[mapping]
    expected = naive(objective, teacher, student, mapping, batch, STACKS[model])
    oracle = gradients(student, expected)
    found = terms_of(teacher, student, mapping, [KD(), objective], batch)
    assert {name: term.item() for name, term in found.items()} == {name: t.item() for name, t in expected.items()}
    assert expected["kd_cf"].item() != expected["kd"].item()
    ours = gradients(student, found)
    assert ours.keys() == oracle.keys()
    assert differ(ours, oracle) <= 1e-6
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("source", ["shuffle", "in-context"])
@pytest.mark.parametrize("mapping", ["one", "several"])
def test_detach_source_cuts_the_source_run_off_and_nothing_else(source, mapping):
    teacher, student = couple("bert")
    batch, mapping = batch_of("bert"), MAPPINGS[mapping]
    grads, values = {}, {}
    for detach in (False, True):
        objective = SOURCES[source](detach_source=detach, positions=Span(0.5))
        terms = terms_of(teacher, student, mapping, [objective], batch)
        expected = {"kd_cf": naive(objective, teacher, student, mapping, batch, STACKS["bert"])["kd_cf"]}
        oracle = gradients(student, expected)
        grads[detach], values[detach] = gradients(student, terms), terms["kd_cf"].item()
        assert differ(grads[detach], oracle) <= 1e-6
    assert values[True] == values[False]
    assert differ(grads[True], grads[False]) > 1e-3


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(side):
    """Seven more tokens of padding on either side give the same counterfactuals up to rounding."""
    teacher, student = couple("gpt2")
    batch = text(5, 4, 6, side=side).batch(range(5))
    wider = {
        name: nn.functional.pad(c, (0, 7) if side == "right" else (7, 0)) if c.ndim == 2 else c
        for name, c in batch.items()
    }
    mapping = entries_of(MAPPINGS["one"], teacher, student)
    values = []
    for each in (batch, wider):
        each["position_ids"] = (each["attention_mask"].cumsum(1) - 1).clamp(min=0)
        objective = DIITO(Reversed(), positions=Span(1.0))
        values.append(Computation(teacher, student, mapping, [objective])(each, generator())["kd_cf"].item())
    assert values[0] == pytest.approx(values[1], rel=1e-5)


@dataclass(frozen=True)
class Reversed:
    """Sources in reverse order; `Identity` below gives every example to itself."""

    aligned: bool = True

    def draw(self, batch, vocabulary, generator):
        return torch.arange(len(next(iter(batch.values()))) - 1, -1, -1)


@dataclass(frozen=True)
class Identity:
    aligned: bool = True

    def draw(self, batch, vocabulary, generator):
        return torch.arange(len(next(iter(batch.values()))))


NEUTRAL = {
    "identity": partial(DIITO, Identity()),
    "in-context 0": partial(DIITO, InContext(0)),
    "mixup 1": partial(DIITO, op=Mixup(2.0, keep=1.0)),
    "noise 0": partial(DIITO, op=Noise(0.0)),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("neutral", NEUTRAL)
@pytest.mark.parametrize("positions", [Span(0.4), Span(0.5, consecutive=False), None])
def test_a_self_interchange_changes_no_bit(model, neutral, positions):
    if model == "vit" and neutral == "in-context 0":
        pytest.skip("pictures have no tokens")
    teacher, student = couple(model)
    objective = NEUTRAL[neutral](positions=positions)
    terms = terms_of(teacher, student, MAPPINGS["several"], [KD(), objective], batch_of(model))
    assert terms["kd"].item() == terms["kd_cf"].item() > 0


@pytest.mark.parametrize("make", [bert, gpt2, vit])
def test_a_self_interchange_shares_the_dropout_of_the_base_run(make):
    teacher, student = spread(make(4)), spread(make(2, dropout=0.3), 1).train()
    batch = batch_of("vit" if make is vit else "bert")
    mapping = {Location(0): Location(0)}
    terms = terms_of(teacher, student, mapping, [KD(), DIITO(Identity())], batch)
    assert terms["kd"].item() == terms["kd_cf"].item()
    other = terms_of(teacher, student, mapping, [KD()], batch)
    assert other["kd"].item() != terms["kd"].item()  # dropout was on


# --- cost -------------------------------------------------------------------------------------------------------------


def counted(model, stack):
    """{layer: calls}, counted inside the blocks by the forward of their first leaf with weights."""
    calls = {}
    for number, block in enumerate(model.get_submodule(stack)):
        leaf = next(m for m in block.modules() if not list(m.children()) and getattr(m, "weight", None) is not None)

        def forward(*args, number=number, original=leaf.forward, **kwargs):
            calls[number] = calls.get(number, 0) + 1
            return original(*args, **kwargs)

        leaf.forward = forward
    return calls


@pytest.mark.parametrize("model", ["bert", "vit", "gpt2"])
@pytest.mark.parametrize("source", ["shuffle", "mixup", "noise"])
@pytest.mark.parametrize("above", [(0,), (1, 2), (3,)])
@pytest.mark.parametrize("below", [0, 1])
def test_blocks_run_once_and_those_above_the_write_twice(model, source, above, below):
    teacher, student = couple(model)
    calls = [counted(each, STACKS[model]) for each in (teacher, student)]
    mapping = {tuple(Location(layer) for layer in above): Location(below)}
    match = [KD(), Cosine(Location(-1))]
    terms = terms_of(teacher, student, mapping, [KD(), SOURCES[source](match=match)], batch_of(model))
    sum(terms.values()).backward()
    for count, layers, lowest in zip(calls, (4, 2), (min(above), below), strict=True):
        assert count == {layer: 1 + (layer > lowest) for layer in range(layers)}
        assert sum(count.values()) <= layers + (layers - 1 - lowest)


@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_the_source_run_of_in_context_stops_after_the_last_location_read(model):
    teacher, student = couple(model)
    calls = [counted(each, STACKS[model]) for each in (teacher, student)]
    terms_of(teacher, student, {(Location(0), Location(1)): Location(0)}, [KD(), DIITO(InContext())], batch_of(model))
    assert calls[0] == {0: 2, 1: 3, 2: 2, 3: 2}  # base and source; and counterfactual; base and counterfactual
    assert calls[1] == {0: 2, 1: 2}


# --- what is written --------------------------------------------------------------------------------------------------


class Spy(Objective):
    """Keeps the steps that it is given, with the activations at some places."""

    def __init__(self, above, below):
        super().__init__()
        self.places, self.steps = Reads(above, below), []

    def reads(self, mapping):
        return self.places

    def forward(self, step):
        self.steps.append(step)
        return {"spy": step.student.logits.sum() * 0}


def changes(teacher, student, objective, pair, batch):
    """What an interchange changed at each place of the pair, in the teacher and in the student."""
    spy = Spy(*pair)
    objective.match = nn.ModuleList([spy])
    terms_of(teacher, student, {pair[0]: pair[1]}, [spy, objective], batch)
    base, after = spy.steps
    return [
        [ran.activations[at] - before.activations[at] for at in places]
        for ran, before, places in zip((after.teacher, after.student), (base.teacher, base.student), pair, strict=True)
    ]


def test_one_random_vector_for_every_place_of_both_models():
    teacher, student = couple("bert")
    pair = ((Location(2),), (Location(1),))
    batch = batch_of("bert")
    (above,), (below,) = changes(teacher, student, DIITO(op=Noise(3.0, relative=False)), pair, batch)
    assert torch.allclose(above, below.detach(), atol=1e-5)
    where = above.abs().sum(-1) > 0
    assert where.sum(1).tolist() == [max(1, int(int(n) * 0.3)) for n in batch["attention_mask"].sum(1)]
    assert not (where & ~batch["attention_mask"].bool()).any()
    assert 2 < above[where].std() < 4


def test_random_vectors_are_projected_to_narrower_models():
    teacher, student = couple("bert", width=8)
    pair = ((Location(2),), (Location(1),))
    (above,), (below,) = changes(teacher, student, DIITO(op=Noise(3.0, relative=False)), pair, batch_of("bert"))
    where = above.abs().sum(-1) > 0
    assert torch.allclose(narrow(above[where], 8), below.detach()[where], atol=1e-4)


def test_the_projection_is_semi_orthogonal_and_keeps_the_scale():
    map_ = narrow(torch.eye(24, dtype=torch.float64), 10)
    assert torch.allclose(map_.T @ map_, torch.eye(10, dtype=torch.float64), atol=1e-12)
    drawn = narrow(torch.randn(20_000, 24, generator=generator()), 10)
    assert torch.allclose(drawn.var(0), torch.ones(10), atol=0.05)
    assert torch.allclose(torch.cov(drawn.T), torch.eye(10), atol=0.05)
    assert torch.equal(narrow(drawn, 10), drawn)
    assert torch.equal(narrow(drawn, 4), narrow(drawn, 4))


def test_sigma_is_in_units_of_each_vector():
    teacher, student = couple("bert")
    with torch.no_grad():
        teacher.bert.encoder.layer[2].output.LayerNorm.weight.mul_(50)
    pair = ((Location(2),), (Location(1),))
    (above,), (below,) = changes(teacher, student, DIITO(op=Noise(1.0), positions=None), pair, batch_of("bert"))
    assert 30 < above.std() / below.std() < 80


def test_the_same_source_positions_feed_both_models():
    """A swap from a reversed batch: what arrives in each model is its own activation at the very same source "
    "position."""
    teacher, student = couple("bert")
    batch, pair = batch_of("bert"), ((Location(2),), (Location(1),))
    spy = Spy(*pair)
    terms_of(teacher, student, {pair[0]: pair[1]}, [spy, DIITO(Reversed(aligned=False), match=spy)], batch)
    base, after = spy.steps
    found = []
    for ran, before, places in zip((after.teacher, after.student), (base.teacher, base.student), pair, strict=True):
        new, old = ran.activations[places[0]], before.activations[places[0]]
        where = (new != old).any(-1).nonzero().tolist()
        source = old.flip(0)
        found.append([(r, c, int((source[r] == new[r, c]).all(-1).nonzero()[0])) for r, c in where])
    assert found[0] == found[1]
    assert any(column != taken for _, column, taken in found[0])


def test_match_names_its_terms():
    teacher, student = couple("bert")
    terms = terms_of(teacher, student, MAPPINGS["drawn"], [DIITO(match=[KD(), Cosine(), PKD()])], batch_of("bert"))
    assert list(terms) == ["kd_cf", "cosine_cf", "pkd_cf"]
    assert all(term.ndim == 0 and term.requires_grad for term in terms.values())


@pytest.mark.parametrize("kind", [*SOURCES, "crossway"])
def test_a_step_compares_the_counterfactuals_of_the_drawn_entry(kind):
    """What the step returns is what the runs that `counterfactuals` hands out say, of the entry that was drawn."""
    objective = DIITO(Crossway()) if kind == "crossway" else SOURCES[kind]()
    teacher, student = couple("bert")
    pairs, batch = entries_of(MAPPINGS["drawn"], teacher, student), batch_of("bert")
    whole = terms_of(teacher, student, MAPPINGS["drawn"], [objective], batch)
    step = Computation(teacher, student, pairs, [objective]).step(batch, generator())
    entry = objective.draw_pair(step)
    found = list(objective.counterfactuals(step, entry))
    assert objective.compare(step, found) == whole
    assert [each.entry for each in found] == [entry] * (2 if kind == "crossway" else 1)
    by_hand = torch.stack([kd(each.student.logits, each.teacher.logits, 2.0) for each in found]).mean()
    torch.testing.assert_close(whole["kd_cf"], by_hand)
    written, read = found[0].positions
    if objective.sources is None:
        assert (found[0].drawn, read) == (None, None)
    else:
        torch.testing.assert_close(written.sum(1), read.sum(1))
    assert bool((found[0].teacher.logits != step.taught.logits).any())


def test_pairs_of_the_mapping_are_drawn_equally_often():
    teacher, student = couple("bert")
    pairs = entries_of({Location(i): Location(0) for i in range(3)}, teacher, student)
    step = Step({}, student, lambda: run(student, inputs_of(student, batch_of("bert"))), None, pairs, generator())
    counts = torch.tensor([pairs.index(DIITO().draw_pair(step)) for _ in range(3000)]).bincount()
    assert ((counts - 1000.0) ** 2 / 1000).sum() < 13.8  # chi-squared, 2 degrees of freedom, 99.9 %


def test_draws_are_decided_by_the_generator_alone():
    teacher, student = couple("bert")
    before = torch.random.get_rng_state()
    values = [
        terms_of(teacher, student, MAPPINGS["drawn"], [DIITO(InContext())], batch_of("bert"), seed)["kd_cf"].item()
        for seed in (0, 0, 1)
    ]
    assert values[0] == values[1] != values[2]
    assert torch.equal(before, torch.random.get_rng_state())


def test_encoder_locations_of_an_encoder_decoder_avoid_the_padding_of_the_encoder():
    teacher, student = spread(t5(3)), spread(t5(2), 1).train()
    rows = text(6, 3, 9)
    batch = {**rows.batch(range(6)), "decoder_input_ids": torch.randint(5, VOCABULARY, (6, 4), generator=generator())}
    encoder = Location(1, stack="encoder")
    for seed in range(5):
        terms = terms_of(teacher, student, {encoder: encoder}, [DIITO(positions=Span(1.0))], batch, seed)
        assert terms["kd_cf"].isfinite()


def test_places_without_blocks():
    """An MLP has no positions: dims of a layer are swapped, and the swap of all of them is the source."""
    teacher, student = spread(mlp()), spread(mlp(), 1)
    batch = vectors(6).batch(range(6))
    whole = {Location(module="2"): Location(module="2")}
    terms = terms_of(teacher, student, whole, [KD(), DIITO(Reversed())], batch)
    assert torch.allclose(terms["kd"], terms["kd_cf"])  # every example is some example's source
    part = {Location(module="2", dims=range(4)): Location(module="2", dims=range(4))}
    assert not torch.allclose(*terms_of(teacher, student, part, [KD(), DIITO(Reversed())], batch).values())


def test_what_diito_refuses():
    with pytest.raises(DistillError, match=r"Noise\(.*needs no source, and sources=Shuffle.*leave sources out"):
        DIITO(Shuffle(), op=Noise(1.0))
    teacher, student = couple("bert")
    with pytest.raises(DistillError, match="DIITO needs a mapping; give mapping='full'"):
        Computation(teacher, student, (), [DIITO()])(batch_of("bert"), generator())
    with pytest.raises(DistillError, match="compares with a teacher and there is none"):
        Computation(None, student, entries_of(MAPPINGS["one"], teacher, student), [DIITO()])(
            batch_of("bert"), generator()
        )
    uneven = {Location(0): Location(module="classifier")}
    with pytest.raises(DistillError, match=r"have different positions: .*\(6, \d\) and \(6,\)"):
        terms_of(teacher, student, uneven, [DIITO()], batch_of("bert"))


def test_settings_are_printed():
    assert "InContext(share=0.4" in repr(DIITO(InContext(0.4)))
    assert repr(DIITO(op=Mixup(2.0))) != repr(DIITO(op=Mixup(1.0)))
    assert repr(DIITO(positions=Span(0.5))) != repr(DIITO())
    assert repr(DIITO(detach_source=True)) != repr(DIITO())


def test_labels_may_be_matched_too():
    teacher, student = couple("bert")
    terms = terms_of(teacher, student, MAPPINGS["one"], [DIITO(Identity(), match=Labels()), Labels()], batch_of("bert"))
    assert terms["labels_cf"].item() == terms["labels"].item()


# --- crossway pairs ---------------------------------------------------------------------------------------------------


def test_crossway_is_the_mean_of_both_directions():
    """By plain hooks: what is written in row i at B(i), read in row s(i) at D(i), goes the other way too."""
    teacher, student = couple("bert")
    student.eval()
    batch, mapping = batch_of("bert"), {Location(1): Location(0)}
    pairs = entries_of(mapping, teacher, student)
    objective = DIITO(Crossway(), positions=Span(0.4))
    step = Computation(teacher, student, pairs, [objective]).step(batch, generator())
    order = Crossway().draw(batch, None, generator_after_pair(pairs))
    found = objective(step)["kd_cf"].item()
    one = terms_of(teacher, student, mapping, [DIITO(positions=Span(0.4))], batch)["kd_cf"].item()

    draws = generator()
    torch.randint(1, (), generator=draws)
    assert torch.equal(order, torch.randperm(6, generator=draws))
    real = batch["attention_mask"].bool()
    uniform = torch.rand(6, 2, real.shape[1], generator=draws)
    written, read = Span(0.4).draw(real, real[order], uniform)
    values = []
    for rows, to, of in ((order, written, read), (order.argsort(), read[order.argsort()], written[order.argsort()])):
        logits = []
        for model, layer, stack in ((teacher, 1, STACKS["bert"]), (student, 0, STACKS["bert"])):
            _, states = ran(model, batch, stack)

            def swap(state, source=states[layer][rows], to=to, of=of):
                new = state.clone()
                new[to] = source[of]
                return new

            logits.append(ran(model, batch, stack, {layer: swap})[0])
        values.append(kd(logits[1], logits[0], 2.0).item())
    assert one == pytest.approx(values[0], rel=1e-5)
    assert values[0] != pytest.approx(values[1], rel=1e-3)
    assert found == pytest.approx(sum(values) / 2, rel=1e-5)


def generator_after_pair(pairs) -> torch.Generator:
    draws = generator()
    torch.randint(len(pairs), (), generator=draws)
    return draws


def test_crossway_where_two_rows_trade_places_is_shuffle():
    """Without positions and with a permutation that is its own inverse both directions are the same interchange."""
    teacher, student = couple("bert")
    student.eval()
    rows = text(2).batch(range(2))
    for seed in range(4):
        one, both = (
            terms_of(teacher, student, {Location(1): Location(0)}, [DIITO(kind, positions=None)], rows, seed)["kd_cf"]
            for kind in (Shuffle(), Crossway())
        )
        assert one.item() == both.item()
