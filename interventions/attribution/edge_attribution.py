"""`edge_attribution`: the first-order estimate of path patching for every edge of a model.

The score of the edge u → v is Δu · (∂v / ∂u)ᵀ ∂ metric / ∂ v: the difference of the sender between source and base,
the derivative of the receiver by the sender along the direct path alone, all parts between them held fixed, and the
gradient of the metric at the receiver (edge attribution patching, EAP: Syed et al. 2023, arXiv:2310.10348; with `steps`
EAP-IG: Hanna et al. 2024, arXiv:2403.17806, section 3).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from interventions.analysis.sweeping.batch_sweeps import check_reads_real, check_sizes, check_value
from interventions.arguments import checked
from interventions.attribution.attribution_patch import check_steps, runs_of
from interventions.attribution.derivatives import along_of, check_derivable, gradients, midpoints, part_of_the_way
from interventions.attribution.edges import Edges, is_before, receivers_of, senders_of
from interventions.endings import with_gradients, without_gradients
from interventions.errors import InterventionError
from interventions.execution.examples import examples_in
from interventions.execution.run import Inputs, Run
from interventions.execution.stamps import unchanged
from interventions.interchanges import intervene
from interventions.locations import Location
from interventions.metrics import name_of
from interventions.models.wrappers import Model, module_of
from interventions.operators import Operator, Swap
from interventions.runs import run


@checked
def edge_attribution(
    model: Model,
    base: Inputs | Run,
    source: Inputs | Run,
    metric: Callable[[Any], Tensor],
    *,
    steps: int | None = None,
    stack: str | None = None,
) -> Edges:
    """Estimate, for every edge of a model, how much the metric changes along it: edge attribution patching.

    EAP (Syed et al. 2023, arXiv:2310.10348), and with `steps` EAP-IG (Hanna et al. 2024, arXiv:2403.17806, section 3).
    An edge runs from a sender (the embedding, a head, a feed-forward part) to a later receiver (query, key or value of
    a head, the input of a feed-forward part, the logits), as `path_patch` patches it. The score is the first-order
    estimate of `metric(path_patch(…))` minus the metric of the base. It takes two forward passes, one backward, and
    one short backward for each receiver.

    Args:
        model: a torch model in eval mode, whose blocks have the sites `query`, `key`, `value`, `attention_heads`,
            `mlp_input` and `mlp_output`.
        base: inputs, or a Run.
        source: inputs, or a Run, with as many examples of the same shape.
        metric: a function of the model's output that returns `[batch]`, and has a derivative.
        steps: the number of points between base and source, at the embedding, over which the scores are averaged; None
            takes the derivatives at the base.
        stack: which list of blocks, in a model with several.

    Returns:
        Edges, with a score for each edge and example.

    Raises:
        InterventionError: a model without these sites or with cross-attention; base and source of other shapes; a
            metric without a derivative, or of another shape.
    """
    check_derivable(model, "edge_attribution")
    network = module_of(model)
    check_steps(steps, source, None)
    senders, receivers = senders_of(network, stack), receivers_of(network, stack)
    wholes = list(dict.fromkeys(at.whole for at in senders.values()))
    with unchanged():
        with without_gradients():
            before, after = runs_of(network, base, source, wholes)
        if after is None:
            raise InterventionError("source=None gives no difference along an edge; pass inputs or a Run: source=….")
        examples = examples_in(before.inputs)
        check_sizes({Location(0): Swap()}, examples, after)
        check_reads_real(metric, before)
        baseline = check_value(metric(before.output), examples, "the base run")
        if len(baseline) != examples:
            raise InterventionError(f"the metric returned one number for {examples} examples; return [{examples}].")
        check_same_shapes(before, after, wholes)
        changes = {at: after.vectors(at) - before.vectors(at) for at in wholes}
        scores = torch.zeros(len(senders), len(receivers), examples, dtype=torch.double)
        if steps is None:
            scores += _scores(before, changes, senders, receivers, metric)
        for weight in [] if steps is None else midpoints(steps):
            with part_of_the_way(network, after, weight, along_of(network, None)):
                scores += _scores(before, changes, senders, receivers, metric) / (steps or 1)
    for row, sender in enumerate(senders.values()):
        for column, receiver in enumerate(receivers.values()):
            if not is_before(network, sender, receiver):
                scores[row, column] = torch.nan
    return Edges(scores.to(baseline.dtype), senders, receivers, baseline, name_of(metric))


def check_same_shapes(before: Run, after: Run, places: Sequence[Location]) -> None:
    """Raise InterventionError for a place whose activation has another shape in the source run than in the base run."""
    for at in places:
        shapes = [list(each.vectors(at).shape) for each in (before, after)]
        if shapes[0] != shapes[1]:
            raise InterventionError(
                f"{at} has shape {shapes[0]} in the base run and {shapes[1]} in the source run; pad them to one length."
            )


@dataclass(eq=False)
class _Share:
    """An operator that writes its base, cut off from what computed it, and whose derivative by its shares is a change.

    Attributes:
        change: `[batch, token, dims]` or `[batch, token, head, dims]`, the source minus the base.
        shares: a zero for each example, and each head where there are heads.
    """

    change: Tensor
    shares: Tensor
    needs_source: ClassVar[bool] = False

    @classmethod
    def of(cls, change: Tensor) -> "_Share":
        """Return the operator with new shares."""
        heads = change.shape[2:3] if change.ndim == 4 else ()
        with torch.inference_mode(False):
            return cls(change, torch.zeros(len(change), *heads, requires_grad=True))

    def __call__(self, base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
        shares = self.shares.to(base.device, base.dtype)[:, None, ..., None]
        return base.detach() + shares * self.change


def _scores(
    base: Run,
    changes: dict[Location, Tensor],
    senders: dict[str, Location],
    receivers: dict[str, Location],
    metric: Callable[[Any], Tensor],
) -> Tensor:
    """Return the score of every edge, `[senders, receivers, examples]`, with derivatives at what runs now."""
    inner = [at for at in receivers.values() if at.site != "logits"]
    wholes = list(dict.fromkeys(at.whole for at in inner))
    columns = []
    with with_gradients():
        slopes = _slopes(base, wholes, metric)
        ops = {at: _Share.of(change) for at, change in changes.items()}
        with intervene(base.model, ops):
            done = run(base.model, base.inputs, wholes, resumable=False)
        shares = [op.shares for op in ops.values()]
        for at in receivers.values():
            if at.site == "logits":
                total = torch.as_tensor(metric(done.output)).sum()
            else:
                each = slopes[at.whole] * done.vectors(at.whole)
                total = (each if at.heads is None else each[..., list(at.heads), :]).sum()
            found = dict(zip(ops, gradients(total, shares, f"the metric {name_of(metric)}", keep=True), strict=True))
            columns.append(torch.stack([_of_sender(found[at.whole], at) for at in senders.values()]))
    return torch.stack(columns, 1).double().cpu()


def _slopes(base: Run, at: list[Location], metric: Callable[[Any], Tensor]) -> dict[Location, Tensor]:
    """Return the gradient of the metric at each receiver, by what it reads alone and not by what passes it."""
    leaves: dict[Location, Tensor] = {}

    def leaf(place: Location) -> Operator:
        def write(base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
            leaves[place] = torch.zeros_like(base, requires_grad=True)
            return base + leaves[place]

        return write

    with intervene(base.model, {place: leaf(place) for place in at}):
        total = torch.as_tensor(metric(run(base.model, base.inputs, resumable=False).output)).sum()
    found = gradients(total, [leaves[place] for place in at], f"the metric {name_of(metric)}")
    return dict(zip(at, found, strict=True))


def _of_sender(found: Tensor, sender: Location) -> Tensor:
    """Return the derivative by the share of a sender, `[examples]`."""
    return found if sender.heads is None else found[:, sender.heads[0]]
