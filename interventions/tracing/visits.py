"""What is done in the runs of a traced model, and by whom: the part that goes where the model is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from interventions.execution.requests import check_fired
from interventions.execution.writes import Write
from interventions.hooks.taps import Tap
from interventions.tracing.current_call import CurrentCall
from interventions.tracing.hook_points import Door
from interventions.tracing.jobs import During, Job
from interventions.tracing.operations import close, opened_modules


@dataclass(eq=False)
class Runs:
    """How many runs there were on this machine."""

    count: int = 0


@dataclass(frozen=True, eq=False)
class Visit:
    """A door of a module, and what is put through there.

    Attributes:
        envoy: nnsight's view of the module.
        taps: with the number of the block of each.
    """

    envoy: Any
    door: Door
    taps: tuple[tuple[Tap, int], ...]


@dataclass(eq=False)
class Visits:
    """All that is done in the runs of a traced model, by all blocks that are open on it.

    Attributes:
        visits: one for each door.
        encoders: nnsight's views of the modules that encode before the model is called.
        writes: of the blocks that are open around what the user runs.
        job: the runs that are going on for one of our own verbs.
        mine: which blocks are open in the context (thread, task) in which a run is made; None is all of them.
        away: whether this is a copy, on the machine where the model is: nobody else can see what ran.
        is_over: whether other visits took its place; edits that somebody copied meanwhile do nothing then.
        runs: how many runs there were.
    """

    visits: list[Visit] = field(default_factory=list)
    encoders: tuple[Any, ...] = ()
    writes: tuple[Write, ...] = ()
    job: Job | None = None
    moment: CurrentCall = field(default_factory=CurrentCall)
    mine: Callable[[], Collection[int]] | None = None
    away: bool = False
    is_over: bool = False
    runs: Runs = field(default_factory=Runs)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"mine": None, "runs": Runs()}  # threads and counts are of this machine

    def watch(self, model: Any) -> None:
        """Note each call of the model. It begins before all other workers of a run, and ends before them."""
        if self.is_over:
            return
        self.runs.count += 1
        self.moment.begin()
        self.moment.given(settings_of_run())
        before = set(opened_modules(model)) if self.away else set()
        try:
            forever(lambda: self.moment.called(model._module, *model.inputs))
        finally:
            for module in set(opened_modules(model)) - before if self.away else ():
                close(module)
        if self.away:
            check_fired(self.writes, "this run")

    def watch_encoder(self, number: int) -> None:
        """Note each call of an encoder."""
        encoder = self.encoders[number]
        if not self.is_over:
            forever(lambda: self.moment.encoded(encoder._module, *encoder.inputs))

    def visit(self, number: int) -> None:
        """Stand at a door for one run."""
        visit = self.visits[number]
        mine = None if self.mine is None else self.mine()
        taps = [tap for tap, block in visit.taps if _acts(tap) and (mine is None or block in mine)]
        kept: dict[str, Any] = {}
        if taps and not self.is_over:
            forever(lambda: visit.door.meet(visit.envoy, taps, self.moment, kept))

    def begin(self, number: int) -> tuple[tuple, dict[str, Any]]:
        """The arguments of the next run of the job."""
        assert self.job is not None
        args, kwargs = self.job.begin(number)
        self.moment.stores = bool(kwargs.get("use_cache"))
        return args, kwargs

    def finish(self, tracer: Any) -> None:
        """Stand at the end of a run of the job."""
        assert self.job is not None
        self.job.finish(tracer)

    def answer(self) -> dict[str, Any]:
        """What the job found, in what every machine knows: tensors, lists and the output of the model."""
        assert self.job is not None
        return self.job.answer(away=self.away)


def settings_of_run() -> set[str]:
    """The names of the arguments that the run was begun with, as far as they are not None."""
    from greenlet import getcurrent

    batcher: Any = getcurrent().mediator().interleaver.batcher
    invokes = [] if batcher is None else [kwargs for _, kwargs in batcher.invokes] + [batcher.extra_kwargs]
    return {name for kwargs in invokes for name, value in kwargs.items() if value is not None}


def _acts(tap: Tap) -> bool:
    return not isinstance(tap.function, During) or tap.function.acts


def forever(meet: Callable[[], None]) -> None:
    """Meet what a run brings until it ends."""
    from nnsight.intervention.interleaver import OutOfOrderError
    from nnsight.intervention.iterator import Iterations

    try:
        for _ in Iterations():
            meet()
    except OutOfOrderError:
        pass  # the run is over


def grouped(taps: Sequence[tuple[Any, Door, Tap, int]]) -> list[Visit]:
    """One visit for each door: the taps at it, in their order."""
    doors: dict[tuple[int, Door], list[tuple[Any, Tap, int]]] = {}
    for envoy, door, tap, block in taps:
        doors.setdefault((id(envoy), door), []).append((envoy, tap, block))
    return [Visit(each[0][0], door, tuple((tap, block) for _, tap, block in each)) for (_, door), each in doors.items()]
