"""Interchange intervention training: a network learns to compute what a causal model computes, where it is told."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from distill.causal.model import CausalModel
from distill.causal.values import Values, as_answers
from distill.errors import checked
from distill.interchange.mapping import Pair
from distill.interchange.swap import Ran, source_of, swapped
from distill.losses import cross_entropy
from distill.objectives.objective import About, Objective
from distill.objectives.step import Reads, Step
from interventions import Location, Run, as_location


@checked
class IIT(Objective):
    """Interchange intervention training on a causal model. Terms: `task`, `iit` and, with `strict`, `siit`.

    Every step draws one entry of the mapping and a source for each example. `iit` compares what the network answers
    with the aligned places taken from its run on the source, with what the causal model answers with the variables
    taken from its own; `task` compares the answers on the base. Gradients flow through the network's base and source
    runs. Answers are compared by cross-entropy; those of a real-valued causal model by squared error.

    Geiger et al. 2021 (arXiv:2112.00826), section 3; strict: Gupta et al. 2024 (arXiv:2407.14494), section 3.

    Args:
        strict: places that hold no variable. One is drawn in each step and taken from the source, and the answer must
            stay that of the base.
        detach_source: cut the network's source run off from the graph.
        positions: which tokens of the places, as `CausalModel.select` takes them: one choice for all, or {variable or
            location: choice}. None is all of them.
    """

    about = About(
        ("task", "iit", "siit"),
        "CE(N(b), y) + CE(N(b; Π(v) ← N(s)), H(b; v ← H(s))), v drawn; strict: + CE(N(b; unaligned ← N(s)), y)",
        "Geiger et al. 2021, arXiv:2112.00826",
        "student: a source run, resumed counterfactual runs",
    )

    compares_runs = False

    def __init__(
        self, *, strict: Iterable[Location | str] = (), detach_source: bool = False, positions: Any = None
    ) -> None:
        super().__init__()
        self.strict, self.detach_source = tuple(as_location(place) for place in strict), detach_source
        self.positions = positions

    @property
    def interchanges(self) -> bool:
        """True: its counterfactual runs resume from the base runs."""
        return True

    def reads(self, mapping: Sequence[Pair]) -> Reads:
        """Nothing: sources are runs of their own, and base runs keep what resuming takes."""
        return Reads()

    def forward(self, step: Step) -> dict[str, Tensor]:
        """The terms of one drawn entry of the mapping."""
        model, feed = step.causal, step.feed
        assert feed is not None
        values = {name: step.batch[name] for name in model.inputs}
        base, generator = model.run(values), on_cpu(step.generator)
        source = model.run(feed.sources(len(step.student.logits), generator, step.generator.device))
        terms = {"task": step.mean(compared(model, step.student, base, model.answers(base)))}
        if step.mapping:
            pair = step.mapping[int(torch.randint(len(step.mapping), (), generator=generator))]
            wanted = model.answers(model.interchange(base, {pair.teacher: source}))
            terms["iit"] = step.mean(compared(model, self._swapped(step, pair, base, source), base, wanted))
        if self.strict:
            place = self.strict[int(torch.randint(len(self.strict), (), generator=generator))]
            swap = self._swapped(step, Pair((), (place,)), base, source)
            terms["siit"] = step.mean(compared(model, swap, base, model.answers(base)))
        return terms

    def extra_repr(self) -> str:
        """For printing."""
        return f"strict={[str(place) for place in self.strict]}, detach_source={self.detach_source}"

    def _swapped(self, step: Step, pair: Pair, base: Values, source: Values) -> Run:
        model, network = step.causal, step.student.model
        taken = source_of(model, network, source, (pair,))
        if self.detach_source and isinstance(taken.run, Run):
            taken = Ran(source, taken.run.detach())
        return swapped(model, network, pair, Ran(base, step.student), taken)


def compared(model: CausalModel, run: Run, base: Values, answers: Tensor) -> Tensor:
    """Cross-entropy [nats] of a network's answers under those of the causal model; for real values squared error."""
    logits = model.decode(run.logits, base)
    if answers.is_floating_point():
        return (as_answers(logits, answers) - answers.to(logits)).square().mean()
    return cross_entropy(logits, answers)


def on_cpu(generator: torch.Generator) -> torch.Generator:
    """A generator of the CPU that the given one decides: a causal model draws the same on every device."""
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    return torch.Generator().manual_seed(int(seed))
