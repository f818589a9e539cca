"""`intervene` and `run` on a vLLM engine of nnsight: swap, add and noise while it generates.

The engine is another process, and reads many requests at once. What is done stands on it as edits of nnsight, of which
each request gets a copy (`vllm_requests`); what these count, and their errors, come back on the outputs of the
requests.

Nothing here was run on vLLM itself. It was written against nnsight 0.8.1's own support of vLLM, whose tracer, edits,
requests, batcher and collecting of what is saved run in the tests on a stand-in for vLLM's scheduler and kernels.
What it can do and what not: docs/engines.md.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from inspect import signature
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from interventions.errors import InterventionError
from interventions.execution.requests import Handle, check_fired, sources_in, writes_of
from interventions.execution.run import Activations, Inputs, Keep, Run, check_ran
from interventions.execution.writes import Source, Write
from interventions.locations import HEAD_SITES, SIDES, Location
from interventions.models.architectures import Architecture, architecture
from interventions.models.calls import arguments_of
from interventions.models.places import Place
from interventions.models.sites import Missing
from interventions.models.wrappers import is_traced
from interventions.operators import Operator
from interventions.tracing.packing import Parcel
from interventions.tracing.sessions import Remote, ours
from interventions.tracing.vllm_requests import Draws, Post

_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")


def is_engine(model: object) -> bool:
    """Whether it is a vLLM engine of nnsight. Seen without importing either."""
    return any(
        cls.__name__ == "VLLM" and cls.__module__.startswith("nnsight.modeling.vllm") for cls in type(model).__mro__
    )


def refuse(model: object, verb: str) -> None:
    """Raise for what an engine cannot do.

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
    """`interventions.run` of one prompt: what the places hold while it is read, `[1, tokens, dims]`, on the CPU.

    The engine reads the prompt and generates one token; the output of the run is vLLM's own, without logits.
    """
    check_engine(model, remote)
    _check_settings(model, counts=True)
    found, prompt, activations = EngineArchitecture.of(model), _prompt(inputs), Activations(at)
    states: list[list[Tensor]] = [[] for _ in at]
    posts = [_post(model, found, location) for location in at]
    with ours(), _standing(model, posts, lambda number, report: states[number].extend(report.get("states", ()))):
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
    """`interventions.intervene`: in all requests that the engine begins inside the block, whoever makes them."""
    check_engine(model, remote)
    found = EngineArchitecture.of(model)
    writes = tuple(writes_of(found, pairs, source, where, None, listen=_listening(model)))
    settings = [each for write in writes for each in (write.positions, write.steps, write.source)]
    _check_settings(model, counts=any(each is not None for each in settings))
    drawn, drew = torch.default_generator if generator is None else generator, []
    posts = [
        _post(model, found, write.location, write, Draws(str(drawn.device), drawn.get_state(), number))
        for number, write in enumerate(writes)
    ]

    def hear(number: int, report: dict[str, Any]) -> None:
        _count(writes[number], report)
        drew.append(report.get("drew", False))

    with ours(), _standing(model, posts, hear):
        yield Handle(writes)
    if any(drew):
        torch.rand((), generator=drawn, device=drawn.device)  # so that what is drawn next is something else
    check_fired(writes, "this intervene block; generate, or trace the model, inside the block")


