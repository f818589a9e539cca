"""What a step of DIITO, IIT and DAS costs: forward and backward, without the optimizer.

DIITO: BERT classifiers of 12 and 6 blocks, 16 texts of 32 tokens (4 at width 768), every block mapped; IIT and DAS: a
transformer of 6 blocks of torch on 64 texts of 8 tokens, and a causal model that adds three digits.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import distill
from distill import DAS, DIITO, IIT, KD, CausalModel, InContext, Span
from distill.causal.feed import Samples
from distill.interchange.mapping import Entry, entries_of
from distill.losses import kd
from distill.models.inputs import inputs_of
from distill.training.computation import Computation
from interventions import Location, Rotation, interchange, run

from .measuring import LIMIT, NOW, UNIT, Case, Given, same
from .models import VOCABULARY, Parts, bert, tokens

BATCH, LENGTH, TEACHER, STUDENT = 16, 32, 12, 6
ROWS, DIGITS, BLOCKS = 64, 10, 6


def seeded(device: torch.device) -> Iterator[torch.Generator]:
    """Generators of one seed after the other, which each side of a case takes in the same order."""
    return (torch.Generator(device).manual_seed(number) for number in count())


def stepping(terms: Callable[[torch.Generator], Any], trained: nn.Module, device: torch.device) -> Callable[[], Tensor]:
    """A step that computes gradients and throws them away."""
    generators = seeded(device)

    def step() -> Tensor:
        with torch.enable_grad():
            found = terms(next(generators))
            loss = found if isinstance(found, Tensor) else torch.stack([*found.values()]).sum()
            loss.backward()
            trained.zero_grad()
        return loss.detach()

    return step


def diito_by_hand(
    models: tuple[Parts, Parts],
    entries: tuple[Entry, ...],
    batch: dict,
    generator: torch.Generator,
    *,
    context: bool = False,
    pairs: int = 1,
) -> Tensor:
    """KD and DIITO with every block run once that must: base runs, and counterfactuals from the block after the swap.

    Args:
        models: teacher and student.
        entries: of the mapping, each of one block of the student.
        batch: without padding.
        generator: draws as DIITO does.
        context: whether sources are new texts, which run up to the swap, rather than other rows.
        pairs: how many pairs of counterfactuals.
    """
    bases = []
    for side, model in enumerate(models):
        with torch.set_grad_enabled(side == 1):
            states = model.up(model.embed(batch))
            bases.append((states, model.head(states[-1])))
    device, losses = generator.device, []
    rows, width = batch["input_ids"].shape
    real = torch.ones(rows, width, dtype=torch.bool, device=device)
    for _ in range(pairs):
        entry = entries[int(torch.randint(len(entries), (), generator=generator, device=device))]
        if context:
            new = InContext(0.3).draw(batch, VOCABULARY, generator)
        else:
            other = torch.randperm(rows, generator=generator, device=device)
        uniform = torch.rand(rows, 2, width, generator=generator, device=device)
        written, read = Span(0.3).draw(real, real, uniform, aligned=context)
        at, taken = written.nonzero(as_tuple=True), read.nonzero(as_tuple=True)
        after = []
        for side, (model, places) in enumerate(zip(models, (entry.teacher, entry.student), strict=True)):
            layers, states = [place.layer for place in places], bases[side][0]
            with torch.set_grad_enabled(side == 1):
                if context:
                    there = model.up(model.embed(new), end=max(layers) + 1)
                    source = {layer: there[layer][taken] for layer in layers}
                else:
                    source = {layer: states[layer][other[taken[0]], taken[1]] for layer in layers}
                writes = {layer: partial(torch.index_put, indices=at, values=source[layer]) for layer in layers}
                swapped = writes[min(layers)](states[min(layers)])
                ran = model.up(swapped, min(layers) + 1, writes=writes)
                after.append(model.head(ran[-1] if ran else swapped))
        losses.append(kd(after[1], after[0], 2.0))
    return kd(bases[1][1], bases[0][1], 2.0) + torch.stack(losses).mean()


def reference_scheme(models: Any, entries: tuple[Entry, ...], batch: dict, generator: torch.Generator) -> Tensor:
    """KD and DIITO as a reference implementation has them: base, source and counterfactual from scratch in both."""
    entry = entries[int(torch.randint(len(entries), (), generator=generator, device=generator.device))]
    rows, width = batch["input_ids"].shape
    other = torch.randperm(rows, generator=generator, device=generator.device)
    shuffled = {name: column[other] for name, column in batch.items()}
    real = torch.ones(rows, width, dtype=torch.bool, device=generator.device)
    uniform = torch.rand(rows, 2, width, generator=generator, device=generator.device)
    chosen, taken = Span(0.3).draw(real, real, uniform)
    logits = []
    for side, (model, places) in enumerate(zip(models, (entry.teacher, entry.student), strict=True)):
        with torch.set_grad_enabled(side == 1):
            base = run(model, inputs_of(model, batch), resumable=False)
            source = run(model, inputs_of(model, shuffled), places, resumable=False)  # to the end, as there
            swapped = interchange(
                model, base.inputs, source, places, positions=chosen, source_positions=taken, resume=False
            )
        logits.append((base.logits, swapped.logits))
    return kd(logits[1][0], logits[0][0], 2.0) + kd(logits[1][1], logits[0][1], 2.0)


def diito(given: Given, width: int, context: bool = False, pairs: int = 1) -> Case:
    """A step of KD and DIITO; the unit is one of KD, the limit runs each block that must run, once."""
    teacher, student = bert(TEACHER, width, 0).eval(), bert(STUDENT, width, 1).train()
    for model in (teacher, student):
        model.to(given.device, given.dtype)
    teacher.requires_grad_(False)
    entries = entries_of(distill.layer_mapping(teacher, student, "full"), teacher, student)
    batch = tokens(BATCH * 192 // width, LENGTH, given.device)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    sources = {"sources": InContext(0.3)} if context else {}
    objective = DIITO(match=KD(2.0), vacuous="keep", pairs_per_step=pairs, **sources)
    plain = Computation(teacher, student, entries, [KD(2.0)]).to(given.device)
    ours = Computation(teacher, student, entries, [KD(2.0), objective]).to(given.device)
    parts = (Parts(teacher), Parts(student))
    terms: dict[str, Callable[[torch.Generator], Any]] = {
        UNIT: lambda generator: plain(batch, generator),
        LIMIT: lambda generator: diito_by_hand(parts, entries, batch, generator, context=context, pairs=pairs),
        NOW: lambda generator: ours(batch, generator),
    }
    if not context and pairs == 1:
        terms["reference scheme"] = lambda generator: reference_scheme((teacher, student), entries, batch, generator)

    def sides() -> dict[str, Callable[[], Tensor]]:
        return {name: stepping(each, student, given.device) for name, each in terms.items()}

    def check() -> None:
        first = {name: side() for name, side in sides().items()}
        for name in first.keys() - {UNIT, LIMIT}:
            same(first[LIMIT], first[name], 1e-3 if given.dtype == torch.float32 else 0.1)

    return Case(sides(), 1.05, "a step of KD", check, drawn=True)


def encode(values: dict[str, Tensor]) -> Tensor:
    """Write the three digits twice, each time with a sign at the end."""
    signs = [torch.full_like(values["a"], DIGITS + number) for number in (0, 1)]
    return torch.stack([values[name] if isinstance(name, str) else signs[name] for name in [*"abc", 0, *"abc", 1]], 1)


ADDITION = CausalModel(
    inputs={name: range(DIGITS) for name in "abc"},
    mechanisms={"ab": lambda a, b: a + b, "total": lambda ab, c: ab + c},
    output="total",
    domains={"total": range(3 * DIGITS - 2)},
    encode=encode,
)


class Network(nn.Module):
    """A transformer of blocks that torch ships."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(DIGITS + 2, width)
        self.positions = nn.Parameter(torch.randn(8, width) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
            for _ in range(BLOCKS)
        )
        self.head = nn.Linear(width, 3 * DIGITS - 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.rest(self.embed(ids), 0)

    def embed(self, ids: Tensor) -> Tensor:
        return self.embedding(ids) + self.positions

    def up(self, state: Tensor, first: int, end: int) -> Tensor:
        for layer in self.layers[first:end]:
            state = layer(state)
        return state

    def rest(self, state: Tensor, first: int) -> Tensor:
        return self.head(self.up(state, first, BLOCKS)[:, -1])


def sources_of(generator: torch.Generator) -> dict[str, Tensor]:
    """Draw the sources of a step, as the objectives do."""
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    return ADDITION.sample(ROWS, torch.Generator().manual_seed(int(seed)), generator.device)


def bases_of(generator: torch.Generator) -> dict[str, Tensor]:
    return ADDITION.sample(ROWS, torch.Generator().manual_seed(generator.initial_seed()), generator.device)


def network_of(width: int, given: Given) -> Network:
    torch.manual_seed(0)
    return Network(width).to(given.device)


def iit(given: Given, width: int) -> Case:
    """A step of IIT on half of the dims after the fourth block."""
    network, end = network_of(width, given).train(), BLOCKS // 2 + 1
    entries = entries_of({"ab": Location(end - 1, dims=range(width // 2))}, ADDITION, network)
    computation = Computation(None, network, entries, [IIT()], feed=Samples(ADDITION, 0, ROWS)).to(given.device)

    def by_hand(generator: torch.Generator) -> Tensor:
        base, source = bases_of(generator), sources_of(generator)
        here, there = (network.up(network.embed(encode(each)), 0, end) for each in (base, source))
        swapped = torch.cat([there[..., : width // 2], here[..., width // 2 :]], -1)
        total, counterfactual = base["a"] + base["b"] + base["c"], source["a"] + source["b"] + base["c"]
        loss = functional.cross_entropy(network.rest(here, end), total)
        return loss + functional.cross_entropy(network.rest(swapped, end), counterfactual)

    terms = {LIMIT: by_hand, NOW: lambda generator: computation(bases_of(generator), generator)}
    return of_causal(terms, network, given, 1.1)


def das(given: Given, width: int) -> Case:
    """A step of DAS on a quarter of the directions after the fourth block of a frozen network."""
    network, end = network_of(width, given).eval().requires_grad_(False), BLOCKS // 2 + 1
    rotation = Rotation(width // 4).to(given.device)
    entries = entries_of({"ab": Location(end - 1, subspace=rotation)}, ADDITION, network)
    trained, feed = nn.ModuleList([rotation]), Samples(ADDITION, 0, ROWS)
    computation = Computation(None, network, entries, [DAS()], feed=feed, trained=trained).to(given.device)
    first = next(seeded(given.device))
    computation(bases_of(first), first)  # the rotation takes its width from the place

    def by_hand(generator: torch.Generator) -> Tensor:
        base, source = bases_of(generator), sources_of(generator)
        with torch.no_grad():
            here, there = (network.up(network.embed(encode(each)), 0, end) for each in (base, source))
        directions = rotation.directions
        swapped = here + ((there - here) @ directions) @ directions.T
        return functional.cross_entropy(network.rest(swapped, end), source["a"] + source["b"] + base["c"])

    terms = {LIMIT: by_hand, NOW: lambda generator: computation(bases_of(generator), generator)}
    return of_causal(terms, trained, given, 1.1)


def of_causal(terms: dict[str, Callable], trained: nn.Module, given: Given, at_most: float) -> Case:
    def sides() -> dict[str, Callable[[], Tensor]]:
        return {name: stepping(each, trained, given.device) for name, each in terms.items()}

    def check() -> None:
        first = sides()
        same(first[LIMIT](), first[NOW](), 1e-4)

    return Case(sides(), at_most, check=check)


WIDTHS = (192, 768)
CASES: dict[str, Callable[[Given], Case]] = {
    **{f"DIITO step, 12 → 6 × {width}": partial(diito, width=width) for width in WIDTHS},
    "DIITO step, in context, 12 → 6 × 192": partial(diito, width=192, context=True),
    "DIITO step, 4 pairs, 12 → 6 × 192": partial(diito, width=192, pairs=4),
    **{f"IIT step, 6 × {width}": partial(iit, width=width) for width in (64, 192)},
    **{f"DAS step, 6 × {width}": partial(das, width=width) for width in (64, 192)},
}
