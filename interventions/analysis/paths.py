"""Path patching: the effect of one component on another along the direct paths between them.

The sender takes its value from the source, all components between sender and receivers keep that of the base, and the
receivers are read: r = receivers(base; sender ← source, between ← base). The result is the base run with the receivers
replaced by r (Wang et al. 2022, arXiv:2211.00593, section 3.1).
"""

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from interventions.arguments import checked
from interventions.errors import InterventionError
from interventions.execution.run import Inputs, Run, Where, locations_of
from interventions.execution.stamps import unchanged
from interventions.interchanges import interchange
from interventions.locations import BLOCK_SITES, Location, as_location
from interventions.models.architectures import Architecture, architecture
from interventions.models.attentions import kind_of
from interventions.models.modules import model_name
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
    """Return the base run as it would be if only the direct paths from the sender to the receivers had changed.

    This is path patching (Wang et al. 2022, arXiv:2211.00593, section 3.1; Goldowsky-Dill et al. 2023,
    arXiv:2304.05969, section 3). After the source it takes three runs: the base; the base with the sender taken from
    the source and all components between frozen, in which the receivers are read; and the base with the receivers
    replaced by these values. If one receiver lies on the way to another, each is read in a run of its own. The last two
    runs resume from the base.

    Args:
        model: a torch model, or one of nnsight, in eval mode.
        base: inputs, or a Run.
        source: inputs, or a Run, from which the sender is taken.
        sender: where the paths begin, e.g. `Location(3, "attention_heads", heads=1)`.
        receivers: where the paths end, one or several, e.g. `Location(8, "query", heads=[6, 9])` or
            `Location(site="logits")`.
        positions: which tokens of the sender are taken from the source, counted over real tokens; None is all of them.
        receiver_positions: which tokens of the receivers are written; None is all of them.
        freeze: locations that keep their value of the base run, at all tokens. None freezes `attention_output` and
            `mlp_output` of the blocks between, except for the component that the sender is a part of.
        record: locations to keep of the last run, besides the receivers, which are always kept.
        remote: for a model of nnsight, where it runs (see `run`); frozen activations are sent back, and there again.

    Returns:
        The last of these runs, with the activations of receivers and `record`.

    Raises:
        InterventionError: a model in train mode; a receiver that does not come after the sender; places whose order is
            not known (modules by path, another stack, blocks with cross-attention) without `freeze`; and as
            `interchange`.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1)).eval()
    >>> base, source = torch.zeros(4, 2), torch.ones(4, 2)
    >>> done = path_patch(net, base, source, Location(module="0"), Location(module="2"), freeze=())
    >>> torch.equal(done.output, net(source))  # there is one path only, and it is direct
    True
    """
    check_eval(model, remote)
    found = architecture(model)
    sender, ends = as_location(sender), locations_of(receivers)
    if not ends:
        raise InterventionError("no receiver was given; write receivers=Location(5, 'query', heads=3).")
    between = {end: places_between(found, sender, end) if freeze is None else locations_of(freeze) for end in ends}
    frozen = list(dict.fromkeys(place for places in between.values() for place in places))
    with unchanged():
        before = as_run(model, base, frozen, remote=remote)
        if isinstance(source, Run):
            origin = as_run(model, source, sender.whole, remote=remote)
        else:
            origin = run_to(model, source, sender.whole, remote=remote)
        received = {}
        for group in _groups(between):
            held_fixed = list(dict.fromkeys(place for end in group for place in between[end]))
            done = interchange(
                model,
                before,
                {sender: origin, **dict.fromkeys(held_fixed, before)},
                [sender, *held_fixed],
                positions={sender: positions},
                record=[end.whole for end in group],
                remote=remote,
            )
            received.update({end.whole: done.activations[end.whole] for end in group})
        read = replace(before, activations=received, recording=None)
        kept = [*ends, *locations_of(record)]
        return interchange(model, before, read, ends, positions=receiver_positions, record=kept, remote=remote)


def _groups(between: dict[Location, list[Location]]) -> list[list[Location]]:
    """Return the receivers in groups that can share a run, in which none of them is frozen for another."""
    frozen = {place for places in between.values() for place in places}
    ends = list(between)
    return [[end] for end in ends] if frozen & {end.whole for end in ends} else [ends]


def places_between(found: Architecture, sender: Location, receiver: Location) -> list[Location]:
    """Return the locations of the components after the sender and before the receiver."""
    stack = _stack(found, sender)
    start, end = (stage_of(found, stack, location) for location in (sender, receiver))
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
    between = [location for location, stage in places if start < stage < end]
    for location in between:
        check_one_attention(found, location)
    return between


def _stack(found: Architecture, location: Location) -> Stack:
    """Return the stack of blocks that a location is in, or raise if its place among the blocks is not known."""
    if location.module is not None or location.site == "logits":
        raise InterventionError(
            f"where {location} stands among the blocks is not known; name a site of a block, or say what is frozen: "
            "freeze=[…]."
        )
    block = found.place(replace(location, site="block_output", layer=location.layer or 0, heads=None, dims=None)).block
    return next(stack for stack in found.stacks if block in stack.blocks)


def stage_of(found: Architecture, stack: Stack, location: Location) -> Stage:
    """Return the place of a location in the order of computation."""
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
    """Return the site through which a location inside a component writes to the residual stream; "" for others."""
    if location.site.startswith("block") or location.layer is None:
        return ""
    return "mlp_output" if location.site.startswith("mlp") else "attention_output"


def check_one_attention(found: Architecture, location: Location) -> None:
    """Raise InterventionError for a block with a second attention, through which the sender would act."""
    block = found.place(location).block
    if block is None or len(list(_attentions(block))) < 2:
        return
    raise InterventionError(
        f"block {location.layer} of this {model_name(found.model)} has a second attention (cross-attention), which is "
        "no site, between sender and receiver; say what is frozen: freeze=[…, Location(module='…')]."
    )


def _attentions(block: nn.Module) -> Iterator[nn.Module]:
    """Yield the attention modules of a block, innermost ones only."""
    found = [module for module in block.modules() if kind_of(module)]
    yield from (module for module in found if not any(other in found for other in list(module.modules())[1:]))
