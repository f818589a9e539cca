"""Interchange intervention training: a network learns to compute what a causal model computes, where it is told."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from distill.causal_models import CausalModel
from distill.errors import DistillError
from distill.losses import cross_entropy
from distill.mapping import Pair
from distill.objectives.objective import Objective, Reads, Step
from interventions import Location, Run, as_location, interchange, run_to


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
    """

    def __init__(self, *, strict: Iterable[Location | str] = (), detach_source: bool = False) -> None:
        super().__init__()
        self.strict, self.detach_source = tuple(as_location(place) for place in strict), detach_source

    @property
    def interchanges(self) -> bool:
        """True: its counterfactual runs resume from the base runs."""
        return True

    def reads(self, mapping: Sequence[Pair]) -> Reads:
        """Nothing: sources are runs of their own, and base runs keep what resuming takes."""
        return Reads()

    def forward(self, step: Step) -> dict[str, Tensor]:
        """The terms of one drawn entry of the mapping."""
        model = self._model(step)
        values = {name: step.batch[name] for name in model.inputs}
        base = model.run(values)
        generator = _on_cpu(step.generator)
        source = model.sample(len(step.student.logits), generator, step.generator.device)
        terms = {"task": _compared(step.student, model.answers(base))}
        if step.mapping:
            pair = step.mapping[int(torch.randint(len(step.mapping), (), generator=generator))]
            wanted = model.answers(model.interchange(base, {pair.teacher: source}))
            terms["iit"] = _compared(self._swapped(step, model, source, pair.student), wanted)
        if self.strict:
            place = self.strict[int(torch.randint(len(self.strict), (), generator=generator))]
            terms["siit"] = _compared(self._swapped(step, model, source, (place,)), model.answers(base))
        return terms

    def extra_repr(self) -> str:
        """For printing."""
        return f"strict={[str(place) for place in self.strict]}, detach_source={self.detach_source}"

    def _swapped(self, step: Step, model: CausalModel, source: dict[str, Tensor], at: tuple[Location, ...]) -> Run:
        network: nn.Module = step.student.model
        taken = run_to(network, model.encode(source), at)
        return interchange(network, step.student, taken.detach() if self.detach_source else taken, at)

    def _model(self, step: Step) -> CausalModel:
        if step.causal is None:
            raise DistillError(
                "IIT learns from a causal model and the teacher is none; use DIITO() for a network, or pass a "
                "distill.CausalModel."
            )
        return step.causal


def _compared(run: Run, answers: Tensor) -> Tensor:
    if answers.is_floating_point():
        return (run.logits.reshape(answers.shape) - answers.to(run.logits)).square().mean()
    return cross_entropy(run.logits, answers)


def _on_cpu(generator: torch.Generator) -> torch.Generator:
    """A generator of the CPU that the given one decides: a causal model draws the same on every device."""
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    return torch.Generator().manual_seed(int(seed))
