"""Interchange intervention training (IIT): a network learns to compute what a causal model does, at aligned locations.

The network N is trained to answer as the causal model H does on a base b, and after an interchange: the locations Π(v)
aligned with a variable v take the values that they have on a source s, in N as in H,

    L = CE(N(b), H(b)) + CE(N(b; Π(v) ← N(s)), H(b; v ← H(s))),

with v drawn in every step. The strict variant adds that locations aligned with no variable do not change the answer,
CE(N(b; unaligned ← N(s)), H(b)).

Geiger et al. 2021 (arXiv:2112.00826), section 3; strict: Gupta et al. 2024 (arXiv:2407.14494), section 3.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from distill.causal.model import CausalModel
from distill.causal.values import Values, as_answers
from distill.errors import checked
from distill.interchange.mapping import Entry
from distill.interchange.swap import Ran, source_of, swapped
from distill.losses import cross_entropy
from distill.objectives.objective import About, Objective
from distill.objectives.step import Reads, Step
from interventions import Location, Run, as_location


@checked
class IIT(Objective):
    """Interchange intervention training on a causal model. Terms: `task`, `iit` and, with `strict`, `siit`.

    Every step draws one entry of the mapping and a source for each example. `task` compares the answers of network and
    causal model on the base; `iit` compares them after the aligned locations of the network, and the variables of the
    causal model, took their values on the source. Gradients flow through the network's base and source runs. Answers
    are compared by cross-entropy; those of a real-valued causal model by squared error.

    Geiger et al. 2021 (arXiv:2112.00826), section 3; strict: Gupta et al. 2024 (arXiv:2407.14494), section 3.

    Args:
        strict: locations that hold no variable. One is drawn in each step and interchanged, and the answer must stay
            that of the base.
        detach_source: cut the network's source run off from the graph.
        positions: which tokens of the locations, as `CausalModel.select` takes them: one choice for all, or {variable
            or location: choice}. None is all of them.
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

    def reads(self, mapping: Sequence[Entry]) -> Reads:
        """Return no locations: sources are runs of their own, and base runs keep what resuming needs."""
        return Reads()

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the terms for one drawn entry of the mapping."""
        model, feed = step.causal, step.feed
        assert feed is not None
        values = {name: step.batch[name] for name in model.inputs}
        base, generator = model.run(values), generator_on_cpu(step.generator)
        source = model.run(feed.sources(len(step.student.logits), generator, step.generator.device))
        terms = {"task": step.mean(answer_loss(model, step.student, base, model.answers(base)))}
        if step.mapping:
            entry = step.mapping[int(torch.randint(len(step.mapping), (), generator=generator))]
            answers = model.answers(model.interchange(base, {entry.teacher: source}))
            terms["iit"] = step.mean(answer_loss(model, self._interchange(step, entry, base, source), base, answers))
        if self.strict:
            place = self.strict[int(torch.randint(len(self.strict), (), generator=generator))]
            swap = self._interchange(step, Entry((), (place,)), base, source)
            terms["siit"] = step.mean(answer_loss(model, swap, base, model.answers(base)))
        return terms

    def extra_repr(self) -> str:
        """Return the settings for printing."""
        settings = f"strict={[str(place) for place in self.strict]}, detach_source={self.detach_source}"
        return settings if self.positions is None else f"positions={self.positions!r}, {settings}"

    def _interchange(self, step: Step, entry: Entry, base: Values, source: Values) -> Run:
        """Return the counterfactual run of the network for one entry of the mapping."""
        model, network = step.causal, step.student.model
        taken = source_of(model, network, source, (entry,))
        if self.detach_source and isinstance(taken.run, Run):
            taken = Ran(source, taken.run.detach())
        return swapped(model, network, entry, Ran(base, step.student), taken)


def answer_loss(model: CausalModel, run: Run, base: Values, answers: Tensor) -> Tensor:
    """Return the cross-entropy [nats] of a network's answers under a causal model's, or their squared error."""
    logits = model.decode(run.logits, base)
    if answers.is_floating_point():
        return (as_answers(logits, answers) - answers.to(logits)).square().mean()
    return cross_entropy(logits, answers)


def generator_on_cpu(generator: torch.Generator) -> torch.Generator:
    """Return a generator of the CPU that the given one decides: a causal model draws the same on every device."""
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    return torch.Generator().manual_seed(int(seed))
