"""The edits of nnsight on a traced model that carry out what all open blocks do, in every run of it."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from interventions.errors import InterventionError
from interventions.execution.writes import Write
from interventions.hooks.taps import Tap
from interventions.locations import HEAD_SITES, Location
from interventions.models.architectures import Architecture, architecture
from interventions.models.places import Place
from interventions.tracing.hook_points import Computation, Door, Function, Operation, Side
from interventions.tracing.jobs import Job
from interventions.tracing.operations import check_operation, close, opened_modules, operations_of
from interventions.tracing.packing import Parcel
from interventions.tracing.visits import Runs, Visit, Visits, group_by_door


@dataclass(eq=False)
class Block:
    """An open block: an `intervene` or `record` of the user, or the job of a `run`, `interchange` or `sweep`.

    Attributes:
        taps: each tap with its location and place.
        writes: the writes among the taps, in an `intervene` block.
        job: the job, if it is one.
        stays: the reason why the block cannot be sent to another machine; "" if it can.
        sent: True once a trace took it to another machine.
        began: the number of runs of its model on this machine before it was opened.
    """

    taps: Sequence[tuple[Location, Place, Tap]]
    writes: tuple[Write, ...] = ()
    job: Job | None = None
    stays: str = ""
    sent: bool = False
    began: int = 0


@dataclass(eq=False)
class OpenBlocks:
    """The blocks that are open on one model, outermost first, and the edits that carry them out.

    Attributes:
        blocks: the open blocks.
        edits: the edits of the model that belong to them, among those of the user.
        runs: the counter of runs on this machine.
        visits: the reads and writes that the edits make now.
    """

    blocks: list[Block] = field(default_factory=list)
    edits: list[Any] = field(default_factory=list)
    runs: Runs = field(default_factory=Runs)
    visits: Visits | None = None


_opened: "WeakKeyDictionary[Any, OpenBlocks]" = WeakKeyDictionary()
_in_context: ContextVar[tuple[Block, ...]] = ContextVar("blocks on traced models", default=())


@contextmanager
def attached(model: Any, block: Block) -> Iterator[Parcel]:
    """Hold a block open on `model`: every trace inside carries it out, after the blocks around it.

    Yields:
        A parcel of all reads and writes that are made now, which can be sent to another machine.

    Raises:
        InterventionError: a trace is running, or an operation does not exist.
    """
    if model.interleaver.interleaving:
        raise InterventionError(
            "a trace of this model is running, here or in another thread, and it does not see a block that is opened "
            "inside of it; open the block around the trace: with intervene(…): with model.trace(…): …"
        )
    for location, place, _ in block.taps:
        if place.operations:
            check_operation(location, place.module, place.path, place.operations[0])
    before = set(opened_modules(model))
    opened = _opened.setdefault(model, OpenBlocks())
    block.began = opened.runs.count
    opened.blocks.append(block)
    _in_context.set((*_in_context.get(), block))
    try:
        yield _renew(model, opened)
    finally:
        # Not reset(token): a generator may be closed in another context than it was started in.
        _in_context.set(tuple(other for other in _in_context.get() if other is not block))
        opened.blocks.remove(block)
        _renew(model, opened)
        for module in set(opened_modules(model)) - before:
            close(module)


def _renew(model: Any, opened: OpenBlocks) -> Parcel:
    """Replace the edits on the model by those that carry out the blocks that are open now."""
    model._edits[:] = [edit for edit in model._edits if not any(edit is own for own in opened.edits)]
    blocks = tuple(opened.blocks)
    visits = _visits(model, blocks, opened.runs) if blocks else Visits()
    if opened.visits is not None:
        opened.visits.is_over = True
    opened.visits = visits
    parcel = Parcel(model, visits, lambda: _note_sent(blocks))
    others = len(model._edits)
    if blocks:
        _edit(model, parcel, len(visits.encoders), len(visits.visits))
    opened.edits = model._edits[others:]
    return parcel


def _edit(model: Any, parcel: Parcel, encoders: int, visits: int) -> None:
    """Add the edits that note the calls of the model and of its encoders, and one for each visit."""
    with model.edit(inplace=True):
        parcel.call(model, "watch", model)
    for number in range(encoders):
        with model.edit(inplace=True):
            parcel.call(model, "watch_encoder", number)
    for number in range(visits):
        with model.edit(inplace=True):
            parcel.call(model, "visit", number)


def _note_sent(blocks: Sequence[Block]) -> None:
    """Mark the blocks as sent to another machine, or raise InterventionError if one of them cannot be."""
    for block in blocks:
        if block.stays:
            raise InterventionError(block.stays)
        block.sent = True


def ran_here(model: Any, block: Block) -> bool:
    """Return whether the model ran on this machine since the block was opened."""
    return _opened[model].runs.count > block.began


def surroundings(model: Any) -> tuple[object, ...]:
    """Return all that may make two runs of a model differ: the user's edits, and the user's blocks open here."""
    opened = _opened.get(model, OpenBlocks())
    user_edits = [edit for edit in model._edits if not any(edit is own for own in opened.edits)]
    return *user_edits, *(block for block in opened.blocks if block in _in_context.get() and block.job is None)


def _open_in_context(blocks: Sequence[Block]) -> Collection[int]:
    """Return the numbers of the blocks open in the context that makes the run, that of the outermost greenlet."""
    from greenlet import getcurrent

    outermost = getcurrent()
    while outermost.parent is not None:
        outermost = outermost.parent
    context = outermost.gr_context
    in_context = () if context is None else context.get(_in_context, ())
    return {number for number, block in enumerate(blocks) if block in in_context}


def _visits(model: Any, blocks: Sequence[Block], runs: Runs) -> Visits:
    """Return the reads and writes of all blocks, door by door."""
    views = {id(view._module): view for view in model.modules()}
    taps = [
        (views[id(place.module)], door, tap, number)
        for number, block in enumerate(blocks)
        for _, place, tap in block.taps
        for door in _doors(place)
    ]
    writes = tuple(write for block in blocks for write in block.writes)
    job = next((block.job for block in reversed(blocks) if block.job is not None), None)
    visits = group_by_door(taps)
    _check_reachable(visits)
    open_blocks = partial(_open_in_context, blocks)
    return Visits(visits, tuple(_encoders(model, views)), writes, job, open_blocks=open_blocks, runs=runs)


def _check_reachable(visits: Sequence[Visit]) -> None:
    """Raise InterventionError for an operation in an attention function that is computed outside of the forward."""
    computed = {(visit.envoy, visit.door.name) for visit in visits if isinstance(visit.door, Function)}
    for visit in visits:
        names = visit.door.names if isinstance(visit.door, Operation) else ()
        if len(names) > 1 and (visit.envoy, names[0]) in computed:
            raise InterventionError(
                f"{visit.envoy.path} {'.'.join(names)} lies in the attention function, which is run apart where query, "
                "key, value, scores, pattern or heads of the same attention are read or written; name one or the other."
            )


def _doors(place: Place) -> list[Door]:
    """Return the ways to a place: several where the attention function is called in one of several lines."""
    if place.operations:
        return [Operation(place.operations, place.io)]
    if place.io not in HEAD_SITES:
        return [Side("input" if place.io == "input" else "output")]
    operations = operations_of(place.module)
    attention = operations.attention if place.kind == "interface" and operations is not None else None
    if attention is None:
        return [Computation()]
    chooser, calls = attention
    return [Function(name, chooser) for name in calls]


def _encoders(model: Any, views: dict[int, Any]) -> Iterator[Any]:
    """Yield the modules that `generate` calls before the model: the encoder of an encoder–decoder."""
    found: Architecture = architecture(model)
    names = {stack.name: stack for stack in found.stacks}
    if {"encoder", "decoder"} <= names.keys():
        path = names["encoder"].path.rpartition(".")[0]
        if path:
            yield views[id(found.model.get_submodule(path))]


def tap_at(place: Place, function: Any, *, writes: bool = True) -> Tap:
    """Return the tap at a place of a traced model, which may be an operation."""
    return Tap(place.module, place.io, function, place.heads, place.kind, writes, place.turn, place.unflattens)
