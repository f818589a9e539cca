"""What an objective is: a small module that compares runs and returns named, unweighted terms."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from distill.causal.values import describe
from distill.errors import DistillError, checked
from distill.interchange.mapping import Pair
from distill.objectives.step import Reads, Step
from distill.objectives.term_weights import Weight
from distill.precision import at_least_single
from interventions import shown


@checked
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


def terms_of(objectives: Iterable["Objective"], step: Step) -> dict[str, Tensor]:
    """The terms of all objectives by name.

    Raises:
        DistillError: two objectives that return one term.
    """
    terms: dict[str, Tensor] = {}
    for objective in objectives:
        new = _named_terms(objective, objective(step))
        twice = new.keys() & terms.keys()
        if twice:
            raise DistillError(f"two objectives return the term {min(twice)!r}; leave one of them out.")
        terms |= new
    return terms


def _named_terms(objective: nn.Module, terms: Any) -> dict[str, Tensor]:
    """What an objective returned, if that is a scalar for each name."""
    scalars = isinstance(terms, Mapping) and all(isinstance(each, Tensor) and each.ndim == 0 for each in terms.values())
    if not scalars or not all(isinstance(name, str) for name in terms):
        found = {name: describe(each) for name, each in terms.items()} if isinstance(terms, Mapping) else terms
        raise DistillError(
            f"{type(objective).__name__} returned {shown(found)}, and each term is a scalar by its name; return "
            "{'name': value.mean()}."
        )
    return dict(terms)


class Objective(nn.Module, ABC):
    """Compares runs: `objective(step)` returns {name: scalar}. Parameters of its own are trained with the student.

    Attributes:
        about: what `distill objectives` says of it.
        needs: columns of the data without which it has nothing to say.
        lr: the learning rate of its own parameters; None is that of the schedule.
        compares_runs: whether it compares the runs that it is given, so that it can compare counterfactual ones.
    """

    about: ClassVar[About | None] = None
    needs: tuple[str, ...] = ()
    lr: float | None = None
    compares_runs: ClassVar[bool] = True

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

    def __repr__(self) -> str:
        """Its settings, and nothing that it learns or remembers."""
        return f"{type(self).__name__}({self.extra_repr()})"

    @abstractmethod
    def forward(self, step: Step) -> dict[str, Tensor]:
        """The terms of this step by name, each a scalar, not weighted."""


def linear(width_in: int, width_out: int, like: Shaped[Tensor, "..."]) -> nn.Linear:
    """A new linear layer, in single precision at least, where `like` is, drawn by the default generator of the CPU.

    So are its weights the same on every device. Call it in `Objective.prepare`, where that generator is seeded.
    """
    return nn.Linear(width_in, width_out).to(like.device, at_least_single(like.dtype))
