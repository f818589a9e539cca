"""The computation of networks that learn together: all runs of one step in one `forward`."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distill.causal.feed import Feed
from distill.data.rows import Rows
from distill.errors import DistillError
from distill.interchange.mapping import Entry
from distill.models.head import Heads
from distill.models.inputs import inputs_of
from distill.models.loss_masks import LabelPlace, label_place
from distill.models.outputs import logits_if_any
from distill.objectives import Moment, Objective, Reads, Step
from distill.objectives.objective import terms_of
from distill.objectives.term_weights import Weight
from distill.training.computation import NOW, within
from interventions import Location, Run, run, trusting

Edge = tuple[int, int]
"""A teacher and a student of it, by their numbers among the networks."""


class Learner(nn.Module):
    """One of several networks that learn together, with its objectives.

    Args:
        number: the number of the network.
        network: the network.
        own: objectives without a teacher.
        lessons: {number of a teacher: objectives that compare with it}.
        entries: {number of a teacher: the mapping}.
        weights: weights of terms, which win over the default ones of the objectives.
    """

    def __init__(
        self,
        number: int,
        network: nn.Module,
        own: Sequence[Objective],
        *,
        lessons: Mapping[int, Sequence[Objective]],
        entries: Mapping[int, tuple[Entry, ...]],
        weights: Mapping[str, Weight],
    ) -> None:
        super().__init__()
        self.number, self.network, self.given = number, network, dict(weights)
        self.own: Any = nn.ModuleList(own)
        self.lessons: Any = nn.ModuleDict({str(teacher): nn.ModuleList(each) for teacher, each in lessons.items()})
        self.entries = dict(entries)

    @property
    def weights(self) -> dict[str, Weight]:
        """The weights of the terms of this network, with its number after each name."""
        groups = [self.own, *self.lessons.values()]
        default = {name: weight for group in groups for each in group for name, weight in each.weights.items()}
        return {f"{name}.{self.number}": weight for name, weight in {**default, **self.given}.items()}

    def reads(self, teacher: int | None) -> Reads:
        """Return the locations that the objectives with a teacher compare; None: those without one."""
        entries = () if teacher is None else self.entries[teacher]
        compared = [each.reads(entries) for each in self.objectives(teacher)]
        return Reads(
            tuple(dict.fromkeys(at for each in compared for at in each.teacher)),
            tuple(dict.fromkeys(at for each in compared for at in each.student)),
        )

    def objectives(self, teacher: int | None) -> Any:
        """Return the objectives that compare with a teacher; None: those without one."""
        return self.own if teacher is None else self.lessons[str(teacher)]

    @property
    def teachers(self) -> list[int]:
        """The numbers of its teachers."""
        return [int(name) for name in self.lessons]


class Together(nn.Module):
    """All runs of one step of networks that learn together, with the interface of `Computation`.

    Args:
        networks: the networks.
        lessons: objectives that compare with a teacher.
        own: objectives without one.
        entries: for each edge (teacher, student), the mapping.
        weights: weights of terms in all networks.

    Attributes:
        objectives: the learners, each with its network and its objectives.
        label_place: where the label of the answer at a token stands, once `prepare` has looked at the data.
        sharded: whether the weights of each block are gathered when the gradient of what it returned arrives.
    """

    label_place: LabelPlace | None = None
    sharded = False

    def __init__(
        self,
        networks: Sequence[nn.Module],
        lessons: Sequence[Objective],
        own: Sequence[Objective],
        entries: Mapping[Edge, tuple[Entry, ...]],
        weights: Mapping[str, Weight],
    ) -> None:
        super().__init__()
        self.given = dict(weights)
        learners = []
        for number, network in enumerate(networks):
            teachers = [teacher for teacher, student in entries if student == number]
            learners.append(
                Learner(
                    number,
                    network,
                    _copies(own),
                    lessons={teacher: _copies(lessons) for teacher in teachers},
                    entries={teacher: entries[teacher, number] for teacher in teachers},
                    weights=weights,
                )
            )
        self.objectives: Any = nn.ModuleList(learners)
        self._heads = Heads()

    def forward(
        self, batch: Mapping[str, Tensor], generator: torch.Generator, moment: Moment = NOW
    ) -> dict[str, Tensor]:
        """Return the terms of all networks, with the number of the network after each name."""
        groups = (group for each in self.objectives for group in (each.own, *each.lessons.values()))
        in_chunks = not self.sharded and any(objective.in_chunks for group in groups for objective in within(group))
        models = [(each, inputs_of(each, batch)) for each in self.learning] if in_chunks else []
        with self._heads.deferred(models), trusting():
            return self._terms(batch, generator, moment)

    def _terms(self, batch: Mapping[str, Tensor], generator: torch.Generator, moment: Moment) -> dict[str, Tensor]:
        runs = self._runs(batch, record=True)
        terms: dict[str, Tensor] = {}
        for number, learner in enumerate(self.objectives):
            own = terms_of(learner.own, self._step(batch, generator, moment, runs, (None, number)))
            compared: dict[str, Tensor] = {}
            for teacher in learner.teachers:
                step = self._step(batch, generator, moment, runs, (teacher, number))
                for name, term in terms_of(learner.lessons[str(teacher)], step).items():
                    part = term / len(learner.teachers) if len(learner.teachers) > 1 else term
                    compared[name] = compared[name] + part if name in compared else part
            twice = own.keys() & compared.keys()
            if twice:
                raise DistillError(
                    f"objective and own both return the term {min(twice)!r}; leave it out of one of them."
                )
            terms |= {f"{name}.{number}": term for name, term in {**own, **compared}.items()}
        return terms

    def prepare(
        self, batch: Mapping[str, Tensor], generator: torch.Generator, rows: Rows | Feed, moment: Moment = NOW
    ) -> None:
        """Let the objectives make what depends on the networks and the data, and check the names of the weights."""
        with torch.no_grad():
            runs = self._runs(batch, record=False)
            if "labels" in batch:
                table = rows.table if isinstance(rows, Rows) else None
                self.label_place = label_place(self.learning[0], logits_if_any(runs[0]), batch, table)
            for number, learner in enumerate(self.objectives):
                for teacher in (None, *learner.teachers):
                    step = self._step(batch, generator, moment, runs, (teacher, number), record=False)
                    step = replace(step, data=rows if isinstance(rows, Rows) else None)
                    for objective in within(learner.objectives(teacher)):
                        objective.prepare(step, len(rows))
            self.objectives.to(next(iter(batch.values())).device)
            names = dict.fromkeys(name.rpartition(".")[0] for name in self(batch, generator, moment))
        unknown = self.given.keys() - names.keys()
        if unknown:
            raise DistillError(
                f"weights names {min(unknown)!r} and the terms are {', '.join(names)}; correct the name, or give one "
                f"for a single network, as {next(iter(names))}.0."
            )

    @property
    def still(self) -> tuple[nn.Module, ...]:
        """An empty tuple, as all networks are trained."""
        return ()

    @property
    def learning(self) -> tuple[nn.Module, ...]:
        """The networks."""
        return tuple(learner.network for learner in self.objectives)

    @property
    def clipped(self) -> tuple[nn.Module, ...]:
        """Each network with its objectives, as if it were trained alone."""
        return tuple(self.objectives)

    def answers(self, batch: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Yield the logits of each network on a batch."""
        with torch.no_grad():
            for network in self.learning:
                yield run(network, inputs_of(network, batch), resumable=False).logits

    def _runs(self, batch: Mapping[str, Tensor], *, record: bool) -> list[Run]:
        """Return one run of each network, with all locations at which it is compared, as a student and as a teacher."""
        compared: list[dict[Location, None]] = [{} for _ in self.objectives]
        resumable = [False for _ in self.objectives]
        for number, learner in enumerate(self.objectives):
            for teacher in (None, *learner.teachers):
                reads = learner.reads(teacher) if record else Reads()
                interchanges = any(each.interchanges for each in learner.objectives(teacher))
                for one, places in ((number, reads.student), (teacher, reads.teacher)):
                    if one is not None:
                        compared[one] |= dict.fromkeys(places)
                        resumable[one] = resumable[one] or interchanges
        return [
            run(network, inputs_of(network, batch), list(at), resumable=resumes)
            for network, at, resumes in zip(self.learning, compared, resumable, strict=True)
        ]

    def _step(
        self,
        batch: Mapping[str, Tensor],
        generator: torch.Generator,
        moment: Moment,
        runs: list[Run],
        edge: tuple[int | None, int],
        *,
        record: bool = True,
    ) -> Step:
        """Return the step for the objectives of an edge; for a teacher of None, for those without a teacher."""
        teacher, student = edge
        learner = self.objectives[student]
        teacher_run = None if teacher is None else runs[teacher].detach()
        entries = () if teacher is None else learner.entries[teacher]
        reads = learner.reads(teacher) if record else Reads()
        return Step(
            batch, learner.network, lambda: runs[student], teacher_run, entries, generator, reads=reads, moment=moment,
            label_place=self.label_place,
        )  # fmt: skip


def _copies(objectives: Sequence[Objective]) -> list[Objective]:
    """Return the objectives; copies of those that have parameters or prepare for the models and data."""
    return [copy.deepcopy(each) if _has_state(each) else each for each in objectives]


def _has_state(objective: Objective) -> bool:
    """Return whether an objective prepares for models and data, or has parameters or buffers."""
    prepares = any(type(each).prepare is not Objective.prepare for each in within(objective))
    return prepares or any(True for _ in (*objective.parameters(), *objective.buffers()))
