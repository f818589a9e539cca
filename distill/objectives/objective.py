"""Objectives: small modules that compare the runs of teacher and student and return named, unweighted terms."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from distill.causal.values import describe
from distill.errors import DistillError, checked
from distill.interchange.mapping import Entry
from distill.objectives.step import Derivable, Reads, Step
from distill.objectives.term_weights import Weight
from distill.precision import at_least_single
from interventions import Run, shown


@checked
@dataclass(frozen=True)
class About:
    """A description of an objective, as `distill objectives` prints it.

    Attributes:
        terms: the names of its terms.
        formula: the formula as implemented, in one line.
        source: author, year and arXiv id.
        runs: the runs that a step needs beyond the one base run of each model that all objectives share.
    """

    terms: tuple[str, ...]
    formula: str
    source: str
    runs: str = "none"


def terms_of(objectives: Iterable["Objective"], step: Step) -> dict[str, Tensor]:
    """Return the terms of all objectives by name.

    Raises:
        DistillError: two objectives return terms of one name.
    """
    terms: dict[str, Tensor] = {}
    for objective in objectives:
        new = _check_terms(objective, objective(step))
        twice = new.keys() & terms.keys()
        if twice:
            raise DistillError(f"two objectives return the term {min(twice)!r}; leave one of them out.")
        terms |= new
    return terms


def _check_terms(objective: nn.Module, terms: Any) -> dict[str, Tensor]:
    """Return what an objective returned, or raise DistillError if it is not a scalar for each name."""
    scalars = isinstance(terms, Mapping) and all(isinstance(each, Tensor) and each.ndim == 0 for each in terms.values())
    if not scalars or not all(isinstance(name, str) for name in terms):
        found = {name: describe(each) for name, each in terms.items()} if isinstance(terms, Mapping) else terms
        raise DistillError(
            f"{type(objective).__name__} returned {shown(found)}, and each term is a scalar by its name; return "
            "{'name': value.mean()}."
        )
    return dict(terms)


class BaseRuns(NamedTuple):
    """The base runs of a step whose answers an objective derives.

    Attributes:
        teacher: the teacher's run, cut off from the graph.
        student: makes the student's run; None makes a plain one.
        derivable: what is kept of them for the objective.
    """

    teacher: Run
    student: Callable[[], Run] | None
    derivable: Derivable


class Objective(nn.Module, ABC):
    """The base class of objectives: `objective(step)` compares runs and returns {name: scalar}.

    Parameters of its own are trained with the student.

    Attributes:
        about: its description, for `distill objectives`.
        needs: columns of the data that it cannot do without.
        lr: the learning rate of its own parameters; None is that of the schedule.
        compares_runs: whether it compares the two runs of the step, so that it can compare counterfactual ones too.
        runs_by_rows: whether it runs the models as often as the rows of a process say, which sharded ones cannot do.
        in_chunks: whether it makes logits of language models for a few tokens at a time (`lazy_logits`) if they are
            large, so that a step may end its runs before their heads.
    """

    about: ClassVar[About | None] = None
    needs: tuple[str, ...] = ()
    lr: float | None = None
    compares_runs: ClassVar[bool] = True
    runs_by_rows: ClassVar[bool] = False
    in_chunks: ClassVar[bool] = False

    def reads(self, mapping: Sequence[Entry]) -> Reads:
        """Return the locations whose activations it needs from the base runs, besides the output."""
        return Reads()

    @property
    def interchanges(self) -> bool:
        """True if its runs resume from the base runs, which then keep the output of every block."""
        return False

    @property
    def weights(self) -> Mapping[str, Weight]:
        """The weights of its terms in its paper, where they are not 1."""
        return {}

    def base_runs(
        self, models: tuple[nn.Module, nn.Module], batch: Mapping[str, Tensor], reads: Reads, *, resumable: bool
    ) -> BaseRuns | None:
        """Return the base runs of a step, where this objective derives their answers; by default None, for plain ones.

        Args:
            models: teacher and student.
            batch: the columns of the data, on the device.
            reads: the locations to record.
            resumable: whether interchanges resume from the runs.
        """
        return None

    def prepare(self, step: Step, rows: int) -> None:
        """Make what depends on the models and the data, once before training: projections, memories.

        Args:
            step: a trial on a few rows, without a graph and without the activations that `reads` names, as these may
                depend on what is made here; the default generators are those of the seed.
            rows: how many rows the data has.
        """

    def alter(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> Mapping[str, Tensor]:
        """Return the batch that both models read instead of this one, e.g. with masked tokens."""
        return batch

    def counts(self, batch: Mapping[str, Tensor]) -> Mapping[str, int]:
        """Return {kind of mean: number of values} for its means that are neither over examples nor over tokens."""
        return {}

    def __repr__(self) -> str:
        """Return its class and settings, without what it learns or remembers."""
        return f"{type(self).__name__}({self.extra_repr()})"

    @abstractmethod
    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the terms of this step by name, each a scalar, not weighted."""


def matching(match: Objective | Sequence[Objective], caller: str, compared: str) -> nn.ModuleList:
    """Return the objectives that compare the runs which another objective makes.

    Args:
        match: one objective, or several.
        caller: the name of the other objective.
        compared: the runs, e.g. "counterfactual runs".

    Raises:
        DistillError: none, or one that does not compare the runs that it is given.
    """
    matched = [match] if isinstance(match, Objective) else list(match)
    odd = next((each for each in matched if not isinstance(each, Objective) or not each.compares_runs), None)
    if odd is not None or not matched:
        raise DistillError(
            f"{caller}(match={match!r}) compares {compared}, and {odd if matched else 'nothing'} does not compare the "
            "runs that it is given; use e.g. match=[KD(2.0), Cosine()]."
        )
    return nn.ModuleList(matched)


def linear(width_in: int, width_out: int, like: Shaped[Tensor, "..."]) -> nn.Linear:
    """Return a new linear layer in at least single precision, on the device of `like`.

    Its weights are drawn by the default generator of the CPU, so that they are the same on every device. Call it in
    `Objective.prepare`, where that generator is seeded.
    """
    return nn.Linear(width_in, width_out).to(like.device, at_least_single(like.dtype))
