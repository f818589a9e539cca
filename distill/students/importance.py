"""Importance of the layers, heads, neurons and dims of a model, from its activations on data.

With the tokens t of the data that are no padding, the mean E over them, a feed-forward neuron j with activation a_tj
and output weights w_j, a head h with output z_th, and the residual stream x as the attention and feed-forward parts of
the blocks read it,

    neuron j     √E ‖a_tj w_j‖²
    head h       √E ‖z_th‖²
    dim i        √(mean over these parts of E x_ti²)
    layer l      1 − E cos(x_t before l, x_t after l)

so a neuron counts for the length of what it adds to the residual stream. Muralidharan et al. 2024 (Minitron,
arXiv:2407.14679), section 2.2, sum the activations of neurons without the output weights, though a scale can move from
one to the other without an effect. The last line is the block influence of Men et al. 2024 (ShortGPT,
arXiv:2403.03853), section 2.2.
"""

from collections.abc import Mapping
from typing import Any

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import one_hot

from distill.data.rows import Rows, batches
from distill.errors import DistillError, checked
from distill.models.inputs import (
    decoder_masked,
    device_of,
    evaluating,
    inputs_of,
    is_placed,
    refuse_valueless,
    teachers,
    to_device,
    uncompiled,
)
from distill.models.trials import check_values, tried
from distill.processes import gather_parts, own_part
from distill.students.layer_search import Criterion, check_search, search_layers
from distill.students.ranking import Importance
from distill.students.readings import Readings
from distill.tasks.loading import training_rows
from interventions import Location, Run, run

UNITS_AT_ONCE = 1024
"""How many units are sent through the projection that reads them at once."""


@checked
def importance(
    model: nn.Module,
    data: Any,
    *,
    search: int | None = None,
    criterion: Criterion = "kl",
    stack: str | None = None,
    batch_size: int = 32,
    answers: Any = None,
) -> Importance:
    """Measure how important the layers, attention heads, feed-forward neurons and dims of a model are on some data.

    `from_layers(teacher, 6, by=found)` and `from_width(teacher, 384, by=found)` keep the most important ones. The data
    are read once, by forward passes without gradients; the figures are sums over all tokens that are no padding, in
    float64, and do not depend on the size of the batches. The model is left as it was.

    A search tries sets of layers as students, `from_layers(model, layers)` without training, and keeps the best: all
    sets where there are at most 100, else layers are left out one after the other, each time the one whose loss is
    smallest (Song et al. 2024, SLEB, arXiv:2402.09025). It shares the weights of the model.

    Args:
        model: a network; a part without heads, neurons or layers is left out.
        data: a Task or its name (its training rows), a file, rows in any form that `fit` takes, or "random".
        search: the number of layers to search for; None searches nothing, and layers are ranked by block influence.
        criterion: of the search: `"kl"`, the KL divergence [nats] of a student's answers to those of the model, or
            `"loss"`, their cross-entropy [nats] with the labels of the data or, without labels, the next tokens.
        stack: the list of blocks to search in, where there are several, as for `from_layers`.
        batch_size: rows of a forward.
        answers: which part of the output of the model is its answer, as for `fit`; only a search reads it.

    Returns:
        The figures, for each place of the model; they print, draw themselves and become tables.

    Raises:
        DistillError: data that the model does not run on, no token that is no padding, activations that are not finite,
            or a search in a model whose layers cannot be taken out.

    Muralidharan et al. 2024 (arXiv:2407.14679), section 2.2; Men et al. 2024 (arXiv:2403.03853), section 2.2.
    """
    model = uncompiled(model)
    if not is_placed(model):
        refuse_valueless(model, "importance")
    if search is not None:
        check_search(model, search, stack)  # measuring takes a while
    rows = training_rows(data, model)
    read = Readings.of(model)
    totals = _totals(model, rows, read, batch_size)
    found = None
    if search is not None:
        found = search_layers(
            model, rows, search, stack=stack, criterion=criterion, batch_size=batch_size, answers=answers
        )
    return Importance(
        layers={after: 1 - float(totals.mean(after)) for after in read.layers},
        heads={at: totals.mean(at).sqrt() for at in read.heads},
        neurons={at: _written(model, totals.mean(at), module).sqrt() for at, module in read.neurons.items()},
        dims=_dims([totals.mean(at) for at in read.stream]),
        search=found,
        tokens={after.stack or "": totals.counts[after] for after in read.layers},
    )


