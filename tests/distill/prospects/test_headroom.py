"""Headroom against gradients by hand, and its laws over tiny models."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from distill import (
    DIITO,
    KD,
    Answer,
    Augmented,
    Cosine,
    Crossway,
    DistillError,
    FitNets,
    InContext,
    Labels,
    MaskedLM,
    Rows,
    Scattered,
    Schedule,
    Served,
    Shuffle,
    Span,
    headroom,
    interchange_accuracy,
)
from distill.errors import NothingToMeasure
from distill.interchange.kinds import Kind
from interventions import Location, Mixup, Noise
from tests.distill.tiny_models import (
    CNN,
    LSTM,
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
from tests.distill.wired import SUM, Wired
from tests.distill.words import Words

FAST = Schedule(steps=3, batch_size=8, lr=1e-2, warmup=0.0)
INNER = {Location(1): Location(0)}
PART = Location(module="0", dims=range(4))
MODELS = {"bert": bert, "vit": vit, "gpt2": gpt2, "gpt2_lm": gpt2_lm, "masked_lm": masked_lm, "llama": llama}


def rows_of(name: str, count: int = 24) -> Rows:
    return images(count) if name == "vit" else text(count, labels=name in ("bert", "gpt2"))


def couple(name: str):
    return spread(MODELS[name](4), 3, 0.8), spread(MODELS[name](3), 13, 0.8)


def measured(name: str, mapping=INNER, steps: int = 0, **settings):
    teacher, student = couple(name)
    return headroom(
        teacher, student, rows_of(name), mapping, **{"steps": steps, "batches": 3, "schedule": FAST, **settings}
    )


# --- by hand ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Negated:
    """Sources that are the bases with the other sign, whatever the order of the rows."""

    aligned = True

    def draw(self, batch, vocabulary, generator):
        return {**batch, "inputs": -batch["inputs"]}


def linear(first, second) -> nn.Sequential:
    network = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor(first))
        network[1].weight.copy_(torch.tensor(second))
    return network


def test_linear_networks_by_hand():
    """Losses, lengths and angle of squared errors of y = v W x, and with the other sign in dim 0."""
    teacher, student = linear([[1.0, 1.0], [1.0, -2.0]], [[2.0, 1.0]]), linear([[0.5, 1.0], [2.0, -1.0]], [[1.0, -0.5]])
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    place = Location(module="0", dims=range(1))
    objective = DIITO(Negated(), positions=None, match=KD(answers="values"))
    found = headroom(
        teacher, student, {"inputs": x}, {place: place}, objective=objective, steps=0, batches=1, batch_size=16
    )
    (entry,) = found.entries
    w, v = student[0].weight.detach(), student[1].weight.detach()[0]
    above, out = teacher[0].weight.detach(), teacher[1].weight.detach()[0]
    flip = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    losses, gradients = [], []
    for sign in (torch.ones(2, dtype=torch.float64), flip):
        z = sign * (x @ w.T)
        error = z @ v - (sign * (x @ above.T)) @ out
        losses.append(error.square().mean())
        to_v = 2 * (error[:, None] * z).mean(0)
        to_w = 2 * (error[:, None, None] * (sign * v)[None, :, None] * x[:, None, :]).mean(0)
        gradients.append(torch.cat([to_w.flatten(), to_v]))
    one, other = gradients
    assert entry.base == pytest.approx(float(losses[0]))
    assert entry.counterfactual == pytest.approx(float(losses[1]))
    assert entry.ratio.mean == pytest.approx(float(losses[1] / losses[0]))
    assert entry.base_norm == pytest.approx(float(one.norm()))
    assert entry.counterfactual_norm == pytest.approx(float(other.norm()))
    assert entry.cosine.mean == pytest.approx(float(one @ other / one.norm() / other.norm()))
    assert (entry.effect_rate, entry.void, entry.nearly_void, entry.rows) == (None, 0.0, 0.0, 16)
    assert entry.ratio.error is None  # of one batch
    assert found.across[entry.kind].mean is None


@pytest.mark.parametrize("name", MODELS)
def test_a_copy_of_the_teacher_has_no_losses(name):
    teacher = spread(MODELS[name](3), 3, 0.8)
    found = headroom(teacher, copy.deepcopy(teacher), rows_of(name), {Location(1): Location(1)}, steps=0, batches=2,
                     schedule=FAST)  # fmt: skip
    (entry,) = found.entries
    assert (entry.base, entry.counterfactual) == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))
    assert entry.nearly_void < 1
    assert entry.base > 0 or entry.cosine.mean is None


def test_a_copy_is_said_to_have_nothing_to_learn():
    teacher = mlp()
    half = Location(module="0", dims=range(4))
    found = headroom(
        teacher, copy.deepcopy(teacher), vectors(), {half: half}, steps=0, objective=DIITO(match=KD(answers="values"))
    )
    assert "a causal term has nothing to teach" in found.advice
    with pytest.raises(DistillError, match="there is no figure to draw"):
        found.plot()


@pytest.mark.parametrize("name", MODELS)
def test_sources_that_are_the_bases_change_nothing(name):
    """kd_cf is kd, its gradient the same, and every row is nearly void."""
    if name == "vit":
        pytest.skip("an image has no tokens to replace")
    (entry,) = measured(name, objective=DIITO(InContext(0.0))).entries
    assert entry.base == pytest.approx(entry.counterfactual, rel=1e-5)
    assert entry.base > 0.01
    assert entry.ratio.mean == pytest.approx(1, rel=1e-5)
    assert entry.cosine.mean == pytest.approx(1, abs=1e-5)
    assert (entry.effect_rate, entry.void, entry.nearly_void) == (0, 0, 1)


# --- void -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_void_is_what_interchange_accuracy_leaves_out(name, share):
    """The last block of a classifier, an inner one, a part of the last: all, none, or some rows."""
    part = Location(-1, dims=range(8))
    mapping = {Location(1): Location(0), Location(-1): Location(-1), part: part}
    teacher, student = couple(name)
    rows = images(24) if name == "vit" else text(24, 6, 6, labels=name in ("bert", "gpt2"))
    found = headroom(teacher, student, rows, mapping, objective=DIITO(positions=Span(share)), steps=0, batches=3,
                     batch_size=8)  # fmt: skip
    try:
        accuracy = interchange_accuracy(teacher, student, mapping, rows, pairs=24, positions=Span(share))
    except NothingToMeasure:
        assert all(entry.void == 1 for entry in found.entries)
        return
    for entry, outcome in zip(found.entries, accuracy.per_pair.values(), strict=True):
        left_out = outcome.left_out / (outcome.left_out + outcome.count)
        if left_out in (0, 1):
            assert entry.void == left_out
        else:  # other draws of the same rule
            assert entry.void == pytest.approx(left_out, abs=0.45)
            assert 0 < entry.void < 1


def test_an_entry_that_is_void_is_said_to_be():
    found = measured("bert", {Location(1): Location(0), Location(-1): Location(-1)})
    inner, last = found.entries
    assert (inner.is_void, last.is_void) == (False, True)
    assert "no interchange of block_output.-1 ↔ block_output.-1 can be seen" in found.advice
    assert "the counterfactual loss of block_output.1 ↔ block_output.0 is" in found.advice
    alone = measured("bert", {Location(-1): Location(-1)})
    assert alone.advice.startswith("No interchange of block_output.-1 ↔ block_output.-1 can be seen: map a block below")


def test_what_moves_little_is_nearly_void():
    """Noise so small that no logit moves by the tolerance; with a smaller tolerance it does."""
    tiny = DIITO(op=Noise(1e-4))
    found = [measured("bert", objective=tiny, tolerance=each).entries[0] for each in (0.1, 0.0)]
    assert [each.nearly_void for each in found] == [1.0, 0.0]
    assert [each.void for each in found] == [0.0, 0.0]
    assert found[0].ratio.mean == pytest.approx(1, abs=1e-2)


# --- what is left behind, and what decides ----------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("make", [lambda: bert(3, dropout=0.3), CNN])
def test_nothing_is_left_behind(make, steps):
    teacher, student = make(), make()
    student.train()
    next(iter(student.children())).eval()
    first = next(student.parameters())
    first.grad = torch.ones_like(first)
    objective = DIITO(match=[KD(2.0)])
    before = [weights(model) for model in (teacher, student)]
    modes = [module.training for model in (teacher, student) for module in model.modules()]
    state = torch.random.get_rng_state()
    mapping = {Location(module="conv1"): Location(module="conv1")} if make is CNN else INNER
    rows = images(24) if make is CNN else text(24)
    found = headroom(teacher, student, rows, mapping, objective=objective, steps=steps, batches=2, batch_size=8)
    assert found.steps == steps
    assert torch.equal(state, torch.random.get_rng_state())
    assert modes == [module.training for model in (teacher, student) for module in model.modules()]
    assert all(same(a, weights(model)) for a, model in zip(before, (teacher, student), strict=True))
    assert [p.grad is None for p in student.parameters()].count(False) == 1
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(module._forward_hooks for module in student.modules())
    assert repr(objective) == repr(DIITO(match=[KD(2.0)]))


def test_the_seed_decides_all():
    found = [measured("bert", steps=2, seed=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert found[0].entries != found[2].entries


def test_training_lowers_the_base_loss():
    found = [measured("bert", steps=steps).entries[0] for steps in (0, 30)]
    assert found[1].base < 0.8 * found[0].base


def test_the_size_of_batches_changes_only_what_is_drawn():
    """The same rows have the same base loss and the same void places, in batches of 4 or of 24."""
    mapping = {Location(1): Location(0), Location(-1): Location(-1)}
    found = [measured("bert", mapping, batch_size=size, batches=24 // size) for size in (4, 24)]
    for one, other in zip(found[0].entries, found[1].entries, strict=True):
        assert one.base == pytest.approx(other.base, rel=1e-4)
        assert (one.rows, one.void) == (other.rows, other.void)
    assert found[1].entries[0].ratio.error is None
    assert found[0].entries[0].ratio.error > 0


def test_an_entry_does_not_depend_on_those_after_it():
    one = measured("bert").entries[0]
    both = measured("bert", {**INNER, Location(2): Location(1)}).entries[0]
    assert one == both


# --- objectives, models, data -----------------------------------------------------------------------------------------

OBJECTIVES = {
    "cosine": lambda: DIITO(match=Cosine()),
    "two": lambda: [KD(), Labels(), DIITO(match=[KD(2.0), Cosine()])],
    "labels": lambda: [KD(), Labels(), DIITO()],
    "crossway": lambda: [KD(), DIITO(Crossway())],
    "mixup": lambda: DIITO(op=Mixup(1.0)),
    "regressor": lambda: DIITO(match=FitNets({Location(2): Location(1)})),
    "in context": lambda: DIITO(InContext(0.5), match=KD(2.0)),
    "answer": lambda: DIITO(positions=Answer()),
    "scattered": lambda: [KD(), Augmented(), DIITO(positions=Scattered(2))],
    "several": lambda: [KD(), DIITO(), DIITO(InContext(0.5))],
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_any_objective_is_measured(name):
    found = measured("bert", steps=2, objective=OBJECTIVES[name]())
    assert len(found.entries) == (2 if name == "several" else 1)
    assert len({entry.kind for entry in found.entries}) == len(found.entries)
    for entry in found.entries:
        assert entry.base > 0
        assert entry.counterfactual > 0
        assert -1 <= entry.cosine.mean <= 1
        assert entry.rows == (48 if name == "crossway" else 24)
    assert found.loss == {"cosine": "cosine", "two": "kd + cosine", "regressor": "hint"}.get(name, "kd")
    assert "CausalLM" not in found.trained_by


def test_objectives_without_their_columns_are_left_out():
    """Labels that the data lacks train nothing, with a warning, as in a fit; the rest is measured."""
    teacher, student = couple("bert")
    with pytest.warns(UserWarning, match="the data has no labels, so Labels"):
        found = headroom(teacher, student, text(24, labels=False), INNER, objective=OBJECTIVES["labels"](), steps=2,
                         batches=2, schedule=FAST)  # fmt: skip
    assert found.trained_by == "KD(temperature=2.0)"
    assert found.entries[0].base > 0


def test_kinds_are_measured_with_the_match_of_the_objective():
    kinds = {
        "again": Kind(),
        "half": Kind(dims=0.5),
        "heads": Kind(site="attention_heads"),
        "in context": Kind(sources=InContext(0.5)),
    }
    found = measured("bert", kinds=kinds)
    own = "Shuffle(), Span(0.3)"
    assert [entry.kind for entry in found.entries] == [own, *kinds] == list(found.across)
    assert [entry.entry for entry in found.entries] == [
        "block_output.1 ↔ block_output.0", "block_output.1 ↔ block_output.0",
        "block_output.1[dims=0:8] ↔ block_output.0[dims=0:8]", "attention_heads.1 ↔ attention_heads.0",
        "block_output.1 ↔ block_output.0",
    ]  # fmt: skip
    assert len({entry.counterfactual for entry in found.entries}) == 4
    assert len({entry.base for entry in found.entries}) == 1
    (plain,) = measured("bert").entries
    assert plain == found.entries[0]
    assert found.entries[1].counterfactual == plain.counterfactual


def test_an_objective_over_several_kinds_is_measured_for_each():
    sites = ["block_output", "mlp_output"]
    found = measured("bert", objective=DIITO(positions=[Span(0.3), Answer()], at=sites))
    rules = ("Shuffle(), Span(0.3)", "Shuffle(), Answer()")
    assert sorted(entry.kind for entry in found.entries) == sorted(f"{rule}, {at}" for rule in rules for at in sites)
    by_kind = {entry.kind: entry for entry in found.entries}
    assert by_kind["Shuffle(), Answer(), mlp_output"].entry == "mlp_output.1 ↔ mlp_output.0"
    (plain,) = measured("bert").entries
    assert by_kind["Shuffle(), Span(0.3), block_output"].counterfactual == plain.counterfactual


def test_usual_kinds_that_these_models_lack_are_said_to():
    found = headroom(spread(mlp()), spread(mlp(), 3), vectors(), {PART: PART}, kinds="usual", steps=0, batches=2)
    assert {"attention heads", "mlp output"} <= set(found.settings["missing"])
    assert set(found.across).isdisjoint(found.settings["missing"])
    heads = {"heads": Kind(site="attention_heads")}
    with pytest.raises(DistillError, match="kind 'heads': .* belongs to no layer"):
        headroom(spread(mlp()), spread(mlp(), 3), vectors(), {PART: PART}, kinds=heads, steps=0)


@pytest.mark.parametrize("make", [t5, LSTM, CNN, mlp])
def test_other_networks(make):
    teacher, student = spread(make(), 1, 0.8), spread(make(), 2, 0.8)
    rows = {t5: lambda: written(), LSTM: lambda: text(24, 6, 6), CNN: images, mlp: vectors}[make]()
    place = {t5: Location(1, stack="decoder"), LSTM: Location(module="embed"), CNN: Location(module="conv1"),
             mlp: Location(module="0", dims=range(4))}[make]  # fmt: skip
    (entry,) = headroom(teacher, student, rows, {place: place}, steps=2, batches=2, schedule=FAST).entries
    assert entry.counterfactual > 0
    assert 0 <= entry.effect_rate <= 1


def written() -> Rows:
    """Texts, and what an encoder–decoder is to write."""
    plain = text(24, labels=False)
    return Rows({**plain.table, "labels": list(text(24, labels=False, seed=1).table["input_ids"])})


def test_masked_texts_are_masked_in_the_measurement_too():
    teacher, student = couple("masked_lm")
    objective = [MaskedLM(Words()), KD(), DIITO(positions=Span(0.3, among="labelled"))]
    found = headroom(teacher, student, text(24, 6, 9, labels=False), INNER, objective=objective, steps=2, batches=2,
                     batch_size=8)  # fmt: skip
    assert found.entries[0].counterfactual > 0


def test_a_served_teacher_gives_the_figures_of_the_network():
    teacher, student = couple("bert")
    found = [
        headroom(each, student, text(24), {**INNER, Location(-1): Location(-1)}, steps=2, batches=2, schedule=FAST)
        for each in (teacher, Served(teacher))
    ]
    for one, other in zip(found[0].entries, found[1].entries, strict=True):
        assert (one.void, one.effect_rate) == (other.void, other.effect_rate)
        assert one.counterfactual == pytest.approx(other.counterfactual, rel=1e-4)
        assert one.cosine.mean == pytest.approx(other.cosine.mean, abs=1e-3)


def test_answers_are_read_by_the_rule():
    class Tupled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return x, self.inner(x)

    teacher, student, place = Tupled(mlp()), Tupled(spread(mlp(), 3)), Location(module="inner.0")
    plain = Location(module="0")
    found = [
        headroom(teacher, student, vectors(), {place: place}, steps=2, answers=1),
        headroom(teacher.inner, student.inner, vectors(), {plain: plain}, steps=2),
    ]
    assert found[0].entries[0].counterfactual == found[1].entries[0].counterfactual > 0


def test_the_settings_are_kept():
    found = measured("bert", steps=2, tolerance=0.2, seed=5)
    assert found.settings == {"batches": 3, "batch_size": 8, "tolerance": 0.2, "seed": 5}
    assert (found.trained_by, found.steps, found.loss) == ("KD(temperature=2.0)", 2, "kd")
    assert list(found.across) == ["Shuffle(), Span(0.3)"]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": KD()}, r"interchanges nothing, so there is no causal term to measure; use objective=\[KD"),
        ({"steps": -1}, r"headroom\(steps=-1, batches=3\) measures nothing"),
        ({"batches": 0}, r"headroom\(steps=0, batches=0\) measures nothing"),
        ({"tolerance": -0.1}, r"headroom\(tolerance=-0.1\) is not 0 or more"),
        ({"kinds": "some"}, r"are no kinds of interchange; use kinds='usual'"),
        ({"mapping": {}}, r"names no entry; use distill.layer_mapping"),
        ({"batch_size": 1}, r"headroom pairs the rows of a batch, and 1 of 24 makes none"),
        ({"mapping": {Location(9): Location(0)}}, r"out of range"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(settings, message):
    with pytest.raises(DistillError, match=message) as error:
        measured("bert", **settings)
    assert "\n" not in str(error.value)


def test_a_causal_model_is_refused():
    with pytest.raises(DistillError, match=r"a causal model is taught from by IIT\(\).*effect_rate"):
        headroom(SUM, Wired(), None, {"inner": Location(module="hidden", dims=range(1))})


def test_weights_that_are_no_numbers_are_refused():
    teacher, student = couple("bert")
    with torch.no_grad():
        student.classifier.bias[0] = float("nan")
    with pytest.raises(DistillError, match="NaN"):
        headroom(teacher, student, text(24), INNER, steps=0, batches=2, schedule=FAST)


def test_shuffled_sources_are_the_default():
    assert measured("bert").entries == measured("bert", objective=[KD(), DIITO(Shuffle())]).entries
