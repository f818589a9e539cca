"""What stands on a traced model: what all open blocks do, as edits of nnsight that every run of it carries."""

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
from interventions.tracing.visits import Runs, Visit, Visits, grouped


@dataclass(eq=False)
class Block:
    """What an open block does.

    Attributes:
        taps: with the location and the place of each.
        writes: those of the taps that write, of a block around what the user runs.
        job: the runs of one of our own verbs.
        stays: why it cannot be taken to another machine, if it cannot.
        sent: whether a trace took it there.
        began: how many runs of its model there were on this machine before it was opened.
    """

    taps: Sequence[tuple[Location, Place, Tap]]
    writes: tuple[Write, ...] = ()
    job: Job | None = None
    stays: str = ""
    sent: bool = False
    began: int = 0


@dataclass(eq=False)
class Standing:
    """The blocks that are open on one model, the outermost first, and the edits of the model that are ours."""

    blocks: list[Block] = field(default_factory=list)
    edits: list[Any] = field(default_factory=list)
    runs: Runs = field(default_factory=Runs)
    visits: Visits | None = None


_standing: "WeakKeyDictionary[Any, Standing]" = WeakKeyDictionary()
_mine: ContextVar[tuple[Block, ...]] = ContextVar("blocks on traced models", default=())


@contextmanager
def attached(model: Any, block: Block) -> Iterator[Parcel]:
    """Let every trace of `model` inside do what the block does, after what those around it do.

    Yields:
        All that is done now, as it travels.

    Raises:
        InterventionError: a trace is going on; or an operation does not exist.
    """
    if model.interleaver.interleaving:
        raise InterventionError(
            "a trace of this model is going on, here or in another thread, and what begins inside of it is not seen by "
            "it; open the block around the trace: with intervene(…): with model.trace(…): …"
        )
    for location, place, _ in block.taps:
        if place.operations:
            check_operation(location, place.module, place.path, place.operations[0])
    before = set(opened_modules(model))
    standing = _standing.setdefault(model, Standing())
    block.began = standing.runs.count
    standing.blocks.append(block)
    _mine.set((*_mine.get(), block))
    try:
        yield _renew(model, standing)
    finally:
        # Not reset(token): a generator may be closed in another context than the one it was started in.
        _mine.set(tuple(other for other in _mine.get() if other is not block))
        standing.blocks.remove(block)
        _renew(model, standing)
        for module in set(opened_modules(model)) - before:
            close(module)


def _renew(model: Any, standing: Standing) -> Parcel:
    """Put the edits in place that do what the open blocks do, instead of those before."""
    model._edits[:] = [edit for edit in model._edits if not any(edit is mine for mine in standing.edits)]
    blocks = tuple(standing.blocks)
    visits = _visits(model, blocks, standing.runs) if blocks else Visits()
    if standing.visits is not None:
        standing.visits.is_over = True
    standing.visits = visits
    parcel = Parcel(model, visits, lambda: _note_sent(blocks))
    others = len(model._edits)
    if blocks:
        _edit(model, parcel, len(visits.encoders), len(visits.visits))
    standing.edits = model._edits[others:]
    return parcel


def _edit(model: Any, parcel: Parcel, encoders: int, visits: int) -> None:
    with model.edit(inplace=True):
        parcel.call(model, "watch", model)
    for number in range(encoders):
        with model.edit(inplace=True):
            parcel.call(model, "watch_encoder", number)
    for number in range(visits):
        with model.edit(inplace=True):
            parcel.call(model, "visit", number)


def _note_sent(blocks: Sequence[Block]) -> None:
    for block in blocks:
        if block.stays:
            raise InterventionError(block.stays)
        block.sent = True


def ran_here(model: Any, block: Block) -> bool:
    """Whether a run was made on this machine since a block was opened."""
    return _standing[model].runs.count > block.began


def surroundings(model: Any) -> tuple[object, ...]:
    """What tells runs of a model from each other: the edits of the user, and the blocks that are open here."""
    standing = _standing.get(model, Standing())
    theirs = [edit for edit in model._edits if not any(edit is mine for mine in standing.edits)]
    return *theirs, *(block for block in standing.blocks if block in _mine.get() and block.job is None)


def _in_this_context(blocks: Sequence[Block]) -> Collection[int]:
    """Which of the blocks are open in the context that makes the run: that of the outermost greenlet."""
    from greenlet import getcurrent

    outermost = getcurrent()
    while outermost.parent is not None:
        outermost = outermost.parent
    context = outermost.gr_context
    mine = () if context is None else context.get(_mine, ())
    return {number for number, block in enumerate(blocks) if block in mine}


def _visits(model: Any, blocks: Sequence[Block], runs: Runs) -> Visits:
    views = {id(view._module): view for view in model.modules()}
    met = [
        (views[id(place.module)], door, tap, number)
        for number, block in enumerate(blocks)
        for _, place, tap in block.taps
        for door in _doors(place)
    ]
    writes = tuple(write for block in blocks for write in block.writes)
    job = next((block.job for block in reversed(blocks) if block.job is not None), None)
    visits = grouped(met)
    _check_apart(visits)
    mine = partial(_in_this_context, blocks)
    return Visits(visits, tuple(_encoders(model, views)), writes, job, mine=mine, runs=runs)


def _check_apart(visits: Sequence[Visit]) -> None:
    """Raise for an operation inside of a function that is computed by us, where nobody passes it."""
    computed = {(visit.envoy, visit.door.name) for visit in visits if isinstance(visit.door, Function)}
    for visit in visits:
        names = visit.door.names if isinstance(visit.door, Operation) else ()
        if len(names) > 1 and (visit.envoy, names[0]) in computed:
            raise InterventionError(
                f"{visit.envoy.path} {'.'.join(names)} lies in the attention function, which is run apart where query, "
                "key, value, scores, pattern or heads of the same attention are read or written; name one or the other."
            )


def _doors(place: Place) -> list[Door]:
    """The ways to a place: several where a function is called in one of several lines."""
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
    """What `generate` calls before the model: the encoder of an encoder–decoder."""
    found: Architecture = architecture(model)
    names = {stack.name: stack for stack in found.stacks}
    if {"encoder", "decoder"} <= names.keys():
        path = names["encoder"].path.rpartition(".")[0]
        if path:
            yield views[id(found.model.get_submodule(path))]


def tapped(place: Place, function: Any, *, writes: bool = True) -> Tap:
    """The tap at a place of a traced model, which may be an operation."""
    return Tap(place.module, place.io, function, place.heads, place.kind, writes, place.turn, place.unflattens)
