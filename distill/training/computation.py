"""All runs of one step in one `forward`, and the parts in which a step is computed."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distill.causal.feed import Feed
from distill.data.rows import Rows
from distill.interchange.mapping import Entry
from distill.interchange.swap import encoded
from distill.models.head import Heads
from distill.models.host_copies import host_columns, sliced
from distill.models.inputs import decoder_masked, inputs_of, students, teachers
from distill.models.loss_masks import LabelPlace, counts_of, label_place
from distill.models.outputs import logits_if_any
from distill.objectives import Moment, Objective, Reads, Step
from distill.objectives.objective import terms_of
from distill.objectives.step import zero_of
from distill.objectives.term_weights import Weight
from distill.teachers.served import Served
from distill.teachers.verbs import run_of
from distill.training.schedule import Schedule
from interventions import Location, Model, Run, run, trusting

NOW = Moment()


class Computation(nn.Module):
    """All runs of one step in one `forward`, so that DDP and FSDP see one forward and one backward.

    Args:
        teacher: a network, here or served; None where there is none, or a causal model.
        student: the network that answers.
        entries: the mapping.
        objectives: all of them compare the runs of one step.
        feed: with a causal model as teacher, the model and its samples.
        trained: the module to train instead of the student, e.g. the subspaces of the mapping.

    Attributes:
        label_place: where the label of the answer at a token stands, once `prepare` has looked at the data.
        of_prompts: whether the rows of the data are prompts alone, which a model completes in each step.
        sharded: whether the weights of each block are gathered when the gradient of what it returned arrives.
    """

    label_place: LabelPlace | None = None
    of_prompts = False
    sharded = False

    def __init__(
        self,
        teacher: Model | Served | None,
        student: nn.Module,
        entries: tuple[Entry, ...],
        objectives: Sequence[Objective],
        *,
        feed: Feed | None = None,
        trained: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.entries, self.feed = entries, feed
        self.trained = student if trained is None else trained
        self.objectives: Any = nn.ModuleList(objectives)
        # In a tuple, so that frozen models are not submodules, which would be saved and wrapped with the trained ones.
        self._frozen = (teacher, None if trained is None else student)
        self._heads = Heads()
        # Runs of traced models keep only requested activations; those of torch models keep every block output.
        is_traced = teacher is not None and not isinstance(teacher, nn.Module | Served)
        self._sources = _union(at.teacher for at in entries) if is_traced else ()

    def forward(
        self, batch: Mapping[str, Tensor], generator: torch.Generator, moment: Moment = NOW
    ) -> dict[str, Tensor]:
        """Return the terms of all objectives on a batch."""
        with self._heads.deferred(self._before_heads(batch)), trusting():
            step = self.step(batch, generator, moment)
            terms = terms_of(self.objectives, step)
            if step.ends is not None:  # to read inside a block whose output no loss is of would not gather its weights
                name, ends = next(iter(terms)), [logits_if_any(step.student), *step.ends]
                terms[name] = sum((zero_of(end) for end in ends if end is not None), start=terms[name])
            return terms

    def _before_heads(self, batch: Mapping[str, Tensor]) -> Sequence[tuple[nn.Module, Any]]:
        """Return the models whose runs may end before their heads, with their inputs; none if no objective needs it."""
        if self.sharded or self.feed is not None or not any(each.in_chunks for each in within(self.objectives)):
            return ()
        teacher, student = self._frozen[0], self.learning[0]
        models = [(student, self.inputs(batch))]
        if isinstance(teacher, nn.Module):
            models.append((teacher, inputs_of(teacher, teachers(batch))))
        return models

    def step(
        self,
        batch: Mapping[str, Tensor],
        generator: torch.Generator,
        moment: Moment = NOW,
        reads: Reads | None = None,
    ) -> Step:
        """Return the step for the objectives; the teacher has run, the student runs when an objective needs it.

        Args:
            batch: the columns of the data.
            generator: the source of randomness.
            moment: the point of the training.
            reads: the locations to record; None is all that the objectives compare.
        """
        if reads is None:
            compared = [objective.reads(self.entries) for objective in self.objectives]
            reads = Reads(_union(each.teacher for each in compared), _union(each.student for each in compared))
        resumable = any(objective.interchanges for objective in self.objectives)
        teacher, (student,) = self._frozen[0], self.learning
        inputs = self.inputs(batch)

        def base() -> Run:
            return run(student, inputs, reads.student, resumable=resumable)

        teacher_run, derivable = None, None
        if isinstance(teacher, nn.Module):
            derived = (
                each.base_runs((teacher, student), batch, reads, resumable=resumable) for each in self.objectives
            )
            if (found := next((runs for runs in derived if runs is not None), None)) is not None:
                teacher_run, base, derivable = found.teacher, found.student or base, found.derivable
        if teacher is not None and teacher_run is None:
            with torch.no_grad():
                places = _union([reads.teacher, (at.whole for at in self._sources if resumable)])
                columns = teachers(batch)
                if isinstance(teacher, Served):  # which keeps answers without those at padding
                    columns = decoder_masked(teacher, columns)
                teacher_run = run_of(teacher, inputs_of(teacher, columns), places, resumable=resumable)
        return Step(
            batch, student, base, teacher_run, self.entries, generator, reads, self.feed, moment,
            label_place=self.label_place, derivable=derivable, ends=[] if self.sharded else None,
        )  # fmt: skip

    def inputs(self, batch: Mapping[str, Tensor]) -> Any:
        """Return the inputs of the student."""
        network = self.learning[0]
        return inputs_of(network, students(batch)) if self.feed is None else encoded(self.feed.model, network, batch)

    def prepare(
        self, batch: Mapping[str, Tensor], generator: torch.Generator, rows: Rows | Feed, moment: Moment = NOW
    ) -> None:
        """Let the objectives make what depends on the models and the data."""
        data = rows if isinstance(rows, Rows) and not self.of_prompts else None
        with torch.no_grad():
            trial = self.step(batch, generator, moment, reads=Reads())
            if self.feed is None and "labels" in batch:
                table = None if data is None else data.table
                self.label_place = label_place(self.learning[0], logits_if_any(trial.student), batch, table)
            step = replace(trial, data=data, label_place=self.label_place)
            for objective in within(self.objectives):
                objective.prepare(step, len(rows))

    @property
    def still(self) -> tuple[Any, ...]:
        """The models that are run but not trained."""
        return tuple(model for model in self._frozen if model is not None)

    @property
    def learning(self) -> tuple[nn.Module, ...]:
        """The networks whose answers are trained; the first decides which positions have answers."""
        return (self.trained if self._frozen[1] is None else self._frozen[1],)

    @property
    def clipped(self) -> tuple[nn.Module, ...]:
        """Modules whose gradients are clipped separately; an empty tuple clips all together."""
        return ()

    def answers(self, batch: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Yield the logits on a batch of each network that learns."""
        with torch.no_grad():
            yield run(self.learning[0], self.inputs(batch), resumable=False).logits


