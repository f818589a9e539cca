"""What is asked of a plain model and of the same model under nnsight: functions of a `Subject`, written once.

A case answers with named tensors, or with the text of the error that it ran into.
"""

import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from interventions import (
    PCA,
    Add,
    BoundlessRotation,
    Interpolate,
    InterventionError,
    Location,
    Mask,
    Mean,
    Mixup,
    Noise,
    Rotation,
    Run,
    SparseCoder,
    Swap,
    Zero,
    interchange,
    intervene,
    kl,
    logit_difference,
    mean_of,
    path_patch,
    record,
    run,
    run_to,
    sweep,
)
from interventions.locations import BLOCK_SITES
from tests.interventions.tiny_models import WIDTH
from tests.interventions.tracing.subjects import Subject

Answer = dict[str, Tensor | str]
Program = Callable[[Subject], dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """One program on one model.

    Attributes:
        kind: which model of nnsight it is compared with: a key of `subjects.KINDS`.
        changes: whether its logits are to be others than those of the model left alone.
        fails: a pattern of the error that it is to end with.
        within: how far its numbers may be apart, where they are not the same bit for bit.
    """

    model: str
    name: str
    program: Program
    kind: str = "NNsight"
    changes: bool = True
    fails: str = ""
    within: float = 0.0

    def __str__(self) -> str:
        return f"{self.model} {self.name}{'' if self.kind == 'NNsight' else f' ({self.kind})'}"


def computed(case: Case, subject: Subject) -> Answer:
    """What the case answers on a subject, or how it broke."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        try:
            return {name: held.detach().clone() for name, held in case.program(subject).items()}
        except InterventionError as error:
            return {"error": str(error)}
        except Exception:
            return {"broke": traceback.format_exc()}


# What is passed to the verbs -----------------------------------------------------------------------------------------


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vector(width: int, seed: int = 6) -> Tensor:
    return torch.randn(width, generator=generator(seed))


def doubled(base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
    return base * 2 + 0.5


@dataclass(frozen=True)
class Between:
    """An operator of one's own, which takes a source."""

    share: float
    needs_source = True

    def __call__(self, base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
        return base + self.share * (source - base)


OPERATORS: dict[str, Callable[[int], Any]] = {  # of the width of what is written
    "swap": lambda width: Swap(),
    "interpolate": lambda width: Interpolate(0.3),
    "zero": lambda width: Zero(),
    "mean of the source": lambda width: Mean(),
    "mean": lambda width: Mean(vector(width)),
    "add": lambda width: Add(vector(width), 1.5),
    "add renormalized": lambda width: Add(vector(width), -2.0, renormalize=True),
    "noise": lambda width: Noise(0.5),
    "noise in absolute units": lambda width: Noise(0.5, relative=False),
    "noise given": lambda width: Noise(0.5, normal=vector(width)),
    "mixup": lambda width: Mixup(0.5),
    "mixup of a quarter": lambda width: Mixup(0.5, 0.25, relative=False),
    "a function": lambda width: doubled,
    "one of one's own": lambda width: Between(0.4),
}


def subspace(kind: str, width: int = WIDTH) -> nn.Module:
    """One of `width` dims, the same whenever it is made."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        match kind:
            case "rotation":
                made: nn.Module = Rotation(4, width=width)
            case "boundless":
                made = BoundlessRotation(width=width)
            case "mask":
                made = Mask(width=width)
            case "pca":
                made = PCA.fit(torch.randn(40, width), 3)
            case _:
                made = coder(width)
        for parameter in made.parameters():
            if kind != "coder":
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return made


def coder(width: int) -> nn.Module:
    enc, dec = torch.randn(width, 2 * width), torch.randn(2 * width, width)
    return SparseCoder(lambda x: (x @ enc).relu(), lambda z: z @ dec)


SUBSPACES = ("rotation", "boundless", "mask", "pca", "coder")


def site(name: str, layer: int = 1, **fields: Any) -> Location:
    return Location(layer if name in BLOCK_SITES else None, name, **fields)


# Programs ------------------------------------------------------------------------------------------------------------


def by_interchange(subject: Subject, at: Any, *, source: bool = True, keep: Any = (), **settings: Any) -> Answer:
    """The counterfactual logits, and what is there at `keep`."""
    given = subject.source if source else None
    result = interchange(subject.model, subject.base, given, at, record=keep, **settings, **subject.elsewhere)
    return {"logits": result.logits, **{str(each): result.activations[each] for each in keep}}


def by_a_block(subject: Subject, at: Any, *, source: bool = False, seed: int | None = None, **settings: Any) -> Answer:
    """The logits of a call inside the block, with how often each place was written, and by how much it changed."""
    settings |= {} if seed is None else {"generator": generator(seed)}
    given = {"source": subject.source, **subject.elsewhere} if source else {}
    with intervene(subject.model, at, **given, **settings) as handle:
        logits = subject.call(subject.base)
    if subject.elsewhere:
        return {"logits": logits}  # the handle counts what ran here
    changes = torch.tensor(list(handle.change.values()))
    return {"logits": logits, "firings": torch.tensor(list(handle.firings.values())), "change": changes}


def by_operator(subject: Subject, name: str, width: int, at: Location, verb: str, **settings: Any) -> Answer:
    op = OPERATORS[name](width)
    sourced = getattr(op, "needs_source", False)
    program = by_interchange if verb == "interchange" else by_a_block
    return program(subject, {at: op}, source=sourced, **settings)


def drawn(subject: Subject, at: Location) -> Answer:
    """Draws from one generator, twice; and where it stands then."""
    chance = generator()
    first = by_interchange(subject, {at: Mixup(0.5)}, source=False, generator=chance)
    second = by_interchange(subject, {at: Noise(0.5)}, source=False, generator=chance)
    third = by_a_block(subject, {at: Noise(0.5)}, generator=chance)
    if subject.elsewhere:  # what a trace of the user's draws elsewhere does not come back
        return {"logits": first["logits"], "second": second["logits"], "third": third["logits"]}
    return {"logits": first["logits"], "second": second["logits"], "third": third["logits"],
            "then": torch.randn(3, generator=chance)}  # fmt: skip


def in_train_mode(subject: Subject, at: Any) -> Answer:
    """Dropout draws what it draws on a plain model."""
    subject.net.train()
    try:
        return by_a_block(subject, {at: Mixup(0.5)}) | {"then": torch.randn(3)}
    finally:
        subject.net.eval()


def in_half_precision(subject: Subject, at: Any) -> Answer:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        swapped = by_interchange(subject, at, keep=(at,), positions=-1)
        return swapped | {"inside": by_a_block(subject, {at: Noise(0.5)}, positions=0)["logits"]}


def without_gradients(subject: Subject, at: Any) -> Answer:
    with torch.inference_mode():
        answer = by_interchange(subject, at, keep=(at,), positions=-1)
    with torch.no_grad():
        kept = run(subject.model, subject.base, [at], **subject.elsewhere)
    states = (*answer.values(), kept.logits, kept.activations[at])
    return answer | {"attached": torch.tensor([state.requires_grad for state in states])}


def by_default_generator(subject: Subject, at: Location) -> Answer:
    answer = by_a_block(subject, {at: Noise(0.5)})
    return {**answer, "then": torch.randn(3)}


def every_site(subject: Subject, places: tuple[Location, ...]) -> Answer:
    """A run that keeps all of them at once."""
    kept = run(subject.model, subject.base, places, **subject.elsewhere)
    return {"logits": kept.logits, **{str(place): kept.activations[place] for place in places}}


def recorded(subject: Subject, places: tuple[Location, ...]) -> Answer:
    with record(subject.model, places) as activations:
        logits = subject.call(subject.base)
    return {"logits": logits, **{str(place): activations[place] for place in places}}


def run_there(subject: Subject, places: tuple[Location, ...]) -> Answer:
    kept = run_to(subject.model, subject.base, places, **subject.elsewhere)
    return {str(place): kept.activations[place] for place in places}


def fetched(subject: Subject, places: tuple[Location, ...]) -> Answer:
    """What a run was not asked for, and then what it is to the operators."""
    kept = run(subject.model, subject.base, **subject.elsewhere)
    vectors = kept.vectors(places[0])
    return {"logits": kept.logits, "vectors": vectors, **{str(place): kept.activations[place] for place in places}}


def of_runs(subject: Subject, at: list[Location]) -> Answer:
    """Runs as base and as source; examples of one in another order; one that stopped; a part of what a run kept."""
    last = Location(2)
    base, source = (run(subject.model, given, at, **subject.elsewhere) for given in (subject.base, subject.source))
    change = partial(interchange, subject.model, at=at, **subject.elsewhere)
    whole = change(base, source, record=[last])
    stopped = run_to(subject.model, subject.source, at, **subject.elsewhere)
    return {
        "logits": whole.logits,
        "part": whole.activations[Location(2, dims=range(3))],
        "turned": change(base, source.take(torch.tensor([2, 0, 1]))).logits,
        "cut": change(base.detach(), source.detach(), resume=False).logits,
        "stopped": change(base, stopped).logits,
        **{str(place): stopped.activations[place] for place in at},
    }


def several_sources(subject: Subject) -> Answer:
    first, second = Location(0, "mlp_output"), Location(1, "attention_output")
    other = run(subject.model, subject.base, [second], **subject.elsewhere)
    sources = {first: subject.source, second: other.take(torch.tensor([1, 2, 0]))}
    result = interchange(subject.model, subject.base, sources, [first, second], positions={first: -1},
                         **subject.elsewhere)  # fmt: skip
    with intervene(subject.model, {first: Swap(), second: Interpolate(0.5)}, source=sources, **subject.elsewhere):
        inside = subject.call(subject.base)
    return {"logits": result.logits, "inside": inside}


def nested(subject: Subject, at: Location) -> Answer:
    """The outer block writes first; what reads inside sees what both wrote."""
    push = Add(vector(WIDTH))
    with (
        intervene(subject.model, at, op=push),
        intervene(subject.model, at, op=doubled),
        record(subject.model, [at]) as activations,
    ):
        first = subject.call(subject.base)
    with intervene(subject.model, at, op=doubled), intervene(subject.model, at, op=push):
        second = subject.call(subject.base)
    return {"logits": first, "second": second, "differ": torch.tensor(not torch.equal(first, second)),
            "read": activations[at]}  # fmt: skip


def twice(subject: Subject, at: Location) -> Answer:
    """Each call inside a block counts for itself: its tokens, and its steps."""
    shorter = {key: value[:, :3] for key, value in subject.base.items()}
    with intervene(subject.model, at, op=doubled, positions=-1, steps=0), record(subject.model, [at]) as activations:
        first, second = subject.call(subject.base), subject.call(shorter)
    states = activations.calls(at)
    return {"logits": first, "second": second, "first state": states[0], "second state": states[1]}


def generated_twice(subject: Subject, settings: dict) -> Answer:
    prompts = [{key: value[:, :length] for key, value in subject.base.items() if not key.startswith("decoder")}
               for length in (4, 3)]  # fmt: skip
    settings = {**settings, "max_new_tokens": 4, "do_sample": False}
    with intervene(subject.model, layer=1, op=Add(vector(WIDTH), 3.0), positions=-1, steps=[0, 2]):
        return {f"of {len(prompt['input_ids'][0])}": subject.generate(**prompt, **settings) for prompt in prompts}


def verbs_inside(subject: Subject, at: Location) -> Answer:
    """Runs inside a block are runs of the changed model."""
    with intervene(subject.model, at, op=Zero(), positions=1):
        kept = run(subject.model, subject.base, [at, Location(2)], **subject.elsewhere)
        changed = interchange(subject.model, subject.base, subject.source, Location(2, dims=range(4)), positions=0,
                              **subject.elsewhere)  # fmt: skip
        fetched = kept.activations[Location(2, "mlp_output")]
    return {"logits": kept.logits, "at": kept.activations[at], "then": kept.activations[Location(2)],
            "changed": changed.logits, "fetched": fetched}  # fmt: skip


def swept(subject: Subject) -> Answer:
    places = [Location(0), (Location(1, "mlp_output"), Location(1, "attention_output")), Location(2, "query", heads=1)]
    metric = logit_difference(3, 4)
    grid = sweep(subject.model, subject.base, subject.source, places, metric=metric, **subject.elsewhere)
    zeroed = sweep(
        subject.model, subject.base, None, places, op=Zero(), positions=[0, -1], metric=metric, **subject.elsewhere
    )
    once = sweep(
        subject.model,
        subject.base,
        subject.source,
        places,
        positions=None,
        batch_size=3,
        metric=metric,
        **subject.elsewhere,
    )
    return {"grid": grid.values, "zeroed": zeroed.values, "once": once.values, "baseline": grid.baseline}


def averaged(subject: Subject) -> Answer:
    places = [Location(1), Location(1, "attention_heads", heads=[0, 1]), Location(2, "mlp_output", dims=range(5))]
    means = mean_of(subject.model, places, [subject.base, subject.source], **subject.elsewhere)
    with intervene(subject.model, means, positions=-1):
        logits = subject.call(subject.base)
    return {"logits": logits, **{str(place): mean.value for place, mean in means.items()}}


def patched(subject: Subject) -> Answer:
    patch = partial(path_patch, subject.model, subject.base, subject.source, **subject.elsewhere)
    sender, receivers = Location(0, "attention_heads", heads=1), [Location(2, "query", heads=[0]), Location(1)]
    late = [Location(1, "mlp_output"), Location(site="logits")]
    first = patch(sender, receivers, positions=-1)
    second = patch(sender, late, receiver_positions=[0, 1])
    return {"logits": first.logits, "second": second.logits}


def kept_of_it(subject: Subject) -> Answer:
    done = run(subject.model, subject.base, keep=last_logits, **subject.elsewhere)
    other = interchange(subject.model, subject.base, subject.source, Location(1, dims=range(5)), keep=last_logits,
                        **subject.elsewhere)  # fmt: skip
    return {"run": done.output, "interchange": other.output, "divergence": kl(done.output)(other.output)}


def last_logits(output: Any) -> Tensor:
    return output.logits[:, -1:]


def padded(given: dict[str, Tensor], side: str) -> dict[str, Tensor]:
    """The same batch, of rows of 5, 3 and 4 tokens."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    return {**given, "attention_mask": mask if side == "right" else mask.flip(1)}


def with_padding(subject: Subject, side: str, at: Location, **settings: Any) -> Answer:
    """Swapped and, in a block, pushed; the source is not padded where it is told which of its positions to take."""
    base = padded(subject.base, side)
    source = subject.source if "source_positions" in settings else padded(subject.source, side)
    swap = interchange(subject.model, base, source, at, record=[at], **settings, **subject.elsewhere)
    settings.pop("source_positions", None)
    with intervene(subject.model, at, op=Interpolate(0.5), source=padded(subject.source, side), **settings,
                   **subject.elsewhere):  # fmt: skip
        logits = subject.call(base)
    return {"logits": swap.logits, str(at): swap.activations[at], "inside": logits}


def in_a_subspace(subject: Subject, kind: str, at: Location, width: int, **settings: Any) -> Answer:
    part = Location(at.layer, at.site, heads=at.heads, dims=at.dims, subspace=subspace(kind, width))
    coordinates = run(subject.model, subject.base, [part], **subject.elsewhere).activations[part]
    result = by_interchange(subject, part, **settings)
    inside = by_a_block(subject, part, source=True, **settings)
    return {**result, "coordinates": coordinates, **{f"inside {name}": each for name, each in inside.items()}}


def gradients(subject: Subject, write: Callable[[Subject, dict, dict], Tensor], *learned: nn.Module) -> Answer:
    """Those of the weights, of what was embedded in base and source, and of subspaces."""
    embed, weights = subject.net.get_input_embeddings(), dict(subject.net.named_parameters())
    named = [
        {key.replace("input_ids", "inputs_embeds"): embed(value).detach().requires_grad_() if "ids" in key else value
         for key, value in given.items()}
        for given in (subject.base, subject.source)
    ]  # fmt: skip
    leaves = {f"{side} {key}": value for side, given in zip(("base", "source"), named, strict=True)
              for key, value in given.items() if value.is_floating_point()}  # fmt: skip
    leaves |= weights | {f"subspace {name}": value for each in learned for name, value in each.named_parameters()}
    try:
        logits = write(subject, *named)
        logits.square().mean().backward()
        return {"logits": logits.detach(), **{name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone()
                                     for name, leaf in leaves.items()}}  # fmt: skip
    finally:
        subject.net.zero_grad(set_to_none=True)


def graded_interchange(subject: Subject, base: dict, source: dict, at: Any, **settings: Any) -> Tensor:
    return interchange(subject.model, base, source, at, **settings).logits


def graded_block(subject: Subject, base: dict, source: dict, at: Any, **settings: Any) -> Tensor:
    with intervene(subject.model, at, source=source, **settings):
        return subject.call(base)


def graded_runs(subject: Subject, base: dict, source: dict, at: Any, **settings: Any) -> Tensor:
    """Through what runs kept, too."""
    before, given = run(subject.model, base, at), run(subject.model, source, at)
    result = interchange(subject.model, before, given, at, record=[Location(2)], **settings)
    return result.logits.mean(1) + result.activations[Location(2)].mean() + before.activations[at].mean()


def generated(
    subject: Subject, at: Any, settings: dict, given: dict | None = None, seed: int | None = None, **written: Any
) -> Answer:
    written |= {} if seed is None else {"generator": generator(seed)}
    prompt = {key: value for key, value in (given or subject.base).items() if not key.startswith("decoder")}
    with intervene(subject.model, at, **written) as handle:
        tokens = subject.generate(**prompt, max_new_tokens=5, do_sample=False, **settings)
    if subject.elsewhere:
        return {"tokens": tokens}
    return {"tokens": tokens, "firings": torch.tensor(list(handle.firings.values())),
            "change": torch.tensor(list(handle.change.values()))}  # fmt: skip


def generated_with_source(subject: Subject, at: Any, settings: dict, **written: Any) -> Answer:
    prompts = [{key: value for key, value in given.items() if not key.startswith("decoder")}
               for given in (subject.base, subject.source)]  # fmt: skip
    source = prompts[1] if subject.name != "t5" else subject.source
    with intervene(subject.model, at, source=source, **written, **subject.elsewhere):
        return {"tokens": subject.generate(**prompts[0], max_new_tokens=5, do_sample=False, **settings)}


def pooled_mean(subject: Subject, side: str) -> Answer:
    base, source = padded(subject.base, side), padded(subject.source, side)
    taken = {"op": Mean(), "positions": -1, "source_positions": slice(0, 2)}
    result = interchange(subject.model, base, source, Location(1), **taken, **subject.elsewhere)
    with intervene(subject.model, layer=1, op=Mean(), source=source, positions=[0], source_positions=slice(None),
                   **subject.elsewhere):  # fmt: skip
        return {"logits": result.logits, "inside": subject.call(base)}


def at_an_operation(
    subject: Subject, named: Location, operation: Location, parts: dict, tokens: int | None = None, **settings: Any
) -> Answer:
    """What a plain model has at a site, and one of nnsight at the operation that computes it."""
    at = replace(named if subject.model is subject.net else operation, **parts)
    base, source = subject.base, subject.source
    if tokens is not None:
        base, source = ({key: value[:, :tokens] for key, value in given.items()} for given in (base, source))
    kept = run(subject.model, base, [at], **subject.elsewhere)
    swapped = interchange(subject.model, base, source, at, record=[at], **settings, **subject.elsewhere)
    with intervene(subject.model, at, op=doubled, **settings), record_here(subject, at) as activations:
        logits = subject.call(base)
    answer = {"there": kept.vectors(at), "logits": swapped.logits, "swapped": swapped.vectors(at), "doubled": logits}
    if activations is not None:
        answer["recorded"] = Run(subject.model, None, None, activations).vectors(at)
    return answer


def read_at(subject: Subject, named: Location, operation: Location) -> Answer:
    at = named if subject.model is subject.net else operation
    there = run(subject.model, subject.base, [at]).activations[at]
    return {"there": there.reshape(-1, there.shape[-1])}  # examples and tokens lie on one axis in a router


def record_here(subject: Subject, at: Location) -> Any:
    return nullcontext() if subject.elsewhere else record(subject.model, [at])


def swept_at_operations(subject: Subject, pairs: tuple[tuple[Location, Location], ...]) -> Answer:
    """Sweeps, means and gradients of operations."""
    places = [named if subject.model is subject.net else operation for named, operation in pairs]
    metric, labelled = logit_difference(3, 4), dict(zip("abc", places, strict=False))
    grid = sweep(subject.model, subject.base, subject.source, labelled, metric=metric)
    means = mean_of(subject.model, places, [subject.base, subject.source])
    with intervene(subject.model, {at: Mean(means[at].value) for at in places}):
        logits = subject.call(subject.base)
    slopes = gradients(subject, partial(graded_block, at=dict.fromkeys(places, Interpolate(0.5)), positions=[0, -1]))
    return {"grid": grid.values, "logits": logits, **{f"slope {name}": each for name, each in slopes.items()}}


def generated_at(subject: Subject, named: Location, operation: Location, op: Any, **written: Any) -> Answer:
    at = named if subject.model is subject.net else operation
    answer = generated(subject, {at: op}, {}, **written)
    return {name: answer[name] for name in ("tokens", "firings")}


def nested_away(subject: Subject, at: Location) -> Answer:
    with intervene(subject.model, at, op=Zero(), positions=1), intervene(subject.model, at, op=doubled):
        return {"logits": subject.call(subject.base)}


def graded_subspace(subject: Subject, kind: str) -> Answer:
    part = subspace(kind, WIDTH)
    write = partial(graded_interchange, at=Location(1, subspace=part), positions=[0, -1])
    return gradients(subject, write, part)


def noised(subject: Subject, base: dict, source: dict) -> Tensor:
    with intervene(subject.model, layer=1, op=Mixup(0.5), generator=generator()):
        return subject.call(base)


def generated_padded(subject: Subject, at: Any, settings: dict) -> Answer:
    given = padded(subject.base, "left")
    answers = {}
    for label, chosen in (("last", -1), ("second", 1), ("all", None), ("from the second", slice(1, None))):
        answer = generated(subject, at, settings, given, positions=chosen, steps=0 if label == "second" else None)
        answers |= {f"{label} {name}": each for name, each in answer.items()}
    return answers


def generated_nested(subject: Subject, settings: dict) -> Answer:
    with intervene(subject.model, layer=2, op=doubled, steps=[0, 1]):
        return generated(subject, {Location(0): Zero()}, settings, steps=slice(2, None))


# Errors --------------------------------------------------------------------------------------------------------------


def called_nothing(subject: Subject, at: Any) -> Answer:
    with intervene(subject.model, at, op=Zero()):
        return {}


def recorded_nothing(subject: Subject, at: Location) -> Answer:
    with record(subject.model, [at]):
        return {}


def encoded_before(subject: Subject, at: Location, verb: str) -> Answer:
    """The encoder does not run where its output is given."""
    states = subject.net.get_encoder()(subject.base["input_ids"])
    given = {"encoder_outputs": states, "decoder_input_ids": subject.base["decoder_input_ids"]}
    if verb == "run":
        return {"logits": run(subject.model, given, [at], **subject.elsewhere).logits}
    if verb == "interchange":
        return {"logits": interchange(subject.model, given, None, at, op=Zero(), **subject.elsewhere).logits}
    with intervene(subject.model, at, op=Zero()):
        return {"logits": subject.call(given)}


def padding_named(subject: Subject, verb: str) -> Answer:
    given = padded(subject.base, "right")
    if verb == "interchange":
        result = interchange(subject.model, given, subject.source, Location(1), positions=3, **subject.elsewhere)
        return {"logits": result.logits}
    with intervene(subject.model, layer=1, op=Zero(), positions=[0, 4]):
        return {"logits": subject.call(given)}


def of_another_shape(subject: Subject, rows: int, tokens: int, verb: str, **settings: Any) -> Answer:
    source = {key: value[:rows, :tokens] for key, value in subject.source.items()}
    if verb == "interchange":
        result = interchange(subject.model, subject.base, source, Location(1), **settings, **subject.elsewhere)
        return {"logits": result.logits}
    with intervene(subject.model, layer=1, op=Swap(), source=source, **settings, **subject.elsewhere):
        return {"logits": subject.call(subject.base)}


def of_another_model(subject: Subject) -> Answer:
    other = run(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2))
    return {"logits": interchange(subject.model, subject.base, other, Location(1)).logits}


def of_a_counterfactual(subject: Subject) -> Answer:
    changed = interchange(subject.model, subject.base, None, Location(1), op=Zero(), **subject.elsewhere)
    return {"logits": interchange(subject.model, changed, subject.source, Location(1), **subject.elsewhere).logits}


def with_nan(subject: Subject) -> Answer:
    source = run(subject.model, subject.source, [Location(1)], **subject.elsewhere)
    source.activations[Location(1)][0, 0, 0] = torch.nan
    return {"logits": interchange(subject.model, subject.base, source, Location(1), **subject.elsewhere).logits}


def in_place(base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
    return base.mul_(2)


def narrower(base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
    return base[..., :1]


def after_weights_changed(subject: Subject, verb: str) -> Answer:
    """A run is older than the weights: said where it would be taken further, by an interchange or a fetch."""
    kept = run(subject.model, subject.base, [Location(1)])
    parameter = next(subject.net.parameters())
    with torch.no_grad():
        parameter.mul_(1.0)
    if verb == "fetch":
        return {"fetched": kept.activations[Location(1, "mlp_output")]}
    return {"logits": interchange(subject.model, subject.base, kept, Location(1)).logits}


def generated_too_little(subject: Subject, at: Location, **written: Any) -> Answer:
    return generated(subject, {at: Zero()}, {}, **written)


def with_labels(subject: Subject) -> Answer:
    with intervene(subject.model, site="logits", op=Zero()):
        return {"logits": subject.call({**subject.base, "labels": subject.base["input_ids"]})}
