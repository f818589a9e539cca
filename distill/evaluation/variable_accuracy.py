"""Interchange intervention accuracy of a network under a causal model: do its places hold what the variables hold?"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from distill.causal.feed import Given, given
from distill.causal.model import CausalModel
from distill.causal.values import Values, as_answers
from distill.data.rows import batches
from distill.data.seen_rows import SeenRows, fingerprints
from distill.errors import DistillError
from distill.evaluation.controls import ANOTHER, controls_of, random_parts
from distill.evaluation.outcome import InterchangeAccuracy, Tally, outcome_of
from distill.interchange.mapping import Pair, Sides, pairs_of
from distill.interchange.swap import Ran, encoded, places_of, swapped
from distill.interchange.whole_state import refuse_wholes
from distill.models.finite import check_answers
from distill.models.inputs import device_of, evaluating, refuse_valueless, to_device
from distill.models.outputs import same_answers
from distill.models.reinitialised import reinitialised
from interventions import run

STREAM = 2**31 - 1  # pairs that are measured come from another stream than those that are trained on


def variables_accuracy(
    model: CausalModel,
    network: nn.Module,
    mapping: Sides | tuple[Pair, ...] | str,
    data: Any = None,
    *,
    positions: Any = None,
    pairs: int = 2000,
    seed: int = 0,
    batch_size: int = 256,
    controls: str | Sequence[str] = (),
    exclude: SeenRows | None = None,
) -> InterchangeAccuracy:
    """How often a network answers as the causal model does under the same interchange, for each entry of the mapping.

    Base and source are sampled by the causal model, or rows of `data`, from a stream of their own. What is drawn
    depends on `seed` alone, not on the batch size. `do nothing` and `replace all` are the network's answers on base and
    source. The arguments are those of `interchange_accuracy`.

    Raises:
        DistillError: no pairs, a mapping that does not fit, data that contradicts the causal model or was trained on,
            no interchange that changes the answer, or a place that is the whole state of a layer at every position:
            what comes after it would be that of the source, whatever it computes.

    Geiger et al. 2021 (arXiv:2106.02997), section 3.
    """
    entries, names = pairs_of(mapping, model, network, positions), controls_of(controls)
    refuse_valueless(network, "interchange_accuracy")
    bases = drawn(model, pairs, seed, None if data is None else given(model, data))
    overlap = None if exclude is None else overlapping(bases, exclude, refuse=data is not None)
    few = [to_device({name: value[:16] for name, value in side.items()}, device_of(network)) for side in bases.sides]
    refuse_wholes(model, network, entries, *few)
    tally = measured(model, network, entries, bases, batch_size=batch_size)
    regression = model.classes is None
    if not regression:
        refuse_ineffective(tally, entries, has_rows=data is not None)
    figures = partial(outcome_of, clusters=bases.clusters, seed=seed, regression=regression)
    compared = {}
    for name in names:
        control = _control(name, network, entries, encoded(model, network, few[0]), seed)
        if control is not None:
            told = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed)) if name == "labels" else None
            with same_answers(control[0], network):
                compared[name] = figures(measured(model, *control, bases, batch_size=batch_size, told=told))
    settings = {"pairs": pairs, "seed": seed, "sources": "sampled" if data is None else "rows of the data"}
    per_pair = {name: figures(tally.of(i)) for i, name in enumerate(names_of(entries))}
    return InterchangeAccuracy(figures(tally), per_pair, settings, compared, overlap)


def refuse_ineffective(tally: Tally, entries: tuple[Pair, ...], *, has_rows: bool) -> None:
    """Raise for a variable whose interchange never changes the answer: any network would be right about it."""
    for entry, effect in zip(entries, tally["effect"].sum(0).tolist(), strict=True):
        if not effect:
            more = "give rows" if has_rows else "give the causal model a sample=…"
            raise DistillError(
                f"none of {len(tally.sums)} interchanges of {'+'.join(entry.teacher)} changes the answer of the causal "
                f"model, so they say nothing about {entry}; {more} in which more of them do, raise pairs=…, or leave "
                "it out of the mapping."
            )


def names_of(entries: tuple[Pair, ...]) -> list[str]:
    """The entries as text, those that read alike numbered."""
    texts = [str(entry) for entry in entries]
    return [
        text if texts.count(text) == 1 else f"{text} ({texts[: i + 1].count(text)})" for i, text in enumerate(texts)
    ]


def overlapping(bases: "Bases", exclude: SeenRows, *, refuse: bool) -> float:
    """The share of the bases that were trained on.

    Raises:
        DistillError: there are some, and they are rows of data.
    """
    found = exclude.among(bases.base)
    if refuse and bool((found | (there := exclude.among(bases.source))).any()):
        rows = (found | there).nonzero()[:, 0]
        raise DistillError(
            f"the data holds rows that were trained on, in {len(rows)} of {len(found)} pairs (first: row "
            f"{int(bases.clusters[rows[0]])} or its source); measure on others: keep = ~result.seen.among(data), then "
            "{name: column[keep] for name, column in data.items()}."
        )
    return float(found.double().mean())


def _control(
    name: str, network: nn.Module, entries: tuple[Pair, ...], few: Tensor | dict[str, Tensor], seed: int
) -> tuple[nn.Module, tuple[Pair, ...]] | None:
    """The network and the entries that a control is measured with; None where there is no such control."""
    if name == "network":
        return reinitialised(network, seed + ANOTHER), entries
    if name == "labels":
        return network, entries
    with torch.no_grad(), evaluating(network):
        ran = run(network, few, [at.whole for at in places_of(entries)])
        parts = random_parts(entries, ran, seed)
    return None if parts is None else (network, parts)


@dataclass(frozen=True, eq=False)
class Bases:
    """Pairs of base and source that a measurement is made on.

    Attributes:
        base, source: the inputs of both.
        clusters: the number of the base of each pair; pairs with one number share it.
    """

    base: dict[str, Tensor]
    source: dict[str, Tensor]
    clusters: Int[Tensor, " pairs"]

    def __len__(self) -> int:
        return len(self.clusters)

    @property
    def sides(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Base and source."""
        return self.base, self.source


