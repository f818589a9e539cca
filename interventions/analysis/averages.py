"""Mean activations over a data set, as operators for mean ablation.

The mean at a location is Σ h / n over the n real tokens of all examples, or over selected positions of them.
"""

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor

from interventions.arguments import checked
from interventions.errors import InterventionError
from interventions.execution.run import Inputs, Where, locations_of
from interventions.locations import Location
from interventions.models.architectures import architecture
from interventions.models.axes import to_vectors
from interventions.models.calls import arguments_of
from interventions.models.places import Place
from interventions.models.wrappers import Model
from interventions.operators import Mean
from interventions.positions import Positions, select
from interventions.runs import check_eval, run_to
from interventions.steps import window_of


@checked
@torch.no_grad()
def mean_of(
    model: Model,
    at: Where,
    batches: Iterable[Inputs] | Inputs,
    *,
    positions: Positions = None,
    remote: bool | str = False,
) -> Mapping[Location, Mean]:
    """Return operators that write the mean activation over a data set, one for each location: for mean ablation.

    Args:
        model: a torch model, or one of nnsight, in eval mode.
        at: a Location or several.
        batches: inputs of the model, batch by batch: mappings, tuples or tensors.
        positions: which tokens to average over, as in `intervene`; None is all real ones.
        remote: for a model of nnsight, where it runs (see `run`); the activations of one batch come back at a time.

    Returns:
        {location: Mean(value)}, which `intervene(model, …)` and `sweep(…, op=…)` take. The value is `[dims]`, or
        `[head, dims]` at sites with heads. The sum is taken in float64, so that the order and the size of the batches
        do not matter.

    Raises:
        InterventionError: no batches; a location that does not exist or has no fixed width; a model in train mode.

    >>> net = torch.nn.Sequential(torch.nn.Identity(), torch.nn.ReLU()).eval()
    >>> mean_of(net, Location(module="0"), [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 6.0]])])
    {Location(module='0'): Mean(value=tensor([2., 4.]))}
    """
    check_eval(model, remote)
    found = architecture(model)
    if isinstance(batches, Mapping | Tensor | str) or not isinstance(batches, Iterable):
        raise InterventionError(
            f"batches is one {type(batches).__name__}, and an iterable of inputs is needed, one for each batch; write "
            "[inputs]."
        )
    locations = locations_of(at)
    pattern = next((at for at in locations if found.place(at).io in ("attention_scores", "attention_pattern")), None)
    if pattern is not None:
        raise InterventionError(
            f"{pattern} is as wide as each batch is long, so it has no mean over batches; use attention_heads."
        )
    sums: dict[Location, Tensor] = {}
    counts = dict.fromkeys(locations, 0)
    dtypes: dict[Location, torch.dtype] = {}
    for inputs in cast(Iterable[Inputs], batches):
        done = run_to(model, inputs, locations, remote=remote)
        arguments = arguments_of(model, done.inputs)
        for location in locations:
            place, state = found.place(location), done.activations[location]
            vectors = state if location.subspace is not None else to_vectors(state, place.axes_of(state))
            selected = _select_vectors(vectors, place, arguments, positions)
            sums[location] = sums.get(location, 0) + selected.double().sum(0)
            counts[location] += len(selected)
            dtypes[location] = vectors.dtype
    if not sums:
        raise InterventionError(
            "no batches were given, so there is no mean; pass an iterable of inputs, and not a spent one."
        )
    return {at: Mean((sums[at] / counts[at]).to(dtypes[at])) for at in locations}


def _select_vectors(vectors: Tensor, place: Place, arguments: Mapping[str, object], positions: Positions) -> Tensor:
    """Return the vectors to average, `[n, …, dims]`."""
    if vectors.ndim < 3:
        return vectors
    real = window_of(vectors, place, None, [arguments], slice(None) if positions is None else positions).real
    if positions is None:
        return vectors[real.to(vectors.device)]
    selected = select(positions, real).to(vectors.device)
    return vectors[selected.rows, selected.columns]
