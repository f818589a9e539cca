"""`intervene` and `run` on a vLLM engine of nnsight: swap, add and noise while it generates.

The engine is another process, and reads many requests at once. Reads and writes are put on it as edits of nnsight, of
which each request gets a copy (`vllm_requests`). Their counts and errors come back on the outputs of the requests.

This was never run on vLLM itself. It is written against the support of vLLM in nnsight 0.8.1: in the tests its tracer,
edits, requests, batcher and its collecting of saved values run on a stand-in for vLLM's scheduler and kernels.
docs/engines.md lists what is possible and what is not.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from interventions.errors import InterventionError
from interventions.execution.requests import Handle, check_fired, measured, sources_in, writes_of
from interventions.execution.run import Activations, Inputs, Keep, Run, check_ran
from interventions.execution.writes import Source, Write
from interventions.locations import Location
from interventions.models.calls import arguments_of
from interventions.models.places import Place
from interventions.models.wrappers import is_traced
from interventions.operators import Operator
from interventions.tracing.packing import Parcel
from interventions.tracing.sessions import Remote, restored_errors
from interventions.tracing.vllm_architecture import EngineArchitecture
from interventions.tracing.vllm_requests import Draws, RequestTap


def is_engine(model: object) -> bool:
    """Return whether a model is a vLLM engine of nnsight, without importing either of the two."""
    return any(
        cls.__name__ == "VLLM" and cls.__module__.startswith("nnsight.modeling.vllm") for cls in type(model).__mro__
    )


def refuse(model: object, verb: str) -> None:
    """Raise if `model` is an engine, on which `verb` does not work.

    Raises:
        InterventionError: `model` is an engine.
    """
    if is_engine(model):
        raise InterventionError(
            f"{verb} does not work on a vLLM engine, which generates and has no gradients; write "
            "with intervene(model, …, source=run(model, prompt)): model.generate(…), or load the model with "
            "nnsight.TransformersModel(name)."
        )


def run(
    model: Any,
    inputs: Inputs,
    at: Sequence[Location] = (),
    *,
    detach: bool = False,
    device: torch.device | str | None = None,
    keep: Keep | None = None,
    remote: Remote = False,
) -> Run:
    """Run one prompt on an engine, as `interventions.run` does; activations are `[1, tokens, dims]` on the CPU.

    The engine reads the prompt and generates one token. The output of the run is that of vLLM, without logits.

    Raises:
        InterventionError: the engine cannot be intervened on, or a location does not exist or never ran.
    """
    check_engine(model, remote)
    _check_settings(model, counts=True)
    found, prompt, activations = EngineArchitecture.of(model), _prompt(inputs), Activations(at)
    states: list[list[Tensor]] = [[] for _ in at]
    taps = [_tap(model, found, location) for location in at]

    def take(number: int, report: dict[str, Any]) -> None:
        states[number].extend(report.get("states", ()))

    with restored_errors(), _installed(model, taps, take):
        (output,) = model.generate(prompt, max_tokens=1, temperature=0.0)
    for location, parts in zip(at, states, strict=True):
        if parts:
            state = torch.cat(parts, 0 if location.subspace is not None else 1)
            activations.put(location, [state if device is None else state.to(device)])
    check_ran(activations, "this run")
    activations.fetch_with(lambda location, kept: run(model, inputs, [location]).activations[location])
    return Run(model, inputs, output if keep is None else keep(output), activations)


@contextmanager
def intervene(
    model: Any,
    pairs: dict[Location, Operator],
    source: object,
    where: tuple[object, object, Any],
    generator: torch.Generator | None,
    *,
    remote: Remote = False,
) -> Iterator[Handle]:
    """Intervene in every request that the engine begins inside the block, as `interventions.intervene` does.

    Raises:
        InterventionError: the engine cannot be intervened on; a location does not exist, never ran, or does not fit.
    """
    check_engine(model, remote)
    found = EngineArchitecture.of(model)
    writes = measured(writes_of(found, pairs, source, where, None, listen=_listening(model)))
    settings = [each for write in writes for each in (write.positions, write.steps, write.source)]
    _check_settings(model, counts=any(each is not None for each in settings))
    generator, drew = torch.default_generator if generator is None else generator, []
    taps = [
        _tap(model, found, write.location, write, Draws(str(generator.device), generator.get_state(), number))
        for number, write in enumerate(writes)
    ]

    def take(number: int, report: dict[str, Any]) -> None:
        _count(writes[number], report)
        drew.append(report.get("drew", False))

    with restored_errors(), _installed(model, taps, take):
        yield Handle(writes)
    if any(drew):
        torch.rand((), generator=generator, device=generator.device)  # so that the next draws here are others
    check_fired(writes, "this intervene block; generate, or trace the model, inside the block")


def check_engine(model: Any, remote: Remote = False) -> None:
    """Start the engine if it does not run yet.

    Raises:
        InterventionError: nothing can be changed on it from this process.
    """
    taps = list(getattr(model, "taps", ()))
    why = (
        f"remote={remote!r} asks another machine, and there the requests of other users would be changed too; load the "
        "engine in this process: VLLM(name, dispatch=True)."
        if remote
        else "its engine streams (mode='async') and takes calls only by await; load it without mode."
        if getattr(model, "_async_engine", False)
        else f"its engine replays CUDA graphs (taps={taps}), which do not say which tokens they read; load it without."
        if taps
        else ""
    )
    if why:
        raise InterventionError(f"nothing can be written in this {type(model).__name__}: {why}")
    if not model.dispatched:
        model.dispatch()


def _check_settings(model: Any, *, counts: bool) -> None:
    """Raise InterventionError for an engine that skips tokens, reads them in chunks, or splits the blocks up.

    Args:
        model: the engine.
        counts: True if positions, steps or a source are used, so that tokens have to be counted.
    """
    config = getattr(_core(model), "vllm_config", None)
    parallel, cache, scheduler = (
        getattr(config, name, None) for name in ("parallel_config", "cache_config", "scheduler_config")
    )
    stages = getattr(parallel, "pipeline_parallel_size", 1)
    chunks = getattr(scheduler, "enable_chunked_prefill", False) or getattr(scheduler, "chunked_prefill_enabled", False)
    why = (
        f"pipeline_parallel_size={stages} puts its blocks into several processes; use tensor_parallel_size instead."
        if stages > 1
        else "it does not read tokens again that it knows from another prompt; load it with "
        "enable_prefix_caching=False, as nnsight does."
        if getattr(cache, "enable_prefix_caching", False)
        else "it reads prompts in chunks (enable_chunked_prefill=True), so that positions, steps and sources cannot be "
        "lined up with their tokens; load it without, as nnsight does."
        if counts and chunks
        else ""
    )
    if why:
        raise InterventionError(f"this engine cannot be intervened on: {why}")


def _core(model: Any) -> Any:
    """Return the object of vLLM that has the settings and the step of the engine."""
    return getattr(model.vllm_entrypoint, "llm_engine", model.vllm_entrypoint)


def _tap(
    model: Any, found: EngineArchitecture, location: Location, write: Write | None = None, draws: Draws | None = None
) -> RequestTap:
    """Return the read, or the write, of a location in every request."""
    place = found.place(location)
    view = next(each for each in model.modules() if each._module is place.module)
    return RequestTap(view, location, place, found.adds(place), write, draws)


@contextmanager
def _installed(model: Any, taps: Sequence[RequestTap], take: Callable[[int, dict[str, Any]], None]) -> Iterator[None]:
    """Apply the taps in all requests that begin inside the block.

    Args:
        model: the engine.
        taps: the reads and writes.
        take: called with the number of a tap and its report when a request is over.

    Raises:
        RuntimeError: a request failed; raised when the block ends.
    """
    from nnsight.intervention.errors import raise_deferred

    names = {f"interventions_{uuid4().hex}": number for number in range(len(taps))}
    errors: list[Any] = []
    with ExitStack() as stack:
        stack.enter_context(_watched_outputs(model, lambda output: _take_reports(output, names, take, errors)))
        for name, number in names.items():
            stack.callback(_install(model, Parcel(model, taps[number]), name).clear)
        yield
    for error in errors:
        raise_deferred(error)


def _install(model: Any, parcel: Parcel, name: str) -> Any:
    """Put a tap on the engine as an edit that saves its report under `name`, and return the edit."""
    from nnsight import save

    with model.edit() as (_, edit):
        globals()[name] = save({})
        parcel.call(model, "act", model, globals()[name])
    return edit


@contextmanager
def _watched_outputs(model: Any, take: Callable[[Any], None]) -> Iterator[None]:
    """Call `take` inside the block with each output of a finished request, as the engine returns it."""
    core = _core(model)
    original, own = core.step, vars(core).get("step")

    def step(*args: Any, **kwargs: Any) -> Any:
        outputs = original(*args, **kwargs)
        for output in outputs:
            if getattr(output, "finished", False):
                take(output)
        return outputs

    core.step = step
    try:
        yield
    finally:
        if own is None:
            del core.step
        else:
            core.step = own


def _take_reports(
    output: Any, names: Mapping[str, int], take: Callable[[int, dict[str, Any]], None], errors: list
) -> None:
    """Take the reports of the taps off an output, for each of its sampled sequences, and collect errors."""
    sequences = [
        each.saves for each in getattr(output, "outputs", ()) or () if getattr(each, "saves", None) is not None
    ]
    everything = getattr(output, "saves", None) or {}
    for saves in sequences or [everything]:
        for name in names.keys() & saves.keys():
            report = saves.pop(name)
            take(names[name], report)
            errors += [_deferred(report["error"])] if "error" in report else []
    for name in names.keys() & everything.keys():
        del everything[name]
    error = getattr(output, "nnsight_error", None)
    if error:
        errors.append(error)


def _deferred(message: str) -> dict[str, Any]:
    """Return the message of an InterventionError in the form in which nnsight returns errors of a request."""
    return {"type_name": "InterventionError", "message": message, "traceback": "", "is_control_flow": False}


def _count(write: Write, report: Mapping[str, Any]) -> None:
    """Add the counts of one request to those of a write."""
    write.firings += report.get("firings", 0)
    write.calls += report.get("calls", 0)
    if write.change is not None and report.get("change") is not None:
        write.change.include(*map(torch.tensor, report["change"]))


def _listening(model: Any) -> Any:
    """Return a listener for sources: a Run of this engine or any other model, or a prompt that the engine reads now."""

    def listen(given: Any, places: dict[Location, Place]) -> dict[Location, Source]:
        source = given if isinstance(given, Run) else run(model, given, list(places))
        source.check_fresh()
        arguments = {} if is_traced(source.model) else arguments_of(source.model, source.inputs)
        held = sources_in(source.activations, arguments, places)
        for location, each in held.items():
            examples = {len(state) for state in each.states}
            if examples != {1}:
                raise InterventionError(
                    f"the source of {location} holds {max(examples)} examples and a request of an engine is one; take "
                    "one: source=source.take(torch.tensor([0]))."
                )
            each.states[:] = [state.detach().cpu() for state in each.states]
        return held

    return listen


def _prompt(inputs: Any) -> Any:
    """Return one prompt as vLLM takes it: a text, or the numbers of its tokens.

    Raises:
        InterventionError: `inputs` are not one prompt.
    """
    if isinstance(inputs, str):
        return inputs
    if isinstance(inputs, Mapping) and "input_ids" in inputs:
        mask = inputs.get("attention_mask")
        inputs = inputs["input_ids"]
        if isinstance(inputs, Tensor) and isinstance(mask, Tensor) and inputs.shape == mask.shape and len(inputs) == 1:
            inputs = inputs[mask.bool()]
    if isinstance(inputs, Tensor) and (inputs.ndim == 1 or len(inputs) == 1):
        inputs = inputs.flatten().tolist()
    if isinstance(inputs, list) and inputs and all(isinstance(each, int) for each in inputs):
        return {"prompt_token_ids": inputs}
    shown = f"tensor{list(inputs.shape)}" if isinstance(inputs, Tensor) else repr(inputs)[:60]
    raise InterventionError(
        f"an engine runs one prompt, and inputs={shown} is none; give text, or the numbers of its tokens."
    )
