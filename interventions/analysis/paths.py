"""What one component sends to another along the paths between them: path patching."""

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from interventions.arguments import checked
from interventions.errors import InterventionError
from interventions.execution.run import Inputs, Run, Where, locations_of
from interventions.interchanges import interchange
from interventions.locations import BLOCK_SITES, Location, as_location
from interventions.models.architectures import Architecture, architecture
from interventions.models.modules import model_name
from interventions.models.sites import kind_of
from interventions.models.stacks import Stack
from interventions.models.wrappers import Model
from interventions.positions import Positions
from interventions.runs import as_run, check_eval, run_to

COMPONENTS = ("attention_output", "mlp_output")  # what writes into the residual stream
Stage = tuple[int, int]  # block, and place in the order of BLOCK_SITES


@checked
def path_patch(
    model: Model,
    base: Inputs | Run,
    source: Inputs | Run,
    sender: Location | str,
    receivers: Where,
    *,
    positions: Positions = None,
    receiver_positions: Positions = None,
    freeze: Where | None = None,
    record: Where = (),
    remote: bool | str = False,
) -> Run:
    """The base run with the receivers given what they would be if only the direct paths from the sender had changed.

    Wang et al. 2022 (arXiv:2211.00593), section 3.1; Goldowsky-Dill et al. 2023 (arXiv:2304.05969), section 3.
    Three runs after that of the source: the base; the base with the sender taken from the source and everything between
    frozen, in which the receivers are read; the base with the receivers as they were read. Two receivers of which one
    lies on the way to the other are read in a run each. The last two resume from the base.

    Args:
        base: inputs, or a Run of them.
        source: inputs or a Run that the sender is taken from.
        sender: where the paths begin, e.g. `Location(3, "attention_heads", heads=1)`.
        receivers: where they end, one or several, e.g. `Location(8, "query", heads=[6, 9])` or
            `Location(site="logits")`.
        positions: which tokens of the sender are taken from the source, counted over real tokens; None is all.
        receiver_positions: which tokens of the receivers are written; None is all.
        freeze: what keeps its value of the base run, at all tokens. None: `attention_output` and `mlp_output` of the
            blocks between, but for the component that the sender is a part of.
        record: locations to keep of the last run, besides the receivers, which are always kept.
        remote: of a model of nnsight, where it runs, see `run`; what is frozen comes back, and goes there again.

    Returns:
        The last of these runs.

    Raises:
        InterventionError: a model in train mode; a receiver that does not come after the sender; places whose order is
            not known (modules by path, another stack, blocks with cross-attention) without `freeze`; and as
            `interchange`.
    """
    check_eval(model, remote)
    found = architecture(model)
    sender, ends = as_location(sender), locations_of(receivers)
    if not ends:
        raise InterventionError("no receiver was given; write receivers=Location(5, 'query', heads=3).")
    between = {end: _between(found, sender, end) if freeze is None else locations_of(freeze) for end in ends}
    frozen = list(dict.fromkeys(place for places in between.values() for place in places))
    before = as_run(model, base, frozen, remote=remote)
    if isinstance(source, Run):
        origin = as_run(model, source, sender.whole, remote=remote)
    else:
        origin = run_to(model, source, sender.whole, remote=remote)
    received = {}
    for group in _groups(between):
        held = list(dict.fromkeys(place for end in group for place in between[end]))
        done = interchange(
            model,
            before,
            {sender: origin, **dict.fromkeys(held, before)},
            [sender, *held],
            positions={sender: positions},
            record=[end.whole for end in group],
            remote=remote,
        )
        received.update({end.whole: done.activations[end.whole] for end in group})
    read = replace(before, activations=received, recording=None)
    kept = [*ends, *locations_of(record)]
    return interchange(model, before, read, ends, positions=receiver_positions, record=kept, remote=remote)


def _groups(between: dict[Location, list[Location]]) -> list[list[Location]]:
    """The receivers that can be read in one run: none is frozen for another."""
    frozen = {place for places in between.values() for place in places}
    ends = list(between)
    return [[end] for end in ends] if frozen & {end.whole for end in ends} else [ends]


def _between(found: Architecture, sender: Location, receiver: Location) -> list[Location]:
    """The components after the sender and before the receiver."""
    stack = _stack(found, sender)
    start, end = (_stage(found, stack, location) for location in (sender, receiver))
    if end <= start:
        raise InterventionError(
            f"{receiver} does not come after the sender {sender}, so nothing is sent to it; name a later receiver."
        )
    own = _component(sender)
    places = [
        (Location(layer, site, stack=sender.stack or receiver.stack), (layer, BLOCK_SITES.index(site)))
        for layer in range(len(stack.blocks))
        for site in COMPONENTS
        if (layer, site) != (start[0], own)
    ]
    held = [location for location, stage in places if start < stage < end]
    for location in held:
        _check_one_attention(found, location)
    return held


def _stack(found: Architecture, location: Location) -> Stack:
    if location.module is not None or location.site == "logits":
        raise InterventionError(
            f"where {location} stands among the blocks is not known; name a site of a block, or say what is frozen: "
            "freeze=[…]."
        )
    block = found.place(replace(location, site="block_output", layer=location.layer or 0, heads=None, dims=None)).block
    return next(stack for stack in found.stacks if block in stack.blocks)


def _stage(found: Architecture, stack: Stack, location: Location) -> Stage:
    """Where in the order of computation a location is."""
    if location.site == "logits" and stack is found.stacks[-1]:
        return len(stack.blocks), 1
    if _stack(found, location) is not stack:
        raise InterventionError(
            f"{location} lies in another stack than the sender, and what lies between is not known; say what is "
            "frozen: freeze=[…]."
        )
    if location.layer is None:
        return (0, 0) if location.site == "embedding" else (len(stack.blocks), 0)
    return location.layer % len(stack.blocks), BLOCK_SITES.index(location.site)


def _component(location: Location) -> str:
    """What writes into the residual stream for a place inside attention or feed-forward part; "" for others."""
    if location.site.startswith("block") or location.layer is None:
        return ""
    return "mlp_output" if location.site.startswith("mlp") else "attention_output"


def _check_one_attention(found: Architecture, location: Location) -> None:
    """Raise for a block with a second attention, which would let the sender through."""
    block = found.place(location).block
    if block is None or len(list(_attentions(block))) < 2:
        return
    raise InterventionError(
        f"block {location.layer} of this {model_name(found.model)} has a second attention (cross-attention), which is "
        "no site, between sender and receiver; say what is frozen: freeze=[…, Location(module='…')]."
    )


def _attentions(block: nn.Module) -> Iterator[nn.Module]:
    found = [module for module in block.modules() if kind_of(module)]
    yield from (module for module in found if not any(other in found for other in list(module.modules())[1:]))
