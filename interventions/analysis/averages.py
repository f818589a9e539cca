"""Mean activations over a data set, as operators for mean ablation.

The mean at a location is Σ h / n over the n real tokens of all examples, or over selected positions of them.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from interventions.analysis.data_batches import batches_of
from interventions.analysis.vectors import check_width, vectors_of
from interventions.arguments import checked
from interventions.errors import InterventionError
from interventions.execution.run import Where, locations_of
from interventions.locations import Location
from interventions.models.architectures import architecture
from interventions.models.wrappers import Model
from interventions.operators import Mean
from interventions.positions import Positions
from interventions.runs import check_eval, run_to


@checked
@torch.no_grad()
def mean_of(
    model: Model,
    at: Where,
    batches: object,
    *,
    positions: Positions = None,
    batch_size: int | None = None,
    remote: bool | str = False,
) -> Mapping[Location, Mean]:
    """Return operators that write the mean activation over a data set, one for each location: for mean ablation.

    Args:
        model: a torch model, or one of nnsight, in eval mode.
        at: a Location or several.
        batches: inputs of the model, batch by batch: mappings, tuples or tensors; or rows that are read by their
            numbers, with `len(rows)` and `rows.batch(numbers)`, such as `distill.Rows`.
        positions: which tokens to average over, as in `intervene`; None is all real ones.
        batch_size: how many rows are read at a time, 32 by default; batches that are given stay as they are.
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
    locations = locations_of(at)
    check_width(found, locations, "mean over batches")
    sums: dict[Location, Tensor] = {}
    counts = dict.fromkeys(locations, 0)
    dtypes: dict[Location, torch.dtype] = {}
    for batch in batches_of(model, batches, batch_size, "batches"):
        done = run_to(model, batch.inputs(), locations, remote=remote)
        for location in locations:
            selected = vectors_of(done, location, positions).values
            sums[location] = sums.get(location, 0) + selected.double().sum(0)
            counts[location] += len(selected)
            dtypes[location] = selected.dtype
    if not sums:
        raise InterventionError(
            "no batches were given, so there is no mean; pass an iterable of inputs, and not a spent one."
        )
    return {at: Mean((sums[at] / counts[at]).to(dtypes[at])) for at in locations}
