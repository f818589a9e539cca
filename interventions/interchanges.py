"""Runs with some of their internals replaced: around ordinary calls, or as the counterfactual of two runs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from interventions.arguments import checked
from interventions.errors import InterventionError
from interventions.execution.hooked import (
    check_complete,
    drawing_write,
    fetcher,
    listening,
    reading,
    recorded,
    recording_of,
    shifted_tap,
    tap_of,
)
from interventions.execution.origins import Stored, origin_of
from interventions.execution.recordings import Recording, Replay
from interventions.execution.requests import Handle, check_fired, pairs_of, writes_of
from interventions.execution.run import (
    Inputs,
    Keep,
    Run,
    Where,
    check_inputs,
    check_ran,
    locations_of,
    without_cache,
    without_past,
)
from interventions.execution.stamps import Stamp
from interventions.hooks.hooks import Scope, acting, opened
from interventions.locations import Location
from interventions.models.architectures import architecture
from interventions.models.calls import arguments_of, call
from interventions.models.wrappers import Model, module_of
from interventions.operators import Operator
from interventions.positions import Positions
from interventions.runs import traced
from interventions.steps import Steps, parse_steps


@checked
@contextmanager
def intervene(
    model: Model,
    at: Where | None = None,
    *,
    op: Operator | None = None,
    source: Inputs | Run | Stored | Mapping[Location, Inputs | Run | Stored] | None = None,
    positions: Positions | Mapping[Location, Positions] = None,
    source_positions: Positions | Mapping[Location, Positions] = None,
    source_model: Any = None,
    source_at: Location | str | Mapping[Location, Location] | None = None,
    steps: Steps | object = None,
    generator: torch.Generator | None = None,
    remote: bool | str = False,
    **location: object,
) -> Iterator[Handle]:
    """Replace internals of `model` in every ordinary call inside the block: `model(...)`, a pipeline, a Trainer.

    Args:
        at: a Location, or {Location: operator}; or give the fields of one location as keywords: `layer=3`.
        op: the operator, where `at` does not hold it. `Swap()` if a source is given.
        source: inputs, a Run or Stored activations that operators such as Swap take from, or {Location: one of these}.
        positions: which tokens of the place to write, counted over real tokens (see `interventions.positions`); None
            is all of them. Or {Location: positions}.
        source_positions: which tokens of the source to take, as many; None is those of `positions`.
        source_model: another model that the source is run on, or is a Run of: cross-model patching, where the vectors
            are of one width. None is `model`, and a Run of another one is refused.
        source_at: {location written: location of the source that is read}, or one location for all; what is not named
            is read where it is written.
        steps: which steps of a generation: 0 is the prompt, k the k-th generated token; a number, several, or a slice.
            None is all of them. Positions then count over the sequence so far: −1 is each new token.
        generator: for operators that draw; None is torch's default generator, as dropout uses.
        remote: of a model of nnsight, where the source runs; see `run`. The traces inside say that for themselves.

    Yields:
        A handle that counts firings and the size of the change.

    Raises:
        InterventionError: a place that does not exist, never ran, or does not fit its source.

    Blocks nest: of two that write one place, the outer one writes first. A source given as inputs runs when its block
    is opened, under the writes of the blocks around it, as any other call of the model there. For the model as it is,
    run it outside of all blocks, and give the Run, as the second source here:

    >>> from interventions import Zero, run
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Identity(), torch.nn.Identity()).eval()
    >>> _ = net[0].weight.data.copy_(torch.eye(2))
    >>> base, source = torch.zeros(1, 2), torch.ones(1, 2)
    >>> alone = run(net, source)
    >>> for given in (source, alone):
    ...     with intervene(net, module="0", op=Zero()), intervene(net, module="2", source=given):
    ...         print(net(base).tolist())
    [[0.0, 0.0]]
    [[1.0, 1.0]]
    """
    found = architecture(model)
    pairs, where = pairs_of(at, op, source, location), (positions, source_positions, parse_steps(steps))
    origin = origin_of(model, source, source_model, source_at, pairs)
    if (elsewhere := traced(model, remote)) is not None:
        with elsewhere.intervene(model, pairs, source, where, generator, remote=remote) as handle:
            yield handle
        return
    model = module_of(model)
    listen = partial(listening, model if origin is None else origin.model)
    writes = writes_of(found, pairs, source, where, generator, listen=listen, origin=origin)
    scope = Scope(model, [tap_of(write, write) for write in writes], generator=generator)
    with opened(scope):
        yield Handle(tuple(writes))
    check_fired(writes, "this intervene block; call the model inside the block")


@checked
def interchange(
    model: Model,
    base: Inputs | Run,
    source: Inputs | Run | Stored | Mapping[Location, Inputs | Run | Stored] | None,
    at: Where,
    *,
    op: Operator | None = None,
    positions: Positions | Mapping[Location, Positions] = None,
    source_positions: Positions | Mapping[Location, Positions] = None,
    source_model: Any = None,
    source_at: Location | str | Mapping[Location, Location] | None = None,
    generator: torch.Generator | None = None,
    record: Where = (),
    resume: bool = True,
    keep: Keep | None = None,
    remote: bool | str = False,
) -> Run:
    """The counterfactual run: `model` on the base, with the activations `at` the locations taken from the source.

    Args:
        base: inputs, or a Run, from which the counterfactual then resumes at the first location written: blocks before
            it return what the base run recorded.
        source: inputs, a Run, or {Location: inputs or Run}; None for operators that need none. One forward for
            each distinct source, which stops after the last location read.
        at: a Location, several, or {Location: operator}.
        op: the operator, `Swap()` by default.
        positions, source_positions, source_model, source_at, generator: as in `intervene`.
        record: locations to keep of the counterfactual run, after the writes.
        resume: False runs every block again. So does a base run that cannot be taken up: made under other hooks or
            other open blocks, or changed in place since. So do models of nnsight, which have every forward.
        keep: what is kept of the output, as in `run`.
        remote: of a model of nnsight, where base and source run, as one job; see `run`.

    Raises:
        InterventionError: as `intervene`; or a base run older than the model's weights.

    Source: Geiger et al. 2021 (arXiv:2106.02997), section 2.
    """
    pairs = pairs_of(at, op, source, {})
    origin = origin_of(model, source, source_model, source_at, pairs)
    if isinstance(base, Run):
        _check_base(base, model)
    if (elsewhere := traced(model, remote)) is not None:
        asked, kept = (positions, source_positions), locations_of(record)
        there = elsewhere.interchange(
            model, base, source, pairs, asked, generator=generator, record=kept, keep=keep, remote=remote
        )
        return replace(there, answers=base.answers if isinstance(base, Run) else there.answers)
    model, found = module_of(model), architecture(model)
    listen, where = partial(listening, model if origin is None else origin.model), (positions, source_positions, None)
    writes = writes_of(found, pairs, source, where, generator, listen=listen, origin=origin)
    recording = None
    if isinstance(base, Run) and resume:
        recording = recording_of(base)
    inputs = base.inputs if isinstance(base, Run) else base
    check_inputs(inputs)
    kept = locations_of(record)
    activations, reads = reading(found, kept)
    count = 0 if recording is None else recording.reusable([w.place for w in writes], [found.place(at) for at in kept])
    replay = Replay(recording, count) if recording is not None and count else None
    taps = [tap_of(write, write if replay is None else drawing_write(write)) for write in writes]
    if replay is not None:
        places = [*(write.place for write in writes), *(found.place(at) for at in kept)]
        shifted = [shifted_tap(tap, place, replay) for tap, place in zip([*taps, *reads], places, strict=True)]
        taps, reads = shifted[: len(taps)], shifted[len(taps) :]
    again = Recording.begin(found) if found.stacks else None
    scope = recorded(model, [*taps, *reads], again)
    scope.generator, scope.stores = generator, bool(arguments_of(model, inputs).get("use_cache"))
    inputs = without_cache(found, inputs)
    if replay is not None:
        check_complete(model, inputs)
        scope.replay, scope.replayed = replay, replay.blocks
    with nullcontext() if replay is None else replay.surrounding(scope), opened(scope):
        output = call(model, inputs)
    check_fired(writes, "the counterfactual run")
    check_ran(activations, "the counterfactual run")
    activations.fetch_with(fetcher(model, inputs, again, made=None))
    output = output if scope.stores else without_past(output)
    output = output if keep is None else keep(output)
    answers = base.answers if isinstance(base, Run) else None
    made = base._stamp if isinstance(base, Run) and recording is not None else Stamp.of(model)
    return Run(model, inputs, output, activations, again, is_counterfactual=True, answers=answers, _stamp=made)


def _check_base(base: Run, model: Model) -> None:
    """Raise for a run whose inputs alone do not say what it was."""
    if base.model is not model:
        raise InterventionError(
            f"the base is a run of another model ({type(base.model).__name__}); run it on this one: run(model, inputs)."
        )
    if base.is_counterfactual:
        raise InterventionError(
            "the base is itself a counterfactual run; pass its base and all locations in one call: "
            "at={location: operator}, source={location: source}; or base.inputs inside a `with intervene(...)` block."
        )
    if base.recording is not None and set(base.recording.scopes) - set(acting()):
        raise InterventionError(
            "the base is a run made inside a block of interventions that is closed, so it cannot be run again; open "
            "the block around this call too, and make the base inside it."
        )
