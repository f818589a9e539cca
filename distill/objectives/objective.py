"""What an objective is: a small module that compares runs and returns named, unweighted terms."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar
from zlib import crc32

import torch
from torch import Tensor, nn

from distill.causal_models import CausalModel
from distill.errors import DistillError
from distill.inputs import answer_mask
from distill.mapping import Pair
from distill.samples import Feed
from distill.tasks import Rows
from distill.weights import Weight
from interventions import Location, Run


@dataclass(frozen=True)
class Reads:
    """Locations whose activations an objective compares."""

    teacher: tuple[Location, ...] = ()
    student: tuple[Location, ...] = ()


@dataclass(frozen=True)
class About:
    """What `distill objectives` says of an objective.

    Attributes:
        terms: their names.
        formula: as implemented, in one line.
        source: author, year and arXiv id.
        runs: what it costs a step beyond the one base run of each model that all objectives share.
    """

    terms: tuple[str, ...]
    formula: str
    source: str
    runs: str = "none"


@dataclass(frozen=True, eq=False)
class Moment:
    """When in the training a step is, and which part of it these rows are.

    Attributes:
        rows: the numbers of the rows in the data, `[batch]`; None where the data has no numbers.
        epoch, epochs: passes over the data that are done, and how many there will be.
        part: the number of this part of the step.
        shares: of each kind of mean ("examples", "tokens", or as an objective counts), what a mean over these rows is
            times to add up to the mean over the whole step; 1 where a step is computed in one part.
    """

    rows: Tensor | None = None
    epoch: float = 0.0
    epochs: float = 1.0
    part: int = 0
    shares: Mapping[str, float] = field(default_factory=dict)

    @property
    def progress(self) -> float:
        """The share of the training that is done."""
        return min(self.epoch / self.epochs, 1.0)


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
        moment: when it is.
        data: all rows that are trained on; in `prepare` alone, and not those of a causal teacher.
    """

    batch: Mapping[str, Tensor]
    network: nn.Module
    base: Callable[[], Run]
    teacher: Run | None
    mapping: tuple[Pair, ...]
    generator: torch.Generator
    reads: Reads = field(default_factory=Reads)
    feed: Feed | None = None
    moment: Moment = field(default_factory=Moment)
    data: Rows | None = None

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

    def column(self, name: str, asked: str) -> Tensor:
        """A column of the data, or an error that says that `asked` needs it."""
        if name not in self.batch:
            raise DistillError(
                f"{asked} needs a column {name!r} and the data has {', '.join(self.batch)}; add it, or leave {asked} "
                "out to train on what the teacher says."
            )
        return self.batch[name]

    def mask(self, states: Tensor) -> Tensor | None:
        """For states of tokens, `[batch, token, …]`: which positions count (no padding). None for one an example."""
        if states.ndim < 3:
            return None
        mask = answer_mask(self.network, self.batch)
        return mask if mask is not None and mask.shape == states.shape[:2] else None

    def mean(self, value: Tensor, over: Tensor | str | None = None) -> Tensor:
        """A mean over these rows as its part of the mean over the whole step.

        Args:
            value: the mean, a scalar.
            over: the mask of the tokens that it is over, None for a mean over examples, or a kind that the objective
                counts.
        """
        kind = over if isinstance(over, str) else "examples" if over is None else "tokens"
        share = self.moment.shares.get(kind, 1.0)
        return value if share == 1.0 else value * share

    def drawing(self, name: str) -> torch.Generator:
        """A generator for draws of one's own, decided by the step's: to use it changes no other draws."""
        seed = crc32(f"{name} {self.moment.part}".encode()) ^ self.generator.initial_seed()
        return torch.Generator(self.generator.device).manual_seed(seed % 2**63)


class Objective(nn.Module, ABC):
    """Compares runs: `objective(step)` returns {name: scalar}. Parameters of its own are trained with the student.

    Attributes:
        about: what `distill objectives` says of it.
        needs: columns of the data without which it has nothing to say.
        lr: the learning rate of its own parameters; None is that of the schedule.
    """

    about: ClassVar[About | None] = None
    needs: tuple[str, ...] = ()
    lr: float | None = None

    def reads(self, mapping: Sequence[Pair]) -> Reads:
        """Locations that it needs of the base runs, besides the output."""
        return Reads()

    @property
    def interchanges(self) -> bool:
        """Whether it resumes from the base runs, which then keep what every block returned."""
        return False

    @property
    def weights(self) -> Mapping[str, Weight]:
        """The weights that the method gives its terms, where they are not 1."""
        return {}

    def prepare(self, step: Step, rows: int) -> None:
        """Make what depends on the models and the data, once before training: projections, memories.

        Args:
            step: a trial on a few rows, without a graph or what `reads` asks for, as that may depend on what is made
                here; the default generators are those of the seed.
            rows: how many rows the data has.
        """

    def alter(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> Mapping[str, Tensor]:
        """What both models are given in place of the batch, e.g. with masked tokens."""
        return batch

    def counts(self, batch: Mapping[str, Tensor]) -> Mapping[str, int]:
        """Over how many values its means are, by kind, where that is neither the examples nor the tokens."""
        return {}

    @abstractmethod
    def forward(self, step: Step) -> dict[str, Tensor]:
        """The terms of this step by name, each a scalar, not weighted."""