def within(objectives: nn.Module) -> Iterator[Objective]:
    """Return all objectives, including those inside of others, each once."""
    return (each for each in objectives.modules() if isinstance(each, Objective))


def weights_of(objectives: Iterable[Objective]) -> dict[str, Weight]:
    """Return the default weights of the terms of the objectives."""
    return {name: weight for each in objectives for name, weight in each.weights.items()}


def alter_batch(objectives: nn.Module, batch: Mapping[str, Tensor], generator: torch.Generator) -> Mapping[str, Tensor]:
    """Return the batch after every objective has altered it, e.g. masked its tokens."""
    for objective in within(objectives):
        batch = objective.alter(batch, generator)
    return batch


def parts_of(
    batch: Mapping[str, Tensor],
    moment: Moment,
    objectives: nn.Module,
    student: nn.Module,
    accelerator: Any,
    *,
    parts: int,
    empty: bool = False,
    place: LabelPlace | None = None,
) -> Iterator[tuple[Mapping[str, Tensor], Moment]]:
    """Yield the parts of a batch, each with its shares of the means over the whole step of all processes.

    The gradients of the parts and of the processes are averaged afterwards, so the shares are multiplied by the number
    of parts and of processes.

    Args:
        batch: the rows of this process.
        moment: the point of the training, for the whole step.
        objectives: count the values that their means are over.
        student: decides which of its positions have answers.
        accelerator: knows the other processes.
        parts: the number of parts. With fewer rows there are fewer parts; with several processes, which must make
            equally many, there are parts that do not count instead.
        empty: True if the rows do not count, because none are left for this process.
        place: where the labels of tokens stand; None if no token has a label.
    """
    rows = len(next(iter(batch.values())))
    alone = accelerator.num_processes == 1
    split = torch.arange(rows).tensor_split(min(parts, rows) if alone else parts)  # all processes make as many parts
    if len(split) == 1 and alone:
        yield batch, moment
        return
    cuts = [slice(int(cut[0]), int(cut[-1]) + 1) if len(cut) else slice(0, 1) for cut in split]
    pieces = [sliced(batch, cut) for cut in cuts]
    counts = [count_values(objectives, piece, student, place) for piece in pieces]
    kinds = sorted({kind for each in counts for kind in each})
    table = torch.tensor([[each.get(kind, 0) for kind in kinds] for each in counts])
    table = table * torch.tensor([[bool(len(cut)) and not empty] for cut in split])
    own, device = table.sum(0), next(iter(batch.values())).device
    whole = (own if alone else accelerator.reduce(own.to(device), "sum").cpu()).clamp(min=1).double()
    shares = table * len(cuts) * accelerator.num_processes / whole
    for number, (cut, piece, share) in enumerate(zip(cuts, pieces, shares.tolist(), strict=True)):
        numbers = None if moment.rows is None else sliced({"rows": moment.rows}, cut)["rows"]
        by_kind = dict(zip(kinds, share, strict=True))
        yield piece, Moment(numbers, moment.epoch, moment.epochs, number, by_kind, moment.agreed)


def count_values(
    objectives: nn.Module, batch: Mapping[str, Tensor], student: nn.Module, place: LabelPlace | None = None
) -> dict[str, int]:
    """Return {kind of mean: number of values} of the means over a batch."""
    batch = host_columns(batch)
    counts = counts_of(student, batch, place or "none")
    for objective in within(objectives):
        counts |= objective.counts(batch)
    return counts


def groups_of(computation: Any, schedule: Schedule) -> list[dict[str, Any]]:
    """Return the parameters in groups of one learning rate; `scale` is the rate divided by that of the schedule.

    The learning rate of an objective holds for its parameters and those of the objectives inside it.
    """
    rates = {id(p): (schedule.lr, p) for p in computation.parameters()}
    for each in within(computation.objectives):
        if each.lr is not None:
            rates |= {id(p): (each.lr, p) for p in each.parameters()}
    by_rate: dict[float, list[nn.Parameter]] = {}
    for rate, parameter in rates.values():
        by_rate.setdefault(rate, []).append(parameter)
    return [{"params": found, "scale": rate / schedule.lr} for rate, found in by_rate.items()]


def _union(groups: Iterable[Iterable[Location]]) -> tuple[Location, ...]:
    """Return all locations of the groups, each once."""
    return tuple(dict.fromkeys(at for group in groups for at in group))