def check_engine(model: Any, remote: Remote = False) -> None:
    """Bring the engine up, if it is not.

    Raises:
        InterventionError: it is one on which nothing can be changed from here.
    """
    taps = list(getattr(model, "taps", ()))
    why = (
        f"remote={remote!r} asks another machine, and there the requests of all others would be changed too; load the "
        "engine in this process: VLLM(name, dispatch=True)."
        if remote
        else "its engine streams (mode='async') and can be told things only by await; load it without mode."
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
    """Raise for an engine that does not read all tokens, or not all where the model is."""
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
    return getattr(model.vllm_entrypoint, "llm_engine", model.vllm_entrypoint)


class EngineArchitecture(Architecture):
    """What can be addressed in a model as vLLM writes it: blocks, their attention and feed-forward part, modules."""

    @classmethod
    def of(cls, model: Any) -> "EngineArchitecture":
        """Of an engine."""
        found = architecture(model)
        return cls(found.model, found.stacks, found.paths)

    def place(self, location: Location) -> Place:
        """Where `location` is.

        Raises:
            InterventionError: as of `Architecture`; or vLLM does not compute it as one tensor.
        """
        self._check(location)
        if location.module is not None or location.site in ("block_input", "block_output", "embedding", "final_norm"):
            place = super().place(location)
        else:
            block = super().place(replace(location, site="block_output"))
            part, io = self._part(block, location)
            place = replace(block, module=part, path=self.paths[part], io=io)
        if place.turn is not None:
            raise InterventionError(f"{location} is in a block that runs several times in a step; name a module.")
        return place

    def adds(self, place: Place) -> bool:
        """Whether what comes after the blocks adds the two tensors that they pass on: hidden state and residual."""
        stack = next((each for each in self.stacks if place.block in each.blocks), None)
        try:
            norm = type(self.final_norm(stack)) if stack is not None else None
        except Missing:
            return False
        if norm is None or not norm.__module__.startswith("vllm.") or not norm.__name__.endswith("RMSNorm"):
            return False
        forwards = (getattr(norm, name, None) for name in ("forward_native", "forward"))
        return any(each is not None and "residual" in signature(each).parameters for each in forwards)

    def _check(self, location: Location) -> None:
        site = location.site if location.module is None else location.io
        why = (
            "no operation in a forward can be reached there; name a module."
            if location.operation is not None
            else "query, key and value are one product and the attention one kernel; name a projection: "
            "Location(module='….qkv_proj', dims=…) or Location(module='….o_proj', io='input', dims=…)."
            if site in HEAD_SITES or location.heads is not None
            else "logits are computed after the model has returned; write model.logits = … in a trace."
            if site == "logits"
            else f"io={site!r} is of recurrent modules; use io='output'."
            if location.module is not None and site not in SIDES
            else ""
        )
        if why:
            raise InterventionError(f"{location} cannot be written on a vLLM engine: {why}")

    def _part(self, place: Place, location: Location) -> tuple[nn.Module, str]:
        """The module in a block, and which side of it, that a site is."""
        site, block = location.site, place.module
        names = _ATTENTION if site.startswith("attention") else _FEED_FORWARD
        part = next((module for name, module in block.named_children() if name in names), None)
        rows = [] if part is None else [each for each in part.modules() if _is_row(each)]
        if part is None or (site == "mlp_activation" and len(rows) != 1):
            raise InterventionError(
                f"{location} was not found in {type(block).__name__}, whose parts are "
                f"{', '.join(name for name, _ in block.named_children())}; name a module: Location(module='…')."
            )
        if site == "mlp_activation":
            return rows[0], "input"
        return part, "input" if site.endswith("input") else "output"


def _is_row(module: nn.Module) -> bool:
    return any(cls.__name__ == "RowParallelLinear" for cls in type(module).__mro__)


def _post(
    model: Any, found: EngineArchitecture, location: Location, write: Write | None = None, draws: Draws | None = None
) -> Post:
    place = found.place(location)
    view = next(each for each in model.modules() if each._module is place.module)
    return Post(view, location, place, found.adds(place), write, draws)


@contextmanager
def _standing(model: Any, posts: Sequence[Post], hear: Callable[[int, dict[str, Any]], None]) -> Iterator[None]:
    """Do what the posts do in all requests that begin inside, and hear what was done when each of them is over.

    Raises:
        RuntimeError: what went wrong in a request, when the block ends.
    """
    from nnsight.intervention.errors import raise_deferred

    names = {f"interventions_{uuid4().hex}": number for number in range(len(posts))}
    errors: list[Any] = []
    with ExitStack() as stack:
        stack.enter_context(_listened(model, lambda output: _told(output, names, hear, errors)))
        for name, number in names.items():
            stack.callback(_install(model, Parcel(model, posts[number]), name).clear)
        yield
    for error in errors:
        raise_deferred(error)


def _install(model: Any, parcel: Parcel, name: str) -> Any:
    from nnsight import save

    with model.edit() as (_, edit):
        globals()[name] = save({})
        parcel.call(model, "stand", model, globals()[name])
    return edit


@contextmanager
def _listened(model: Any, hear: Callable[[Any], None]) -> Iterator[None]:
    """Hear each output of a finished request, as the engine gives it out."""
    core = _core(model)
    before, mine = core.step, vars(core).get("step")

    def step(*args: Any, **kwargs: Any) -> Any:
        outputs = before(*args, **kwargs)
        for output in outputs:
            if getattr(output, "finished", False):
                hear(output)
        return outputs

    core.step = step
    try:
        yield
    finally:
        if mine is None:
            del core.step
        else:
            core.step = mine


def _told(output: Any, names: Mapping[str, int], hear: Callable[[int, dict[str, Any]], None], errors: list) -> None:
    """Take what our edits saved off an output, for each of the sequences that were sampled."""
    sequences = [
        each.saves for each in getattr(output, "outputs", ()) or () if getattr(each, "saves", None) is not None
    ]
    everything = getattr(output, "saves", None) or {}
    for saves in sequences or [everything]:
        for name in names.keys() & saves.keys():
            report = saves.pop(name)
            hear(names[name], report)
            errors += [_deferred(report["error"])] if "error" in report else []
    for name in names.keys() & everything.keys():
        del everything[name]
    error = getattr(output, "nnsight_error", None)
    if error:
        errors.append(error)


def _deferred(message: str) -> dict[str, Any]:
    """An error of ours in the form in which nnsight brings those of a request."""
    return {"type_name": "InterventionError", "message": message, "traceback": "", "is_control_flow": False}


def _count(write: Write, report: Mapping[str, Any]) -> None:
    write.firings += report.get("firings", 0)
    write.calls += report.get("calls", 0)
    if report.get("change") is not None:
        changed, norm = map(torch.tensor, report["change"])
        write.changed = changed if write.changed is None else write.changed + changed
        write.norm = norm if write.norm is None else write.norm + norm


def _listening(model: Any) -> Any:
    """Sources: a Run of this engine or of any other model, or a prompt that this engine reads first."""

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
    """One prompt as vLLM takes it: text, or the numbers of its tokens."""
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
