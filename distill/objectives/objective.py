"""What an objective is: a small module that compares runs and returns named, unweighted terms."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from distill.causal_models import CausalModel
from distill.errors import DistillError
from distill.mapping import Pair
from distill.samples import Feed
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
        network: the student.
        base: makes its run on the batch; `student` asks for it once.
        teacher: the run of the teacher on the batch, without a graph; None where there is no teacher, or a causal one.
        feed: of a causal teacher: the model, and where sources come from; the batch then holds its inputs.
        mapping: the pairs of locations to interchange.
        reads: what the objectives compare, to be recorded in counterfactual runs too.
        generator: the one source of randomness.
    """

    batch: Mapping[str, Tensor]
    network: nn.Module
    base: Callable[[], Run]
    teacher: Run | None
    mapping: tuple[Pair, ...]
    generator: torch.Generator
    reads: Reads = field(default_factory=Reads)
    feed: Feed | None = None

    @cached_property
    def student(self) -> Run:
        """The run of the student on the batch, attached to the graph."""
        return self.base()

    @property
    def causal(self) -> CausalModel:
        """The causal model that is the teacher, or an error that says that it is none."""
        if self.feed is None:
            raise DistillError(
                "this objective learns from a causal model and the teacher is none; use DIITO() for a network, or pass "
                "a distill.CausalModel."
            )
        return self.feed.model

    @property
    def taught(self) -> Run:
        """The teacher's run, or an error that says that there is none."""
        if self.feed is not None:
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
