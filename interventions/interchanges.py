"""`intervene` replaces internals in the ordinary calls inside a block; `interchange` runs one counterfactual.

In the interchange intervention the model runs on a base while some of its activations take the values that they have on
a source: y = f(base; h ← h(source)) (Geiger et al. 2021, arXiv:2106.02997, section 2).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from interventions.arguments import checked
from interventions.errors import InterventionError
from interventions.execution.deferring import call_deferring, calls_made, needs_output
from interventions.execution.hooked import (
    check_complete,
    fetcher,
    prepare_reads,
    read_source,
    recording_of,
    recording_scope,
    resume_write,
    shift_tap,
    tap_of,
)
from interventions.execution.origins import Stored, origin_of
from interventions.execution.recordings import Recording, Replay
from interventions.execution.requests import Handle, check_fired, measured, pairs_of, writes_of
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
from interventions.execution.stamps import Stamp, read_once
from interventions.execution.writes import Write
from interventions.hooks.installation import opened
from interventions.hooks.scopes import Scope, acting
from interventions.hooks.taps import Tap
from interventions.locations import Location
from interventions.models.architectures import architecture
from interventions.models.calls import arguments_of
from interventions.models.places import Place
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
        model: a torch model, or one of nnsight; its hooks and weights stay as they are.
        at: a Location, or {Location: operator}. Or pass the fields of one location as keywords: `layer=3`.
        op: the operator, if `at` holds none; with a source, `Swap()` by default.
        source: inputs, a Run or Stored activations, from which operators such as Swap take values; or {Location: one
            of these}.
        positions: which tokens to write, counted over real tokens (`select` lists the forms); None is all of them. Or
            {Location: positions}.
        source_positions: which tokens of the source to take, as many as are written; None takes those of `positions`.
        source_model: the model on which the source runs, or of which it is a Run, if that is another one: cross-model
            patching, for activations of the same width. None is `model`, and a Run of another model is refused.
        source_at: {location to write: location of the source to read}, or one location for all. Locations that are not
            named are read where they are written.
        steps: which steps of a generation: a number, several, or a slice. 0 is the prompt, k the k-th generated token;
            None is all of them. Positions then count over the sequence so far: −1 is each new token.
        generator: for operators that draw; None uses torch's default generator, as dropout does.
        remote: for a model of nnsight, where the source runs (see `run`); traces inside the block have their own.
        location: the fields of a Location, instead of `at`.

    Yields:
        A Handle that counts how often each location was written, and how much changed.

    Raises:
        InterventionError: a location that does not exist, that never ran, or whose source does not fit.

    Blocks nest. If two of them write one place, the outer one writes first. A source passed as inputs runs when its
    block is entered, and so under the writes of the blocks around it. For the source of the model as it is, run it
    outside of all blocks and pass the Run, as the second source does here:

    >>> from interventions import Zero, run
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Identity(), torch.nn.Identity()).eval()
    >>> _ = net[0].weight.data.copy_(torch.eye(2))
    >>> base, source = torch.zeros(1, 2), torch.ones(1, 2)
    >>> alone = run(net, source)
    >>> for each in (source, alone):
    ...     with intervene(net, module="0", op=Zero()), intervene(net, module="2", source=each):
    ...         print(net(base).tolist())
    [[0.0, 0.0]]
    [[1.0, 1.0]]
    """
    found = architecture(model)
    pairs, where = pairs_of(at, op, source, location), (positions, source_positions, parse_steps(steps))
    origin = origin_of(model, source, source_model, source_at, pairs)
    if (tracing := traced(model, remote)) is not None:
        with tracing.intervene(model, pairs, source, where, generator, remote=remote) as handle:
            yield handle
        return
    model = module_of(model)
    listen = partial(read_source, model if origin is None else origin.model)
    writes = measured(writes_of(found, pairs, source, where, generator, listen=listen, origin=origin))
    scope = Scope(model, [tap_of(write, write) for write in writes], generator=generator)
    with opened(scope):
        yield Handle(writes)
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
    """Return the counterfactual run: `model` on the base, with activations `at` the locations taken from the source.

    This is the interchange intervention (Geiger et al. 2021, arXiv:2106.02997, section 2).

    Args:
        model: a torch model, or one of nnsight.
        base: inputs, or a Run. From a Run the counterfactual resumes at the first block that is written, and the blocks
            before it return what the Run recorded.
        source: inputs, a Run, Stored activations, or {Location: one of these}; None for operators that need none. Each
            distinct source is one forward, which stops after the last location that is read.
        at: a Location, several, or {Location: operator}.
        op: the operator, `Swap()` by default.
        positions, source_positions, source_model, source_at, generator: as in `intervene`.
        record: locations whose activations to keep, as they are after the writes.
        resume: False runs every block again. A base run that was made under other hooks or other open blocks, or
            changed in place since, is never resumed from, and models of nnsight always run in full.
        keep: a function of the output that returns what to keep of it, as in `run`.
        remote: for a model of nnsight, where base and source run, as one job (see `run`).

    Returns:
        A Run with the output and the recorded activations; gradients flow through it into base and source.

    Raises:
        InterventionError: as `intervene`; or a base run that is older than the model's weights, is of another model or
            is itself a counterfactual.

    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1)).eval()
    >>> base, source = torch.zeros(4, 2), torch.ones(4, 2)
    >>> counterfactual = interchange(net, base, source, Location(module="1"))
    >>> torch.equal(counterfactual.output, net(source))  # all that the output depends on was swapped
    True
    """
    pairs = pairs_of(at, op, source, {})
    origin = origin_of(model, source, source_model, source_at, pairs)
    if isinstance(base, Run):
        _check_base(base, model)
    if (tracing := traced(model, remote)) is not None:
        both, kept = (positions, source_positions), locations_of(record)
        done = tracing.interchange(
            model, base, source, pairs, both, generator=generator, record=kept, keep=keep, remote=remote
        )
        return replace(done, answers=base.answers if isinstance(base, Run) else done.answers)
    model, found = module_of(model), architecture(model)
    listen, where = partial(read_source, model if origin is None else origin.model), (positions, source_positions, None)
    with read_once():
        writes = writes_of(found, pairs, source, where, generator, listen=listen, origin=origin)
        recording = recording_of(base) if isinstance(base, Run) and resume else None
    inputs = base.inputs if isinstance(base, Run) else base
    check_inputs(inputs)
    places = {location: found.place(location) for location in locations_of(record)}
    activations, reads = prepare_reads(places)
    replay, taps = _resume(recording, writes, list(places.values()), reads)
    again = Recording.begin(found, like=recording) if found.stacks else None
    scope = recording_scope(model, taps, again, replay)
    scope.generator, scope.stores = generator, bool(arguments_of(model, inputs).get("use_cache"))
    inputs = without_cache(found, inputs)
    if replay is not None:
        check_complete(model, inputs)
    answers = base.answers if isinstance(base, Run) else None

    def is_done() -> bool:
        return all(write.firings for write in writes) and calls_made(list(places), activations)

    with nullcontext() if replay is None else replay.surrounding(scope):
        output = call_deferring(model, inputs, scope, is_done, whole=keep is not None or needs_output(answers))
    check_fired(writes, "the counterfactual run")
    check_ran(activations, "the counterfactual run")
    activations.fetch_with(fetcher(model, inputs, again, made=None))
    output = output if scope.stores else without_past(output)
    output = output if keep is None else keep(output)
    made = base._stamp if isinstance(base, Run) and recording is not None else Stamp.of(model)
    return Run(model, inputs, output, activations, again, is_counterfactual=True, answers=answers, _stamp=made)


def _resume(
    recording: Recording | None, writes: Sequence[Write], kept: Sequence[Place], reads: Sequence[Tap]
) -> tuple[Replay | None, list[Tap]]:
    """Return the replay of the first blocks of the base, if any can be reused, and the taps of writes and reads.

    Args:
        recording: what the blocks of the base returned.
        writes: the writes of the counterfactual.
        kept: the places whose activations are kept.
        reads: the taps that keep them.
    """
    count = 0 if recording is None else recording.reusable([write.place for write in writes], kept)
    if recording is None or not count:
        return None, [*(tap_of(write, write) for write in writes), *reads]
    replay = Replay(recording, count)
    taps = [*(tap_of(write, resume_write(write)) for write in writes), *reads]
    places = [*(write.place for write in writes), *kept]
    return replay, [shift_tap(tap, place, replay) for tap, place in zip(taps, places, strict=True)]


def _check_base(base: Run, model: Model) -> None:
    """Raise InterventionError for a run that cannot be a base: its inputs alone would not reproduce it."""
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
