"""A subject with the runs that several laws share."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn

from interventions import InterventionError, Location, Run, interchange, run
from interventions.models.architectures import architecture
from interventions.models.stacks import Stack
from tests.conformance.building import Subject, tensors

MAIN = ("logits", "class_queries_logits", "last_hidden_state", "transformer_decoder_last_hidden_state", "pred_masks")


class Case:
    """A subject with the runs that several laws share."""

    def __init__(self, subject: Subject) -> None:
        self.model, self.base, self.source = subject.model, subject.base, subject.source
        self.subject = subject

    @cached_property
    def stacks(self) -> tuple[Stack, ...]:
        return architecture(self.model).stacks

    @cached_property
    def ran(self) -> dict[str, list[int]]:
        """Which blocks of each stack run, once or more."""
        calls = {module for module, ended in self.events if ended}
        return {stack.name: [i for i, b in enumerate(stack.blocks) if b in calls] for stack in self.stacks}

    @cached_property
    def events(self) -> list[tuple[nn.Module, bool]]:
        """The calls of all modules in one run of the base, in order: when each began (False) and ended (True)."""
        events: list[tuple[nn.Module, bool]] = []
        hooks = []
        for module in self.model.modules():
            hooks.append(module.register_forward_pre_hook(lambda module, args: events.append((module, False))))
            hooks.append(module.register_forward_hook(lambda module, *_: events.append((module, True))))
        with seeded():
            self.model(**self.base)
        for hook in hooks:
            hook.remove()
        return events

    @cached_property
    def runs(self) -> tuple[Run, Run]:
        with seeded():
            base = run(self.model, self.base)
        with seeded():
            return base, run(self.model, self.source)

    @cached_property
    def moves(self) -> bool:
        """Whether the two batches give different outputs; else a swap shows nothing."""
        return not same(*([self.main(each)] for each in self.runs))

    @property
    def draws(self) -> bool:
        """Whether the output depends on the state of the generator."""
        with seeded():
            torch.manual_seed(1)
            return not same(tensors(self.model(**self.base)), tensors(self.runs[0].output))

    def at(self, stack: Stack, layer: int) -> Location:
        return Location(layer, stack=stack.name if len(self.stacks) > 1 else None)

    def live(self) -> list[Stack]:
        return [stack for stack in self.stacks if self.ran[stack.name]]

    def swapped(self, *places: Location, source: int = 1) -> Run:
        """The counterfactual, run in full, of the base with what the source (or with 0 the base itself) has there."""
        inputs = (self.base, self.source)[source]
        with seeded():
            return interchange(self.model, self.base, inputs, places)

    def main(self, of: Run) -> Tensor:
        """The output that counts."""
        if isinstance(of.output, dict):
            named = [of.output[name] for name in MAIN if of.output.get(name) is not None]
            return tensors([*named, of.output])[0]
        return tensors(of.output)[0]

    @cached_property
    def deciding(self) -> tuple[Stack, ...]:
        """The stacks whose last blocks decide the output: the first that does so alone, else all together."""
        live = self.live()
        wanted = self.main(self.runs[1])
        choices = [(stack,) for stack in reversed(live)] + ([tuple(live)] if len(live) > 1 else [])
        for chosen in choices:
            try:
                if same(
                    [self.main(self.swapped(*(self.at(stack, self.ran[stack.name][-1]) for stack in chosen)))], [wanted]
                ):
                    return chosen
            except InterventionError:
                if chosen is choices[-1]:
                    raise
        return ()


@contextmanager
def seeded() -> Iterator[None]:
    """Some models draw in eval mode as well; each run draws the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def same(given: list[Tensor], wanted: list[Tensor]) -> bool:
    """Bit for bit; NaN equals NaN."""
    return len(given) == len(wanted) and all(
        a.shape == b.shape and torch.equal(torch.nan_to_num(a, 7e7), torch.nan_to_num(b, 7e7))
        for a, b in zip(given, wanted, strict=True)
    )


def away(given: list[Tensor], wanted: list[Tensor]) -> str:
    pairs = [(a, b) for a, b in zip(given, wanted, strict=False) if a.shape == b.shape]
    return f"off by {max(((a - b).abs().max().item() for a, b in pairs), default=float('nan')):.1e}"
