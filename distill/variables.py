"""Interchange intervention accuracy of a network under a causal model: do its places hold what the variables hold?"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distill.causal_models import CausalModel
from distill.errors import DistillError
from distill.inputs import device_of
from distill.mapping import Alignment, Pair, pairs_of
from distill.metrics import batches, evaluating
from distill.outcomes import InterchangeAccuracy
from distill.tallies import Tally, outcome_of
from interventions import interchange, run

STREAM = 2**31 - 1  # pairs that are measured come from another stream than those that are trained on


def variables_accuracy(
    model: CausalModel,
    network: nn.Module,
    mapping: Alignment,
    *,
    pairs: int = 2000,
    seed: int = 0,
    batch_size: int = 256,
) -> InterchangeAccuracy:
    """How often a network answers as the causal model does under the same interchange, for each entry of the mapping.

    Base and source are sampled by the causal model, from a stream of their own. What is drawn depends on `seed` alone,
    not on the batch size. `do nothing` and `replace all` are the network's answers on base and source.

    Raises:
        DistillError: no pairs, a mapping that does not fit, or a place that is the whole state of a layer at every
            position: what comes after it would be that of the source, whatever it computes.

    Geiger et al. 2021 (arXiv:2106.02997), section 3.
    """
    entries = pairs_of(mapping, model, network)
    if pairs < 1:
        raise DistillError(f"pairs={pairs} measures nothing; use e.g. pairs=10_000.")
    for entry in entries:
        whole = next((at for at in entry.student if at == at.whole), None)
        if whole is not None and entry.teacher != (model.output,):
            raise DistillError(
                f"{'+'.join(entry.teacher)} is aligned with all of {whole}, and to swap that is to run the source; "
                "give it a part: dims=…, heads=… or subspace=…, e.g. Location(1, dims=range(0, 16))."
            )
    generator = torch.Generator().manual_seed(hash((seed, STREAM)) % 2**63)
    base, source = model.sample(pairs, generator), model.sample(pairs, generator)
    device = device_of(network)
    with evaluating(network), torch.no_grad():
        sums = [
            _measured(
                model, network, entries, *({k: v[rows].to(device) for k, v in each.items()} for each in (base, source))
            )
            for rows in batches(pairs, batch_size)
        ]
    tally = Tally(torch.cat(sums))
    if not float(tally["effect"].sum()):
        raise DistillError(
            f"none of {pairs} interchanges changes the answer of the causal model, so they say nothing; give it a "
            "sample=… in which more of them do."
        )
    figures = partial(outcome_of, clusters=torch.arange(pairs), seed=seed)
    per_pair = {str(entry): figures(tally.of(i)) for i, entry in enumerate(entries)}
    return InterchangeAccuracy(figures(tally), per_pair, {"pairs": pairs, "seed": seed, "sources": "sampled"})


def _measured(
    model: CausalModel,
    network: nn.Module,
    entries: tuple[Pair, ...],
    base: dict[str, Tensor],
    source: dict[str, Tensor],
) -> Tensor:
    """The sums of these pairs, `[pairs, entries, sums]`, by the names in `distill.tallies.SUMS`."""
    high = [model.run(values) for values in (base, source)]
    places = list(dict.fromkeys(at for entry in entries for at in entry.student))
    low = [run(network, model.encode(values), places) for values in (base, source)]
    found: list[Any] = []
    for entry in entries:
        wanted = model.answers(model.interchange(high[0], {entry.teacher: high[1]}))
        logits = interchange(network, low[0], low[1], entry.student).logits.double()
        right, effect = logits.argmax(-1) == wanted, wanted != model.answers(high[0])
        nothing, everything = (each.logits.argmax(-1) == wanted for each in low)
        surprise = -logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0]
        ones = torch.ones_like(surprise)
        values = [ones, right, effect, right & effect, nothing, everything, surprise, torch.zeros_like(ones)]
        found.append(torch.stack([value.to(surprise) for value in values], -1))
    return torch.stack(found, 1).cpu()
