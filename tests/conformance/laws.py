"""What must hold for every model: each law returns None, or the reason why it does not hold."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from interventions import InterventionError, interchange, run
from interventions.architectures import architecture
from tests.conformance.building import Subject, tensors
from tests.conformance.cases import Case, away, same, seeded
from tests.interventions.models import trace

ATTENTION = re.compile("attention|attn", re.I)
SAME = "both inputs give the same output"
DRAWS = "draws in eval mode"


def some_layers(layers: list[int]) -> list[int]:
    return sorted({layers[0], layers[len(layers) // 2], layers[-1]})


def found(case: Case) -> str | None:
    """Blocks are found, as many as the configuration states, and every stack runs."""
    if not case.stacks:
        return "no stack of blocks is found"
    stated = getattr(case.model.config, "num_hidden_layers", None)
    if isinstance(stated, int) and stated not in (counts := [len(stack.blocks) for stack in case.stacks]):
        return f"the configuration states {stated} layers; stacks of {counts} are found"
    idle = [stack.path for stack in case.stacks if not case.ran[stack.name]]
    return f"never runs on these inputs: {', '.join(idle)}" if idle else None


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
    """Where there is attention: a head swapped with its own changes nothing, with another's it changes the output."""
    base, wanted, refused, checked = case.runs[0], tensors(case.runs[0].output), "", 0
    for stack in case.deciding or case.live():
        places = []
        for layer in case.ran[stack.name]:
            if not any(ATTENTION.search(type(part).__name__) for part in stack.blocks[layer].modules()):
                continue
            at = replace(case.at(stack, layer), site="attention_heads", heads=0)
            try:
                architecture(case.model).place(at)
                places.append(at)
            except InterventionError as error:
                refused = refused or str(error)
        ends, changes = list(dict.fromkeys([*places[:1], *places[-1:]])), False
        for at in ends:
            if not same(given := tensors(case.swapped(at, source=0).output), wanted):
                return DRAWS if case.draws else f"{at}: {away(given, wanted)}"
            # The queries of a decoder may be the same for every input, so that its first layer has nothing to swap.
            changes = changes or not same([case.main(case.swapped(at))], [case.main(base)])
        if ends and not case.moves:
            return SAME
        if ends and not changes:
            return f"{' and '.join(map(str, ends))} do not change the output"
        checked += len(ends)
    return None if checked else refused or None


def nothing_left(case: Case, before: list) -> str | None:
    """Hooks, `forward`, mode and gradients are what they were."""
    return None if trace(case.model) == before else "hooks or attributes stay on the model"


LAWS: dict[str, Callable[[Case], str | None]] = {
    "found": found,
    "identity": identity,
    "last swap": last_swap,
    "resumed": resumed,
    "heads": heads,
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
