"""Interchange intervention training (IIT): a network learns to compute what a causal model does, at aligned locations.

The network N is trained to answer as the causal model H does on a base b, and after an interchange: the locations Π(v)
aligned with a variable v take the values that they have on a source s, in N as in H,

    L = CE(N(b), H(b)) + CE(N(b; Π(v) ← N(s)), H(b; v ← H(s))),

with v drawn in every step. The strict variant adds that locations aligned with no variable do not change the answer,
CE(N(b; unaligned ← N(s)), H(b)).

Geiger et al. 2021 (arXiv:2112.00826), section 3; strict: Gupta et al. 2024 (arXiv:2407.14494), section 3.
"""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from distill.causal.model import CausalModel
from distill.causal.values import Values, as_answers, moved
from distill.errors import checked
from distill.interchange.mapping import Entry
from distill.interchange.swap import Ran, source_of, swapped
from distill.losses import cross_entropy
from distill.models.host_copies import host_columns, host_generator
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
        model, generator, device = step.causal, generator_on_cpu(step.generator), step.student.logits.device
        base, source = base_and_source(step, len(step.student.logits), generator)
        terms = {"task": step.mean(answer_loss(model, step.student, moved(base, device), model.answers(base)))}
        drawn: dict[str, tuple[Entry, Values]] = {}
        if step.mapping:
            entry = step.mapping[int(torch.randint(len(step.mapping), (), generator=step.agreed(generator)))]
            drawn["iit"] = (entry, model.interchange(base, {entry.teacher: source}))
        if self.strict:
            place = self.strict[int(torch.randint(len(self.strict), (), generator=step.agreed(generator)))]
            drawn["siit"] = (Entry((), (place,)), base)
        base, source = moved(base, device), moved(source, device)
        taken = self._source(step, source, tuple(entry for entry, _ in drawn.values())) if drawn else Ran(source, None)
        for name, (entry, after) in drawn.items():
            run = swapped(model, step.student.model, entry, Ran(base, step.student), taken)
            terms[name] = step.mean(answer_loss(model, run, base, model.answers(after)))
        return terms

    def extra_repr(self) -> str:
        """Return the settings for printing."""
        settings = f"strict={[str(place) for place in self.strict]}, detach_source={self.detach_source}"
        return settings if self.positions is None else f"positions={self.positions!r}, {settings}"

    def _source(self, step: Step, source: Values, entries: tuple[Entry, ...]) -> Ran:
        """Return the source run of the network, one for all entries."""
        with nullcontext() if not self.detach_source else torch.no_grad():
            taken = source_of(step.causal, step.student.model, source, entries)
        if self.detach_source and isinstance(taken.run, Run):
            return Ran(source, taken.run.detach())
        return taken


def base_and_source(step: Step, rows: int, generator: torch.Generator) -> tuple[Values, Values]:
    """Return the values of all variables on the bases of a step and on sources that are drawn, on the host.

    Each value is checked before the next is computed from it, and an accelerator would be waited for at each.

    Args:
        step: the step.
        rows: the number of its examples.
        generator: the generator of the draws.
    """
    model, feed, host = step.causal, step.feed, host_columns(step.batch)
    assert feed is not None
    sources = feed.sources(rows, generator, torch.device("cpu"))
    return model.run({name: host[name] for name in model.inputs}), model.run(sources)


def answer_loss(model: CausalModel, run: Run, base: Values, answers: Tensor) -> Tensor:
    """Return the cross-entropy [nats] of a network's answers under a causal model's, or their squared error."""
    logits = model.decode(run.logits, base)
    answers = answers.to(logits.device, non_blocking=True)
    if answers.is_floating_point():
        return (as_answers(logits, answers) - answers.to(logits)).square().mean()
    return cross_entropy(logits, answers)


def generator_on_cpu(generator: torch.Generator) -> torch.Generator:
    """Return a generator of the CPU that the given one decides: a causal model draws the same on every device."""
    seed = torch.randint(2**62, (), generator=host_generator(generator))
    return torch.Generator().manual_seed(int(seed))
