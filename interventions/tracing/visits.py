"""Visits: the reads and writes in the runs of a traced model, as they are sent to the machine of the model."""

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
    """A counter of the runs of a model on this machine."""

    count: int = 0


@dataclass(frozen=True, eq=False)
class Visit:
    """The taps at one door of a module.

    Attributes:
        envoy: nnsight's view of the module.
        door: the way to the tensor: a side of the module, an operation in its forward, or its attention.
        taps: each tap with the number of its block.
    """

    envoy: Any
    door: Door
    taps: tuple[tuple[Tap, int], ...]


@dataclass(eq=False)
class Visits:
    """All reads and writes in the runs of a traced model, by all blocks that are open on it.

    Attributes:
        visits: one for each door.
        encoders: nnsight's views of the modules that encode before the model is called.
        writes: the writes of the user's `intervene` blocks.
        job: the job of a `run`, `interchange` or `sweep` in progress.
        current: the current call of the model.
        open_blocks: returns the numbers of the blocks that are open in the context (thread, task) of a run; None means
            all of them.
        away: True for the copy on the machine of the model, where alone it is known what ran.
        is_over: True once other visits have replaced these; copies of the edits that carry them then do nothing.
        runs: the counter of runs.
    """

    visits: list[Visit] = field(default_factory=list)
    encoders: tuple[Any, ...] = ()
    writes: tuple[Write, ...] = ()
    job: Job | None = None
    current: CurrentCall = field(default_factory=CurrentCall)
    open_blocks: Callable[[], Collection[int]] | None = None
    away: bool = False
    is_over: bool = False
    runs: Runs = field(default_factory=Runs)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"open_blocks": None, "runs": Runs()}  # contexts and counts belong to this machine

    def watch(self, model: Any) -> None:
        """Note each call of the model. This edit begins before all others of a run, and ends before them."""
        if self.is_over:
            return
        self.runs.count += 1
        self.current.begin()
        self.current.note_settings(settings_of_run())
        before = set(opened_modules(model)) if self.away else set()
        try:
            repeat_until_end(lambda: self.current.begin_call(model._module, *model.inputs))
        finally:
            for module in set(opened_modules(model)) - before if self.away else ():
                close(module)
        if self.away:
            check_fired(self.writes, "this run")

    def watch_encoder(self, number: int) -> None:
        """Note each call of an encoder."""
        encoder = self.encoders[number]
        if not self.is_over:
            repeat_until_end(lambda: self.current.begin_encoding(encoder._module, *encoder.inputs))

    def visit(self, number: int) -> None:
        """Apply the taps at a door, each time that the model passes it in one run."""
        visit = self.visits[number]
        blocks = None if self.open_blocks is None else self.open_blocks()
        taps = [tap for tap, block in visit.taps if _acts(tap) and (blocks is None or block in blocks)]
        memory: dict[str, Any] = {}
        if taps and not self.is_over:
            repeat_until_end(lambda: visit.door.meet(visit.envoy, taps, self.current, memory))

    def begin(self, number: int) -> tuple[tuple, dict[str, Any]]:
        """Begin a run of the job, and return its arguments."""
        assert self.job is not None
        args, kwargs = self.job.begin(number)
        self.current.stores = bool(kwargs.get("use_cache"))
        return args, kwargs

    def finish(self, tracer: Any) -> None:
        """Wait for the end of a run of the job, and keep its output."""
        assert self.job is not None
        self.job.finish(tracer)

    def answer(self) -> dict[str, Any]:
        """Return what the job found, as tensors, plain data and outputs of the model, which every machine can load."""
        assert self.job is not None
        return self.job.answer(away=self.away)


def settings_of_run() -> set[str]:
    """Return the names of the arguments of the current run that are not None."""
    from greenlet import getcurrent

    batcher: Any = getcurrent().mediator().interleaver.batcher
    invokes = [] if batcher is None else [kwargs for _, kwargs in batcher.invokes] + [batcher.extra_kwargs]
    return {name for kwargs in invokes for name, value in kwargs.items() if value is not None}


def _acts(tap: Tap) -> bool:
    """Return whether a tap acts in the current run: one of a job acts in its own run alone."""
    return not isinstance(tap.function, During) or tap.function.acts


def repeat_until_end(meet: Callable[[], None]) -> None:
    """Call `meet`, which waits for the model to come by, again and again until the run ends."""
    from nnsight.intervention.interleaver import OutOfOrderError
    from nnsight.intervention.iterator import Iterations

    try:
        for _ in Iterations():
            meet()
    except OutOfOrderError:
        pass  # nnsight's sign that the run is over


def group_by_door(taps: Sequence[tuple[Any, Door, Tap, int]]) -> list[Visit]:
    """Return one visit for each door, with the taps there in their order."""
    doors: dict[tuple[int, Door], list[tuple[Any, Tap, int]]] = {}
    for envoy, door, tap, block in taps:
        doors.setdefault((id(envoy), door), []).append((envoy, tap, block))
    return [Visit(each[0][0], door, tuple((tap, block) for _, tap, block in each)) for (_, door), each in doors.items()]
