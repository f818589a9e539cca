"""What must hold for every model: each law returns None, or the reason why it does not hold."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from interventions import InterventionError, Location, interchange, run
from interventions.locations import BLOCK_SITES
from interventions.models.architectures import architecture
from interventions.models.attentions import kind_of
from interventions.models.axes import axis
from interventions.models.layers import Missing, is_norm
from interventions.models.stacks import Stack
from tests.conformance.building import Subject, tensors
from tests.conformance.cases import Case, away, same, seeded
from tests.conformance.plans import SIZE
from tests.conformance.positions import positions
from tests.interventions.tiny_models import trace

ATTENTION = re.compile("attention|attn", re.I)
SAME = "both inputs give the same output"
DRAWS = "draws in eval mode"
OUTSIDE = "it has attention outside its blocks only"


def some_layers(layers: list[int]) -> list[int]:
    return sorted({layers[0], layers[len(layers) // 2], layers[-1]})


def found(case: Case) -> str | None:
    """Blocks are found, as many as the configuration states."""
    if not case.stacks:
        return "no stack of blocks is found"
    stated = getattr(case.model.config, "num_hidden_layers", None)
    if isinstance(stated, int) and stated not in (counts := [len(stack.blocks) for stack in case.stacks]):
        return f"the configuration states {stated} layers; stacks of {counts} are found"
    return None


def runs(case: Case) -> str | None:
    """Every stack of blocks runs on the inputs that are given here."""
    idle = [stack.path for stack in case.stacks if not case.ran[stack.name]]
    return f"never runs on these inputs: {', '.join(idle)}" if idle else None


def examples(case: Case) -> str | None:
    """What a block returns has as many examples as the batch, on the axis where they are looked for."""
    for stack in case.live():
        at = case.at(stack, case.ran[stack.name][0])
        with seeded():
            state = run(case.model, case.base, at=[at]).activations[at]
        axes = architecture(case.model).place(at).axes_of(state)
        if state.shape[axis(axes, "b")] != SIZE:
            return f"{at} has shape {list(state.shape)}, read as {axes}"
    return None


def identity(case: Case) -> str | None:
    """Swapping a block's output with its own changes no bit."""
    wanted = tensors(case.runs[0].output)
    if not torch.isfinite(case.main(case.runs[0])).all():
        return "the output is not finite"
    for stack in case.live():
        for layer in some_layers(case.ran[stack.name]):
            given = tensors(case.swapped(case.at(stack, layer), source=0).output)
            if not same(given, wanted):
                return DRAWS if case.draws else f"{case.at(stack, layer)}: {away(given, wanted)}"
    return None if case.live() else "no block runs"


def last_swap(case: Case) -> str | None:
    """With the last block's output of the source, the output is that of the source."""
    if not case.live():
        return "no block runs"
    if not case.moves:
        return SAME
    if not case.deciding:
        places = [case.at(stack, case.ran[stack.name][-1]) for stack in case.live()]
        given = case.swapped(*places)
        return f"the last block does not decide the output alone: {away([case.main(given)], [case.main(case.runs[1])])}"
    return None


