"""What a step of DIITO runs: each block of the base runs once, and for each pair those above what is written."""

from functools import partial

import pytest
import torch
from torch import nn

from distill import DIITO, KD, Cosine, Crossway, DistillError, InContext, Span
from distill.interchange.mapping import entries_of, layer_mapping
from distill.losses import kd
from distill.training.computation import Computation
from distill.training.fingerprints import of_objective
from interventions import Location, Mixup, Noise, Run
from tests.distill.objectives.test_diito import (
    MAPPINGS,
    SOURCES,
    STACKS,
    batch_of,
    couple,
    differ,
    generator,
    gradients,
    naive,
    terms_of,
)
from tests.distill.tiny_models import bert, gpt2, gpt2_lm, llama, spread, vectors, vit

KINDS = {
    "shuffle": partial(DIITO, vacuous="keep"),
    "detached": partial(DIITO, detach_source=True),
    "crossway": partial(DIITO, Crossway()),
    "in context": partial(DIITO, InContext(0.4)),
    "mixup": partial(DIITO, op=Mixup(1.5)),
    "noise": partial(DIITO, op=Noise(0.7)),
}
RUNS = {"crossway": 2}
"""How many counterfactual runs a pair takes; 1 where nothing is said."""


class Residual(nn.Module):
    """A block of a plain network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).tanh())


def plain(layers: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), *(Residual(8) for _ in range(layers)), nn.Linear(8, 3))


FAMILIES = {"bert": bert, "gpt2": gpt2, "gpt2_lm": gpt2_lm, "llama": llama, "vit": vit, "plain": plain}
BLOCKS = {**STACKS, "vit": "vit.layers", "llama": "model.layers", "plain": ""}


def blocks_of(name: str, model: nn.Module) -> list[nn.Module]:
    if name == "plain":
        return [each for each in model if isinstance(each, Residual)]
    return list(model.get_submodule(BLOCKS[name]))


class Counted:
    """How often each block of a model ran forward and backward, counted at a leaf that runs once in a block."""

    def __init__(self, name: str, model: nn.Module) -> None:
        blocks = blocks_of(name, model)
        self.forward, self.backward = [0] * len(blocks), [0] * len(blocks)
        for number, block in enumerate(blocks):
            leaf = next(m for m in block.modules() if not list(m.children()) and getattr(m, "weight", None) is not None)
            leaf.forward = partial(self._ran, number, leaf.forward)

    def _ran(self, number, original, *args, **kwargs):
        self.forward[number] += 1
        found = original(*args, **kwargs)
        if found.requires_grad:
            found.register_hook(partial(self._went_back, number))
        return found

    def _went_back(self, number, gradient):
        self.backward[number] += 1


def spied(objective: DIITO) -> list:
    """The entries that an objective draws, once it has."""
    entries, original = [], objective.counterfactuals

    def counterfactuals(step, entry, kind=None):
        entries.append(entry)
        return original(step, entry, kind)

    objective.counterfactuals = counterfactuals
    return entries


def bound(layers: int, places: list, source: str) -> list[int]:
    """How often each block of a model must run: its base run, and the counterfactual runs of these places."""
    count = [1] * layers
    for written in places:
        lowest, highest = min(at.layer for at in written), max(at.layer for at in written)
        for layer in range(layers):
            count[layer] += RUNS.get(source, 1) * (layer > lowest) + (source == "in context" and layer <= highest)
    return count


CASES = [
    (name, source, mapping, pairs)
    for name in FAMILIES
    for source in KINDS
    for mapping in ("full", "middle", "late")
    for pairs in (1, 3)
    if source != "in context" or name not in ("vit", "plain")
]


@pytest.mark.parametrize(("name", "source", "mapping", "pairs"), CASES)
def test_no_block_runs_more_often_than_it_must(name, source, mapping, pairs):
    teacher, student = spread(FAMILIES[name](6), 0, 0.2), spread(FAMILIES[name](4), 1, 0.2).train()
    teacher.requires_grad_(False)
    batch = (vectors(5) if name == "plain" else None) or batch_of("vit" if name == "vit" else "bert")
    batch = batch if isinstance(batch, dict) else batch.batch(range(5))
    if name in ("gpt2_lm", "llama"):
        batch = {key: column for key, column in batch.items() if key != "labels"}
    entries = entries_of(layer_mapping(teacher, student, mapping), teacher, student)
    objective = KINDS[source](pairs_per_step=pairs, positions=None if name == "plain" else Span(0.3))
    drawn, counts = spied(objective), [Counted(name, each) for each in (teacher, student)]
    terms = Computation(teacher, student, entries, [KD(), objective])(batch, generator())
    sum(terms.values()).backward()
    assert len(drawn) == pairs
    above, below = bound(6, [e.teacher for e in drawn], source), bound(4, [e.student for e in drawn], source)
    assert (counts[0].forward, counts[1].forward) == (above, below)
    assert not any(counts[0].backward)
    if source == "in context" or name == "plain":  # a source that no position takes from has no gradient
        assert all(back <= ran for back, ran in zip(counts[1].backward, below, strict=True))
    else:
        assert counts[1].backward == below


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("model", ["bert", "gpt2", "vit", "gpt2_lm"])
@pytest.mark.parametrize("pairs", [2, 4])
def test_a_step_of_several_pairs_is_the_mean_of_steps_of_one(model, source, pairs):
    """The draws follow each other in one generator, so the naive steps draw what the one step draws."""
    if (model, source) == ("vit", "in-context"):
        pytest.skip("pictures have no tokens")
    teacher, student = couple(model)
    batch, mapping, draws = batch_of(model), MAPPINGS["drawn"], generator()
    one = SOURCES[source]()
    each = [naive(one, teacher, student, mapping, batch, STACKS[model], draws=draws) for _ in range(pairs)]
    expected = {"kd": each[0]["kd"], "kd_cf": torch.stack([terms["kd_cf"] for terms in each]).mean(0)}
    oracle = gradients(student, expected)
    found = terms_of(teacher, student, mapping, [KD(), SOURCES[source](pairs_per_step=pairs)], batch)
    assert {name: term.item() for name, term in found.items()} == {name: t.item() for name, t in expected.items()}
    assert differ(gradients(student, found), oracle) <= 1e-6
    assert len({terms["kd_cf"].item() for terms in each}) == pairs


def test_one_pair_a_step_is_the_step_without_the_setting():
    teacher, student = couple("bert")
    values = [
        terms_of(teacher, student, MAPPINGS["drawn"], [DIITO(match=[KD(), Cosine()], **each)], batch_of("bert"))
        for each in ({}, {"pairs_per_step": 1})
    ]
    assert values[0] == values[1]
    assert repr(DIITO()) == repr(DIITO(pairs_per_step=1))
    assert repr(DIITO()) != repr(DIITO(pairs_per_step=2))
    assert of_objective(DIITO()) != of_objective(DIITO(pairs_per_step=2))


def test_every_term_is_the_mean_over_the_pairs():
    teacher, student = couple("bert")
    entries = entries_of(MAPPINGS["drawn"], teacher, student)
    objective = DIITO(Crossway(), match=[KD(), Cosine(Location(-1))], pairs_per_step=3)
    step = Computation(teacher, student, entries, [objective]).step(batch_of("bert"), generator())
    found = []
    for _ in range(3):
        kind, entry = objective._draw(step)
        found += list(objective.counterfactuals(step, entry, kind))
    whole = terms_of(teacher, student, MAPPINGS["drawn"], [objective], batch_of("bert"))
    assert list(whole) == ["kd_cf", "cosine_cf"]
    assert len(found) == 6
    by_hand = torch.stack([kd(each.student.logits, each.teacher.logits, 2.0) for each in found]).mean()
    torch.testing.assert_close(whole["kd_cf"], by_hand)


@pytest.mark.parametrize("value", [0, -1])
def test_a_step_takes_a_pair_or_more(value):
    with pytest.raises(DistillError, match=rf"DIITO\(pairs_per_step={value}\) is not above 0"):
        DIITO(pairs_per_step=value)
    with pytest.raises(DistillError, match=r"pairs_per_step must be a whole number"):
        DIITO(pairs_per_step=1.5)


def test_a_source_of_the_batch_takes_no_answers():
    """Of a language model the answers are larger than all that is read, and their rows would be copied in vain."""
    teacher, student = couple("gpt2_lm")
    batch = {name: column for name, column in batch_of("gpt2_lm").items() if name != "labels"}
    objective, taken, original = DIITO(), [], Run.take

    def take(run, rows):
        taken.append(run.output)
        return original(run, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "take", take)
        terms_of(teacher, student, MAPPINGS["one"], [objective], batch)
    assert taken == [None, None]


def test_a_source_that_is_cut_off_keeps_no_graph():
    teacher, student = couple("bert")
    entries = entries_of(MAPPINGS["one"], teacher, student)
    for detach in (False, True):
        objective, graded = DIITO(InContext(0.4), detach_source=detach), []
        step = Computation(teacher, student, entries, [objective]).step(batch_of("bert"), generator())
        assert step.student.logits.requires_grad  # the base run, made before the count
        student.bert.encoder.layer[0].register_forward_hook(lambda *call, graded=graded: graded.append(
            (call[2][0] if isinstance(call[2], tuple) else call[2]).requires_grad
        ))  # fmt: skip
        objective(step)
        student.bert.encoder.layer[0]._forward_hooks.clear()
        assert graded[0] is not detach  # the source run is the first; skipped blocks of a resumed run fire hooks too
