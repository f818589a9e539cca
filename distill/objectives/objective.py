"""What an objective is: a small module that compares runs and returns named, unweighted terms."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from distill.causal_models import CausalModel
from distill.errors import DistillError
from distill.mapping import Pair
from interventions import Location, Run


@dataclass(frozen=True)
class Reads:
    """Locations whose activations an objective compares."""

    teacher: tuple[Location, ...] = ()
    student: tuple[Location, ...] = ()


@dataclass(frozen=True, eq=False)
class Step:
    """What the objectives of one training step see.

    Attributes:
        batch: the columns of the data, on the device.
        student: the run of the student on the batch, attached to the graph.
        teacher: the run of the teacher on the batch, without a graph; None where there is no teacher, or a causal one.
        causal: the teacher, where it is a causal model; the batch then holds the values of its inputs.
        mapping: the pairs of locations to interchange.
        reads: what the objectives compare, to be recorded in counterfactual runs too.
        generator: the one source of randomness.
    """

    batch: Mapping[str, Tensor]
    student: Run
    teacher: Run | None
    mapping: tuple[Pair, ...]
    generator: torch.Generator
    reads: Reads = field(default_factory=Reads)
    causal: CausalModel | None = None

    @property
    def taught(self) -> Run:
        """The teacher's run, or an error that says that there is none."""
        if self.causal is not None:
            raise DistillError(
                "this objective compares with the run of a network and the teacher is a causal model; use "
                "objective=IIT()."
            )
        if self.teacher is None:
            raise DistillError("this objective compares with a teacher and there is none; use objective=[Labels()].")
        return self.teacher

    def mask(self, logits: Tensor) -> Tensor | None:
        """For token models, `[batch, token]`: which positions count (no padding). None for one answer an example."""
        if logits.ndim < 3:
            return None
        mask = self.batch.get("decoder_attention_mask" if "decoder_input_ids" in self.batch else "attention_mask")
        return mask if mask is not None and mask.shape == logits.shape[:2] else None


class Objective(nn.Module, ABC):
    """Compares runs: `objective(step)` returns {name: scalar}. Parameters of its own are trained with the student."""

    def reads(self, mapping: Sequence[Pair]) -> Reads:
        """Locations that it needs of the base runs, besides the output."""
        return Reads()

    @property
    def interchanges(self) -> bool:
        """Whether it resumes from the base runs, which then keep what every block returned."""
        return False

    @abstractmethod
    def forward(self, step: Step) -> dict[str, Tensor]:
        """The terms of this step by name, each a scalar, not weighted."""