def resumed(case: Case) -> str | None:
    """A counterfactual that resumes half way is bit for bit the one that runs in full, differs, and skips blocks."""
    if not case.moves:
        return SAME
    for stack in case.deciding or case.live():
        layers = case.ran[stack.name]
        at = case.at(stack, layers[len(layers) // 2])
        full = case.swapped(at)
        with counted(stack.blocks[layers[0]], stack.blocks[layers[-1]]) as count:
            with seeded():
                base = run(case.model, case.base)
            before = len(count)
            with seeded():
                again = interchange(case.model, base, case.runs[1], at)
        if not same(tensors(again.output), tensors(full.output)):
            return DRAWS if case.draws else f"{at}: {away(tensors(again.output), tensors(full.output))}"
        if same([case.main(full)], [case.main(case.runs[0])]):
            return f"{at} does not change the output"
        if len(count) > before:
            return f"{at}: nothing was skipped"
    return None if case.live() else "no block runs"


@contextmanager
def counted(block: nn.Module, other: nn.Module) -> Iterator[list]:
    """Counts what runs inside a block and not in another; such hooks of the user stay silent where it is skipped."""
    calls: list = []
    mine = set(block.modules()) - {block} - set(other.modules())
    handles = [module.register_forward_hook(lambda *_: calls.append(1)) for module in mine]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def heads(case: Case) -> str | None:
    """A head swapped with its own changes nothing, with another's the output: in every stack with attention."""
    base, wanted, checked = case.runs[0], tensors(case.runs[0].output), 0
    for stack in case.live():
        places, refused = head_places(case, stack)
        if refused:
            return refused
        ends, changes = list(dict.fromkeys([*places[:1], *places[-1:]])), False
        for at in ends:
            if not same(given := tensors(case.swapped(at, source=0).output), wanted):
                return DRAWS if case.draws else f"{at}: {away(given, wanted)}"
            # The queries of a decoder may be the same for every input, so that its first layer has nothing to swap.
            changes = changes or not same(tensors(case.swapped(at).output), tensors(base.output))
        if ends and not case.moves:
            return SAME
        if ends and not changes:
            return f"{' and '.join(map(str, ends))} do not change the output"
        checked += len(ends)
    if checked or not attends(case.model):
        return None
    return "no block runs" if case.stacks else OUTSIDE


def head_places(case: Case, stack: Stack) -> tuple[list[Location], str]:
    """Where a stack has heads; and why it has none, if it has attention and no heads at all."""
    places, refused = [], ""
    for layer in case.ran[stack.name]:
        if not attends(stack.blocks[layer]):
            continue
        at = replace(case.at(stack, layer), site="attention_heads", heads=0)
        try:
            architecture(case.model).place(at)
            places.append(at)
        except InterventionError as error:
            refused = refused or str(error)
    return places, "" if places else refused


def attends(module: nn.Module) -> bool:
    """Whether there is attention in a module: a class that is called so, or whose code computes it."""
    return any(ATTENTION.search(type(part).__name__) or kind_of(part) for part in module.modules())


def final_norm(case: Case) -> str | None:
    """The final norm of a stack runs after its last block; where none is found, it is no norm that runs first then."""
    found = architecture(case.model)
    for stack in case.live():
        last = max(i for i, (module, ended) in enumerate(case.events) if ended and module in stack.blocks)
        later = [module for module, ended in case.events[last + 1 :] if not ended]
        try:
            norm = found.final_norm(stack)
        except Missing:
            first = next((module for module in later if is_norm(module) or holds_weights(module)), None)
            if first is not None and is_norm(first) and found.place(Location(module=found.paths[first])).block is None:
                return f"{found.paths[first]} runs after {stack.path}, and it is said to have none"
            continue
        if norm not in later:
            return f"{found.paths[norm]} never runs after the last block of {stack.path}"
    return None if case.live() else "no block runs"


def holds_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def described(case: Case) -> str | None:
    """Every site that is described of a block that runs, runs with it."""
    found, called = architecture(case.model), {module for module, _ in case.events}
    for stack in case.live():
        for layer in case.ran[stack.name]:
            for site in BLOCK_SITES:
                at = replace(case.at(stack, layer), site=site)
                try:
                    place = found.place(at)
                except InterventionError:
                    continue
                if place.module not in called:
                    return f"{at} is {place.path}, which never runs"
    return None if case.live() else "no block runs"


def nothing_left(case: Case, before: list) -> str | None:
    """Hooks, `forward`, mode and gradients are what they were."""
    return None if trace(case.model) == before else "hooks or attributes stay on the model"


LAWS: dict[str, Callable[[Case], str | None]] = {
    "found": found,
    "runs": runs,
    "examples": examples,
    "identity": identity,
    "last swap": last_swap,
    "final norm": final_norm,
    "described": described,
    "resumed": resumed,
    "heads": heads,
    "positions": positions,
}


def broken(subject: Subject) -> dict[str, str]:
    """Law → the reason why it does not hold, for those that do not."""
    case, before, result = Case(subject), trace(subject.model), {}
    for name, law in LAWS.items():
        try:
            reason = law(case)
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if reason is not None:
            result[name] = reason
    if reason := nothing_left(case, before):
        result["nothing left"] = reason
    return result
