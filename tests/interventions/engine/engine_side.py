"""The cases on the stand-in engine and on the plain model: `python -m tests.interventions.engine.engine_side` answers.

A program of its own, because importing nnsight changes torch for the whole process; it answers to the name of a case.
Importing this file imports no nnsight.
"""

import traceback
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from interventions import (
    Add,
    Interpolate,
    InterventionError,
    Location,
    Mean,
    Mixup,
    Noise,
    Swap,
    Zero,
    interchange,
    intervene,
    record,
    run,
    sweep,
)
from tests.interventions.engine import stand_in
from tests.interventions.tiny_models import VOCABULARY, WIDTH, make
from tests.other_process import serve

PROMPTS = ([3, 4, 5, 6, 7, 8, 9], [11, 12, 13], [21, 22, 23, 24, 25])
SOURCE = [14, 15, 16, 17, 18, 19, 20]
TOKENS = 4


def vector(width: int = WIDTH) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(6)) * 2


def turned(base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
    return base.flip(-1) * 2


# What is asked of both: keywords of `intervene`, and of how many prompts. `source` is what `sources` make.
Asked = dict[str, Any]
SAME: dict[str, Asked] = {
    "add": {"layer": 1, "op": Add(vector())},
    "add at one dim": {"layer": 1, "dims": [3], "op": Add(torch.tensor([40.0]))},
    "zero": {"layer": 0, "op": Zero()},
    "mean": {"layer": 1, "op": Mean(vector())},
    "a function": {"layer": 1, "op": turned},
    **{
        f"add at {site}": {"layer": 1, "site": site, "op": Add(vector(32 if site == "mlp_activation" else WIDTH), 3.0)}
        for site in ("block_input", "attention_input", "attention_output", "mlp_input", "mlp_activation", "mlp_output")
    },
    "add at the input of the first block": {"layer": 0, "site": "block_input", "op": Add(vector())},
    "add at embedding": {"site": "embedding", "op": Add(vector())},
    "add at final_norm": {"site": "final_norm", "op": Add(vector())},
    "add at a module": {"module": "model.layers.2.self_attn.o_proj", "op": Add(vector(), 5.0)},
    "add at the input of a module": {
        "module": "model.layers.2.self_attn.o_proj", "io": "input", "op": Add(vector(), 5.0)
    },
    "add at the last position": {"layer": 1, "op": Add(vector()), "positions": -1},
    "add at positions": {"layer": 1, "op": Add(vector()), "positions": [0, 2]},
    "add at a slice": {"layer": 1, "op": Add(vector()), "positions": slice(1, None)},
    "add in the prompt": {"layer": 1, "op": Add(vector()), "steps": 0},
    "add in two steps": {"layer": 1, "op": Add(vector(), 3.0), "steps": [1, 3]},
    "add in what is generated": {"layer": 1, "op": Add(vector(), 3.0), "steps": slice(1, None)},
    "add at a position of the prompt": {"layer": 1, "op": Add(vector(), 3.0), "positions": -2, "steps": 0},
    "two places": {"at": {Location(0): Add(vector(), 2.0), Location(2, "mlp_output"): Zero()}, "positions": -1},
    "swap": {"layer": 1, "op": Swap(), "source": "plain", "steps": 0, "prompts": 1},
    "swap at a position": {"layer": 1, "source": "plain", "positions": 1},
    "swap from elsewhere": {
        "layer": 1, "source": "plain", "positions": [-1], "source_positions": [3], "steps": 0
    },
    "swap of a run of the engine": {"layer": 1, "source": "run", "positions": -1, "source_positions": -1, "steps": 0},
    "swap of a run that kept it": {
        "layer": 1, "source": "kept run", "positions": -1, "source_positions": -1, "steps": 0
    },
    "swap of a prompt": {"layer": 1, "source": "prompt", "positions": -1, "source_positions": -1, "steps": 0},
    "swap of a text": {"layer": 1, "source": "text", "positions": -1, "source_positions": -1, "steps": 0},
    "swap at mlp_output": {"layer": 1, "site": "mlp_output", "source": "run", "positions": 2, "steps": 0},
    "swap at attention_output": {"layer": 1, "site": "attention_output", "source": "run", "positions": 2, "steps": 0},
    "swap at block_input": {"layer": 2, "site": "block_input", "source": "run", "positions": 2, "steps": 0},
    "interpolate": {"layer": 1, "op": Interpolate(0.5), "source": "plain", "positions": 0},
    "mean of a source": {"layer": 1, "op": Mean(), "source": "plain", "positions": [0, 1]},
    "noise of one request": {"layer": 1, "op": Noise(0.8), "seed": 3, "prompts": 1},
    "noise in absolute units": {"layer": 1, "op": Noise(0.8, relative=False), "seed": 3, "prompts": 1},
    "noise at a position": {"layer": 1, "op": Noise(0.8), "seed": 3, "positions": 1, "steps": 0, "prompts": 1},
    "noise without a generator": {"layer": 1, "op": Noise(0.8), "prompts": 1},
    "mixup": {"layer": 1, "op": Mixup(0.8), "seed": 3, "prompts": 1},
}  # fmt: skip
KINDS = {  # the same on other engines: of which model, with which settings, on how many prompts
    "transformers backend": ("transformers", {}),
    "preempted": ("native", {"preempt_in_step": 2}),
    "small steps": ("native", {"max_num_batched_tokens": 8}),
}
ALSO = {
    "transformers backend": ("add", "add at mlp_output", "add at attention_output", "add at the last position",
                             "add in two steps", "swap at a position", "swap of a run of the engine"),
    "preempted": ("add", "add at positions", "add in two steps", "swap at a position", "add in what is generated"),
    "small steps": ("add at positions", "add in two steps", "swap at a position"),
}  # fmt: skip
OWN: dict[str, Callable[[], Any]] = {}
FAILS: dict[str, tuple[Callable[[], Any], str]] = {}


def own(function: Callable[[], Any]) -> Callable[[], Any]:
    """A case that answers with {what: whether it holds}."""
    OWN[function.__name__.replace("_", " ")] = function
    return function


def fails(pattern: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """A case that is to raise."""

    def note(function: Callable[[], Any]) -> Callable[[], Any]:
        FAILS[function.__name__.replace("_", " ")] = function, pattern
        return function

    return note


# Models --------------------------------------------------------------------------------------------------------------


@cache
def plain() -> Any:
    return make("llama")


@cache
def engine(kind: str = "native", **settings: Any) -> Any:
    from nnsight.modeling.vllm import VLLM

    stand_in.WEIGHTS[kind] = (plain().config, plain().state_dict(), kind)
    return VLLM(kind, dispatch=True, **settings)


def ids(prompt: list[int]) -> Tensor:
    return torch.tensor([prompt])


def generated(model: Any, prompts: Any = PROMPTS) -> list[list[int]]:
    """The tokens, of several requests at once."""
    outputs = model.generate([{"prompt_token_ids": each} for each in prompts], max_tokens=TOKENS, temperature=0.0)
    return [output.outputs[0].token_ids for output in outputs]


def traced(model: Any, prompts: Any = PROMPTS) -> list[Tensor]:
    """The logits of the first prompt, in a trace with another request beside it, if there is one."""
    first, *others = prompts
    if not others:
        with model.trace(first, max_tokens=TOKENS, temperature=0.0) as tracer:
            logits = list().save()
            for _ in tracer.iter[:]:
                logits.append(model.logits.clone())
        return logits
    with model.trace(max_tokens=TOKENS, temperature=0.0) as tracer:
        with tracer.invoke(first):
            logits = list().save()
            for _ in tracer.iter[:]:
                logits.append(model.logits.clone())
        with tracer.invoke(others[0]):
            other = model.logits.save()  # noqa: F841
    return logits


def plainly(prompt: list[int]) -> tuple[list[int], list[Tensor]]:
    with torch.no_grad():
        output = plain().generate(
            ids(prompt), max_new_tokens=TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return output.sequences[0, len(prompt) :].tolist(), list(output.logits)


SOURCES: dict[str, Callable[[Any, Location], Any]] = {
    "plain": lambda model, at: run(plain(), {"input_ids": ids(SOURCE)}, detach=True),
    "run": lambda model, at: run(model, SOURCE),
    "kept run": lambda model, at: run(model, ids(SOURCE), [at]),
    "prompt": lambda model, at: SOURCE,
    "text": lambda model, at: " ".join(f"w{each}" for each in SOURCE),
}


def both(name: str, kind: str = "native", settings: Asked | None = None) -> dict[str, Any]:
    """What the engine and the plain model answer to the same."""
    asked = dict(SAME[name])
    prompts, seed, made = PROMPTS[: asked.pop("prompts", 3)], asked.pop("seed", None), asked.pop("source", None)
    model = engine(kind, **(settings or {}))
    fields = {key: asked[key] for key in ("layer", "site", "module", "io", "dims") if key in asked}
    sources = {}
    if made is not None:
        sources = {"engine": SOURCES[made](model, Location(**fields)), "plain": SOURCES["plain"](plain(), Location(1))}

    def block(which: Any, side: str) -> Any:
        if seed is None:
            torch.manual_seed(5)
        drawn = None if seed is None else torch.Generator().manual_seed(seed)
        return intervene(which, **asked, generator=drawn, source=sources.get(side))

    draws = isinstance(asked.get("op"), Noise | Mixup)  # then each block draws the same for its first request
    with block(model, "engine") as handle:
        tokens = generated(model, prompts)
        firings_there, change = sum(handle.firings.values()), list(handle.change.values())
        logits = [] if draws else traced(model, prompts)
    if draws:
        with block(model, "engine"):
            logits = traced(model, prompts)
    wanted, firings, changes = [], 0, []
    for prompt in prompts:
        with block(plain(), "plain") as expected:
            wanted.append(plainly(prompt))
        firings += sum(expected.firings.values())
        changes += expected.change.values()
    return {
        "engine": {"tokens": tokens, "logits": logits, "firings": firings_there},
        "plain": {"tokens": [each for each, _ in wanted], "logits": wanted[0][1], "firings": firings},
        "base": plainly(prompts[0])[1],
        "change": (change, changes),
    }


# Cases of the engine alone -------------------------------------------------------------------------------------------


@own
def the_engine_left_alone_is_the_plain_model() -> Any:
    return {"tokens": generated(engine()) == [plainly(each)[0] for each in PROMPTS]}


@own
def a_self_swap_changes_no_bit() -> Any:
    model, before = engine(), traced(engine(), PROMPTS[:1])
    source = run(model, PROMPTS[0], [Location(1)])
    with intervene(model, layer=1, source=source, steps=0) as handle:
        after = traced(model, PROMPTS[:1])
    return {"logits": all(map(torch.equal, before, after)), "written": handle.firings[Location(1)] == 1}


@own
def what_is_read_is_the_plain_activation() -> Any:
    places = [Location(1), Location(2, "block_input"), Location(1, "mlp_output"), Location(site="embedding")]
    mine, theirs = run(engine(), SOURCE, places), run(plain(), {"input_ids": ids(SOURCE)}, places)
    close = {str(each): torch.allclose(mine.activations[each], theirs.activations[each], atol=1e-5) for each in places}
    return {**close, "one token": len(mine.output.outputs[0].token_ids) == 1}


@own
def requests_share_a_slab() -> Any:
    model = engine()
    model.vllm_entrypoint.llm_engine.slabs.clear()
    generated(model)
    slabs = [sorted(slab.values()) for slab in model.vllm_entrypoint.llm_engine.slabs]
    return {"slabs": slabs == [[3, 5, 7], [1, 1, 1], [1, 1, 1], [1, 1, 1]]}


@own
def nothing_is_left_behind() -> Any:
    model, before = engine(), generated(engine())
    with intervene(model, layer=1, op=Add(vector())):
        changed = generated(model)
    try:
        with intervene(model, layer=1, op=Add(vector())):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    worker = model.vllm_entrypoint.llm_engine.engine_core.worker.model_runner
    return {
        "changed": changed != before,
        "restored": generated(model) == before,
        "edits": not model._installed_edits and not worker.nnsight_requests.templates,
        "step": "step" not in vars(model.vllm_entrypoint.llm_engine),
    }


@own
def outputs_show_nothing_of_it() -> Any:
    model = engine()
    with model.edit() as (_, edit):
        hidden = model.model.layers[0].output[0].save()  # noqa: F841
    with intervene(model, layer=1, op=Add(vector())):
        (output,) = model.generate({"prompt_token_ids": SOURCE}, max_tokens=2, temperature=0.0)
    edit.clear()
    return {"theirs": list(output.saves) == ["hidden"]}


@own
def blocks_nest_the_outer_one_first() -> Any:
    model = engine()
    with intervene(model, layer=1, op=Zero()) as outer, intervene(model, layer=1, op=Add(vector())) as inner:
        got = generated(model)
    with intervene(model, layer=1, op=Mean(vector())):
        wanted = generated(model)
    return {
        "tokens": got == wanted,
        "outer": outer.firings[Location(1)] == 12,
        "inner": inner.firings[Location(1)] == 12,
    }


@own
def noise_differs_between_requests_and_blocks_and_repeats_with_the_seed() -> Any:
    model, op = engine(), Noise(0.8, relative=False)

    def drawn(generator: torch.Generator, times: int = 2) -> list[Tensor]:
        at = Location(1)
        with intervene(model, at, op=op, steps=0, generator=generator):
            return [run(model, SOURCE, [at]).activations[at] for _ in range(times)]

    generator = torch.Generator().manual_seed(1)
    first, second = drawn(generator)
    (third,) = drawn(generator, 1)
    again, also = drawn(torch.Generator().manual_seed(1))
    with intervene(model, {Location(0, "mlp_output"): op, Location(1, "mlp_output"): op}, generator=generator):
        noisy = run(model, SOURCE, [Location(0, "mlp_output"), Location(1, "mlp_output")]).activations
    base = run(model, SOURCE, [Location(0, "mlp_output")]).activations[Location(0, "mlp_output")]
    return {
        "requests": not torch.equal(first, second),
        "blocks": not torch.equal(first, third),
        "seed": torch.equal(first, again) and torch.equal(second, also),
        "places": not torch.equal(noisy[Location(0, "mlp_output")] - base, noisy[Location(1, "mlp_output")]),
    }


@own
def what_does_not_draw_leaves_the_generators_alone() -> Any:
    generator, before = torch.Generator().manual_seed(1), torch.get_rng_state()
    state = generator.get_state()
    with intervene(engine(), layer=1, op=Add(vector()), generator=generator):
        generated(engine())
    return {"given": torch.equal(state, generator.get_state()), "default": torch.equal(before, torch.get_rng_state())}


@own
def in_chunks_what_needs_no_counting_is_the_same() -> Any:
    model = engine(enable_chunked_prefill=True, max_num_batched_tokens=4)
    model.vllm_entrypoint.llm_engine.slabs.clear()
    with intervene(model, layer=1, op=Add(vector())):
        got = generated(model)
    chunks = model.vllm_entrypoint.llm_engine.slabs[0]
    with intervene(plain(), layer=1, op=Add(vector())):
        wanted = [plainly(each)[0] for each in PROMPTS]
    return {"chunks": list(chunks.values()) == [4], "tokens": got == wanted}


@own
def layers_that_add_up_by_themselves_are_written_inside() -> Any:
    model = engine("passing on")
    with intervene(model, layer=1, site="mlp_output", op=Add(vector(), 3.0)):
        got = generated(model)
    with intervene(plain(), layer=1, site="mlp_output", op=Add(vector(), 3.0)):
        wanted = [plainly(each)[0] for each in PROMPTS]
    return {"tokens": got == wanted}


@own
def a_named_edit_of_the_user_goes_on() -> Any:
    model = engine()
    with model.edit(name="theirs") as (_, edit):
        model.model.layers[0].mlp.output[:] = 0
    theirs = generated(model)
    with intervene(model, layer=1, op=Add(torch.zeros(WIDTH))):
        got = generated(model)
    edit.clear()
    return {"tokens": got == theirs, "changes": theirs != generated(model)}


# What is refused -----------------------------------------------------------------------------------------------------


def written(model: Any, **asked: Any) -> None:
    asked = {"op": Add(vector()), **({} if {"at", "site", "module"} & asked.keys() else {"layer": 1}), **asked}
    with intervene(model, **asked):
        generated(model)


for _site in ("query", "key", "value", "attention_pattern", "attention_scores", "attention_heads"):
    FAILS[_site] = (
        (lambda site=_site: written(engine(), layer=1, site=site)),
        rf"{_site}.1 cannot .*one kernel.*qkv_proj",
    )


@fails(r"heads=.* cannot be written on a vLLM engine")
def heads() -> None:
    written(engine(), at=Location(1, "attention_heads", heads=[0]))


@fails(r"logits cannot be written .* model.logits = … in a trace")
def the_logits() -> None:
    written(engine(), site="logits")


@fails(r"no operation in a forward can be reached there")
def an_operation() -> None:
    written(engine(), at=Location(module="model.layers.1.mlp", operation="silu_0"))


@fails(r"PassingOnLayer passes on two tensors, .* so the value of block_output.1 is not known")
def a_block_output_that_cannot_be_told() -> None:
    written(engine("passing on"))


@fails(r"names no token in 1 of 1 examples")
def a_position_that_is_not_there() -> None:
    written(engine(), positions=50)


@fails(r"names no token in 1 of 1 examples")
def a_position_that_is_not_there_in_a_trace() -> None:
    with intervene(engine(), layer=1, op=Add(vector()), positions=50):
        traced(engine())


@fails(r"block_output.1 never ran inside this intervene block; generate")
def a_block_without_requests() -> None:
    with intervene(engine(), layer=1, op=Add(vector())):
        pass


@fails(r"module:lm_head never ran inside this intervene block")
def a_module_that_is_not_called() -> None:
    written(engine(), module="lm_head")


@fails(r"ran 4 times and nothing was written there: no call read the tokens of steps=9")
def a_step_that_is_not_reached() -> None:
    with intervene(engine(), layer=1, op=Add(vector()), steps=9):
        generated(engine(), PROMPTS[:1])


@fails(r"holds a tensor of shape \[7\]")
def a_vector_of_another_width() -> None:
    written(engine(), op=Add(vector(7)))


@fails(r"has shape \[1, 3, 16\] in the base run and \[1, 7, 16\] in the source run")
def a_source_of_another_length() -> None:
    with intervene(engine(), layer=1, source=run(engine(), SOURCE), steps=0):
        generated(engine(), PROMPTS[1:2])


@fails(r"the source of block_output.1 holds 2 examples and a request of an engine is one")
def a_source_of_two_examples() -> None:
    written(engine(), op=Swap(), source=run(plain(), {"input_ids": torch.tensor([SOURCE, SOURCE])}))


@fails(r"module:model.layers.2.mlp.down_proj ran [23] times in the first 2 steps of a request, and on an engine")
def a_module_that_runs_twice() -> None:
    written(engine("twice"), module="model.layers.2.mlp.down_proj")


@fails(r"module:model.layers.2.mlp.down_proj ran 2 times in the first 1 steps of a request, and on an engine")
def a_module_that_runs_twice_in_the_only_step() -> None:
    run(engine("twice"), SOURCE, [Location(module="model.layers.2.mlp.down_proj")])


@fails(r"an engine runs one prompt")
def two_prompts() -> None:
    run(engine(), torch.tensor([SOURCE, SOURCE]))


@fails(r"record does not work on a vLLM engine")
def a_record_block() -> None:
    with record(engine(), [Location(1)]):
        generated(engine())


@fails(r"interchange does not work on a vLLM engine")
def an_interchange() -> None:
    interchange(engine(), SOURCE, SOURCE, Location(1))


@fails(r"sweep does not work on a vLLM engine|an engine runs one prompt|holds no tensors")
def a_sweep() -> None:
    sweep(engine(), ids(SOURCE), ids(SOURCE), at=[Location(1)], metric=lambda output: 0.0)


@fails(r"remote='http://host' asks another machine")
def another_machine() -> None:
    written(engine(), remote="http://host")


@fails(r"reads prompts in chunks .*positions, steps and sources cannot be lined up")
def positions_in_chunks() -> None:
    written(engine(enable_chunked_prefill=True, max_num_batched_tokens=4), positions=-1)


@fails(r"does not read tokens again .*enable_prefix_caching=False")
def a_prefix_cache() -> None:
    written(engine(enable_prefix_caching=True))


@fails(r"pipeline_parallel_size=2 puts its blocks into several processes")
def several_stages() -> None:
    written(engine(pipeline_parallel_size=2))


@fails(r"positions and steps cannot be counted: the engine read 3 tokens after the first 4")
def chunks_that_nobody_told_of() -> None:
    model = engine(enable_chunked_prefill=True, max_num_batched_tokens=4)
    scheduler = model.vllm_entrypoint.llm_engine.vllm_config.scheduler_config
    held = model.vllm_entrypoint.llm_engine.vllm_config
    model.vllm_entrypoint.llm_engine.vllm_config = type(held)(**{**vars(held), "scheduler_config": None})
    real = model.vllm_entrypoint.llm_engine._schedule
    model.vllm_entrypoint.llm_engine._schedule = lambda: _with(model, held, real)
    try:
        with intervene(model, layer=1, op=Add(vector()), positions=0):
            generated(model, PROMPTS[:1])
    finally:
        model.vllm_entrypoint.llm_engine.vllm_config = held
        del model.vllm_entrypoint.llm_engine._schedule
        assert scheduler.enable_chunked_prefill


def _with(model: Any, config: Any, schedule: Callable[[], Any]) -> Any:
    now = model.vllm_entrypoint.llm_engine.vllm_config
    model.vllm_entrypoint.llm_engine.vllm_config = config
    try:
        return schedule()
    finally:
        model.vllm_entrypoint.llm_engine.vllm_config = now


@fails(r"its engine streams \(mode='async'\)")
def a_streaming_engine() -> None:
    model = engine(seed=1)
    model._async_engine = True
    written(model)


@fails(r"its engine replays CUDA graphs \(taps=\['model.layers.1.output'\]\)")
def an_engine_with_taps() -> None:
    model = engine(seed=2)
    model.taps = ("model.layers.1.output",)
    written(model)


# The program ---------------------------------------------------------------------------------------------------------


def answer(compute: Callable[[], Any]) -> Any:
    """What a case answers, the error that it raises, or how it broke."""
    with torch.random.fork_rng():
        try:
            return compute()
        except InterventionError as error:
            return {"error": str(error)}
        except Exception:
            return {"broke": traceback.format_exc()}


@cache
def answer_to(name: str) -> dict:
    """Return what a case answers: of the engine and of the plain model, or of the engine alone."""
    if name in OWN:
        return answer(OWN[name])
    if name in FAILS:
        return answer(FAILS[name][0])
    if name in SAME:
        return answer(lambda: both(name))
    same, also = name.split(", ")
    kind, settings = KINDS[also]
    return answer(lambda: both(same, kind, settings))


if __name__ == "__main__":
    assert VOCABULARY == 30
    warnings.filterwarnings("ignore", ".*was never reached: the loop asked for a step")
    torch.set_num_threads(1)
    stand_in.install()
    serve(answer_to)