class _Totals:
    """Sums over the tokens of the data, by location: squares of activations, of layers cosines."""

    def __init__(self) -> None:
        self.sums: dict[Location, Tensor] = {}
        self.counts: dict[Location, int] = {}

    def add(self, at: Location, values: Tensor, count: int) -> None:
        """Add a sum over so many tokens."""
        self.sums[at] = self.sums.get(at, 0.0) + values.cpu()
        self.counts[at] = self.counts.get(at, 0) + count

    def mean(self, at: Location) -> Tensor:
        """Return the mean over all tokens.

        Raises:
            DistillError: no token was measured, or the sum is not finite.
        """
        if not self.counts.get(at):
            raise DistillError(
                f"{at} has no token that is no padding in these data; give rows with an attention_mask that is not 0."
            )
        if not self.sums[at].isfinite().all():
            raise DistillError(
                f"activations at {at} are not finite on these data; look at them: run(model, inputs, {str(at)!r})."
            )
        return self.sums[at] / self.counts[at]


def _totals(model: nn.Module, rows: Rows, read: Readings, batch_size: int) -> _Totals:
    """Return the sums over all rows; where measurements are divided among processes, each reads a part of them."""
    places = own_part(torch.arange(len(rows)))

    def own() -> _Totals:
        totals = _Totals()
        with evaluating(model), torch.no_grad():
            for few in batches(len(places), batch_size) if len(places) else ():
                batch = decoder_masked(model, to_device(teachers(rows.batch(places[few])), device_of(model)))
                given = inputs_of(model, batch)
                with tried("the model", model, given):
                    ran = run(model, given, list(read.places), resumable=False)
                _add_batch(totals, ran, read, batch)
        return totals

    every = _Totals()
    for each in gather_parts(own):
        for at, values in each.sums.items():
            every.add(at, values, each.counts[at])
    return every


def _add_batch(totals: _Totals, ran: Run, read: Readings, batch: Mapping[str, Tensor]) -> None:
    """Add the sums over the tokens of a batch."""
    for after, before in read.layers.items():
        one, other = _real(ran, before, read, batch), _real(ran, after, read, batch)
        if one.shape != other.shape:
            raise DistillError(
                f"{after} has shape {list(other.shape)} and its input {list(one.shape)} over all tokens, so "
                "they have no angle; importance is for models whose layers keep width and tokens."
            )
        totals.add(after, torch.cosine_similarity(one, other, dim=-1).sum(), len(one))
    for at in read.heads:
        heads = _real(ran, at, read, batch)
        totals.add(at, reduce(heads.square(), "token head d -> head", "sum"), len(heads))
    for at in (*read.neurons, *read.stream):
        values = _real(ran, at, read, batch)
        totals.add(at, reduce(values.square(), "token unit -> unit", "sum"), len(values))


def _real(
    ran: Run, at: Location, read: Readings, batch: Mapping[str, Tensor]
) -> Float[Tensor, "tokens dims"] | Float[Tensor, "tokens heads dims"]:
    """Return an activation at the tokens that are no padding, in double precision.

    Raises:
        DistillError: which tokens are padding is unknown there.
    """
    states = ran.vectors(at)
    check_values("the model", states)
    if states.ndim == 2:
        return states.double()
    rows, width = states.shape[:2]
    real = read.places[at].real(batch, rows, width)
    if real is None:
        raise DistillError(
            f"which of the {width} positions of {at} are padding is unknown, as the mask has another width; give rows "
            "of one length, without an attention_mask."
        )
    return states[real.to(states.device)].double()


def _written(model: nn.Module, squares: Float[Tensor, " units"], projection: nn.Module) -> Float[Tensor, " units"]:
    """Return the mean of ‖a w‖² of each neuron, w its weights in the projection that reads it.

    Args:
        model: gives type and device, where the projection holds no floating-point weights.
        squares: the mean squares of the activations.
        projection: a linear map of the units, whatever its weights are stored as.
    """
    held = (*projection.parameters(), *model.parameters())
    parameter = next(each for each in held if each.is_floating_point())
    lengths = []
    with torch.no_grad():
        nothing = projection(torch.zeros(1, len(squares), device=parameter.device, dtype=parameter.dtype))
        for few in torch.arange(len(squares), device=parameter.device).split(UNITS_AT_ONCE):
            units = one_hot(few, len(squares)).to(parameter.dtype)
            lengths.append((projection(units).double() - nothing.double()).square().sum(-1).cpu())
    return squares * torch.cat(lengths)


def _dims(squares: list[Tensor]) -> Tensor | None:
    """Return the root of the mean over the places of the stream; None where they differ in width."""
    if not squares or len({len(each) for each in squares}) > 1:
        return None
    return torch.stack(squares).mean(0).sqrt()