def drawn(model: CausalModel, pairs: int, seed: int, rows: Given | None = None) -> Bases:
    """Pairs from a stream of their own: sampled by the causal model, or every row of data in turn and another one."""
    if not isinstance(pairs, int) or pairs < 1:
        raise DistillError(f"pairs={pairs} measures nothing; use e.g. pairs=10_000.")
    generator = torch.Generator().manual_seed(hash((seed, STREAM)) % 2**63)
    if rows is None:
        bases, sources = model.sample(pairs, generator), model.sample(pairs, generator)
        marks = fingerprints(bases)
        numbers = {number: i for i, number in enumerate(dict.fromkeys(marks))}
        return Bases(bases, sources, torch.tensor([numbers[number] for number in marks]))
    rounds = -(-pairs // len(rows))
    base = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(rounds)])[:pairs]
    other = (base + torch.randint(1, len(rows), (pairs,), generator=generator)) % len(rows)
    return Bases(rows.batch(base), rows.batch(other), base)


def measured(
    model: CausalModel,
    network: nn.Module,
    entries: tuple[Pair, ...],
    bases: Bases,
    *,
    batch_size: int,
    told: Sequence[int] | Tensor | None = None,
) -> Tally:
    """The sums of every entry on every pair; the subspaces of the places choose as in eval mode.

    Args:
        model: what should be computed.
        network: what is measured.
        entries: variables and their places. Several may be of one variable.
        bases: the pairs.
        batch_size: of the runs of the network; no figure depends on it.
        told: for each pair, of which pair's source the causal model takes its variables; its own by default.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise DistillError(f"batch_size={batch_size} runs nothing; use e.g. batch_size=256.")
    device = device_of(network)
    order = torch.arange(len(bases)) if told is None else torch.as_tensor(told)
    subspaces = [at.subspace for at in places_of(entries) if isinstance(at.subspace, nn.Module)]
    sums = []
    with ExitStack() as modes, torch.no_grad():
        for module in (network, *subspaces):
            modes.enter_context(evaluating(module))
        for rows in batches(len(bases), batch_size):
            base, source, other = (
                model.run(to_device({name: value[chosen] for name, value in side.items()}, device))
                for side, chosen in ((bases.base, rows), (bases.source, rows), (bases.source, order[rows]))
            )
            sums.append(_sums(model, network, entries, (base, source, other)))
    return Tally(torch.cat(sums).cpu())


def _sums(
    model: CausalModel, network: nn.Module, entries: tuple[Pair, ...], high: tuple[Values, Values, Values]
) -> Tensor:
    """The sums of these pairs, `[pairs, entries, sums]`, by the names in `distill.evaluation.outcome.SUMS`."""
    places = places_of(entries)
    runs = [run(network, encoded(model, network, values), places) for values in high[:2]]
    low = [Ran(values, ran) for values, ran in zip(high, runs, strict=False)]
    before, there = (model.decode(ran.logits, values) for ran, values in zip(runs, high, strict=False))
    answers, found = model.answers(high[0]), []
    for entry in entries:
        wanted = model.answers(model.interchange(high[0], {entry.teacher: high[2]}))
        after = model.decode(swapped(model, network, entry, low[0], low[1]).logits, high[0])
        found.append(_compared(after, wanted, answers, before, there))
    return torch.stack(found, 1)


def _compared(after: Tensor, wanted: Tensor, answers: Tensor, before: Tensor, there: Tensor) -> Tensor:
    """For each pair, what its counterfactual adds to every sum, `[pairs, sums]`."""
    ones = torch.ones(len(after), dtype=torch.float64, device=after.device)
    for answered in (after, before, there):
        check_answers(answered, "interchange accuracy")
    if wanted.is_floating_point():
        error = (as_answers(after, wanted) - wanted.to(after)).abs().reshape(len(after), -1).mean(1)
        return torch.stack([ones, *[torch.zeros_like(ones)] * 6, error.double(), torch.zeros_like(ones)], -1)
    right, effect = after.argmax(-1) == wanted, wanted != answers
    nothing, everything = (each.argmax(-1) == wanted for each in (before, there))
    surprise = -after.double().log_softmax(-1).gather(-1, wanted[:, None])[:, 0]
    as_source = torch.isclose(after, there, rtol=1e-4, atol=1e-5).all(1)
    zeros = torch.zeros_like(ones)
    values: list[Any] = [ones, right, effect, right & effect, nothing, everything, surprise, zeros, as_source]
    return torch.stack([value.to(ones) for value in values], -1)
