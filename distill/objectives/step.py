"""A training step as objectives see it: the batch, the runs of both models, the mapping, and which positions count."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from zlib import crc32

import torch
from jaxtyping import Int
from torch import Tensor, nn

from distill.causal.feed import Feed
from distill.causal.model import CausalModel
from distill.data.missing import IGNORED
from distill.data.rows import Rows
from distill.errors import DistillError, checked, refuse_negative, refuse_unless_positive
from distill.interchange.mapping import Entry
from distill.losses.chunked import LazyLogits
from distill.models.host_copies import on_both
from distill.models.inputs import answer_mask, reads_apart, teachers
from distill.models.loss_masks import (
    ALL,
    SOURCE,
    TOKENS,
    LabelPlace,
    answer_labels,
    answers_by_decoder,
    examples_with,
    label_place,
    labelled,
    loss_masks,
)
from distill.models.outputs import logits_if_any
from interventions import Location, Run, architecture, on_host, shown


@checked
@dataclass(frozen=True)
class Reads:
    """The locations whose activations an objective compares, in the teacher and in the student."""

    teacher: tuple[Location, ...] = ()
    student: tuple[Location, ...] = ()


@checked
@dataclass(frozen=True, eq=False)
class Moment:
    """A point of the training, and which part of the step the rows of a batch are.

    Attributes:
        rows: the numbers of the rows in the data, `[batch]`; None where the data has no numbers.
        epoch, epochs: passes over the data that are done, and how many there will be.
        part: the number of this part of the step.
        shares: {kind of mean: factor}. A mean over these rows, times the factor of its kind, adds up over the parts to
            the mean over the whole step; the factor is 1 where a step has one part. Kinds are "examples", "tokens" and
            the others of `distill.models.loss_masks`, or those that an objective counts.
        agreed: the generator of what several processes have to draw alike; None where one trains alone.
    """

    rows: Int[Tensor, " batch"] | None = None
    epoch: float = 0.0
    epochs: float = 1.0
    part: int = 0
    shares: Mapping[str, float] = field(default_factory=dict)
    agreed: torch.Generator | None = None

    def __post_init__(self) -> None:
        refuse_unless_positive("Moment", epochs=self.epochs)
        refuse_negative("Moment", epoch=self.epoch, part=self.part)

    @property
    def progress(self) -> float:
        """The share of the training that is done."""
        return min(self.epoch / self.epochs, 1.0)


@dataclass(frozen=True, eq=False)
class Derivable:
    """The base runs of a step with a graph down to their points, so that their answers are derived without other runs.

    Attributes:
        by: the objective that derives them.
        points: the points of the teacher.
        logits: its logits, with the graph.
        column: the column of the student's inputs that the points are, with a graph in its run too; None where the
            student has to run at the points of the teacher.
    """

    by: nn.Module
    points: Tensor
    logits: Tensor
    column: str | int | None


@checked
@dataclass(frozen=True, eq=False)
class Step:
    """The batch, the models, their runs and the settings that the objectives of one training step work with.

    Attributes:
        batch: the columns of the data, on the device.
        network: the student.
        base: makes the student's run on the batch; `student` calls it once.
        teacher: the teacher's run on the batch, without a graph; None where there is no teacher, or a causal model.
        feed: with a causal model as teacher, the model and the source of its samples; the batch holds its inputs.
        mapping: the pairs of locations to interchange.
        reads: the locations that the objectives compare, to be recorded in counterfactual runs too.
        generator: the one source of randomness.
        moment: the point of the training.
        data: all rows that are trained on; only in `prepare`, and not with a causal model as teacher.
        label_place: where the label of the answer at a token stands; None decides it by the batch.
        derivable: the runs with their graph, where an objective derives their answers by the input.
        ends: with a student whose weights are sharded, the answers of its other runs, which are then run to their end:
            the weights of a block are gathered when the gradient of what it returned arrives. None for a whole student.
    """

    batch: Mapping[str, Tensor]
    network: nn.Module
    base: Callable[[], Run]
    teacher: Run | None
    mapping: tuple[Entry, ...]
    generator: torch.Generator
    reads: Reads = field(default_factory=Reads)
    feed: Feed | None = None
    moment: Moment = field(default_factory=Moment)
    data: Rows | None = None
    label_place: LabelPlace | None = None
    derivable: Derivable | None = None
    ends: list[Tensor | None] | None = None

    @cached_property
    def student(self) -> Run:
        """The run of the student on the batch, attached to the graph."""
        made: Any = self.base()
        if not isinstance(made, Run):
            raise DistillError(
                f"Step(base=…) made {shown(made)}, and the run of the student is needed; give a function that makes "
                "it: base=lambda: interventions.run(student, inputs)."
            )
        return made

    @property
    def causal(self) -> CausalModel:
        """The causal model that is the teacher; DistillError if the teacher is a network, or missing."""
        if self.feed is None:
            raise DistillError(
                "this objective learns from a causal model and the teacher is none; use DIITO() for a network, or pass "
                "a distill.CausalModel."
            )
        return self.feed.model

    @property
    def taught(self) -> Run:
        """The teacher's run; DistillError if there is none."""
        if self.feed is not None:
            raise DistillError(
                "this objective compares with the run of a network and the teacher is a causal model; use "
                "objective=IIT()."
            )
        if self.teacher is None:
            raise DistillError("this objective compares with a teacher and there is none; use objective=[Labels()].")
        return self.teacher

    def column(self, name: str, caller: str) -> Tensor:
        """Return a column of the data, or raise DistillError, which says that `caller` needs it."""
        if name not in self.batch:
            raise DistillError(
                f"{caller} needs a column {name!r} and the data has {', '.join(self.batch)}; add it, or leave {caller} "
                "out to train on the teacher's answers."
            )
        return self.batch[name]

    def mask(self, states: Tensor, at: Location | None = None, tokens: str = "labelled") -> Tensor | None:
        """Return which positions count of states of tokens, `[batch, token, …]`; None for one an example, or if all do.

        Padding never counts. Where tokens have labels, neither does a token whose answer has the label −100; the answer
        of a causal language model at token t has the label at t + 1.

        Args:
            states: the answers, or activations of the student.
            at: the location of the activations: in an encoder other tokens count than in the answers of a decoder.
            tokens: `"labelled"` as above; `"all"` leaves out padding only.
        """
        return self._masked(self._masks, self.network, at, tokens, states)

    def mask_of_keys(self, states: Tensor, at: Location) -> Tensor | None:
        """Return which keys of an attention pattern of the student, `[batch, key, …]`, are real tokens."""
        keys = replace(at, site="key") if at.module is None else replace(at, io="key")
        return self._masked(self._masks, self.network, keys, "all", states)

    def mask_of_teacher(self, states: Tensor, at: Location, tokens: str = "labelled") -> Tensor | None:
        """Return what `mask` does, for activations of the teacher; tokens that it alone reads have no labels."""
        model = self.taught.model
        masks = self._masks
        if reads_apart(self.batch):
            masks = loss_masks(model, teachers(self.batch), "none")
        elif not answers_by_decoder(model, self.batch):
            masks = loss_masks(model, self.batch, self._label_place)
        return self._masked(masks, model, at, tokens, states)

    def labels(self, caller: str) -> Tensor:
        """Return the label of each answer, `[batch]` or `[batch, token]`, −100 where none counts.

        Raises:
            DistillError: the data has no labels, which `caller` needs.
        """
        labels = self.column("labels", caller)
        found = on_both(self._answer_labels, self.batch)
        return labels if found is None else found

    def labels_in_place(self, caller: str) -> Tensor:
        """Return the labels at their positions in the data, −100 where none counts.

        Raises:
            DistillError: the data has no labels, which `caller` needs.
        """
        labels = self.column("labels", caller)
        return labels if self._label_place == "none" else on_both(self._labels_in_place, self.batch)

    @property
    def labels_tokens(self) -> bool:
        """True if every answer at a token has a label of its own."""
        return self._label_place != "none"

    def kind_of(self, mask: Tensor | None) -> str:
        """Return the kind of a mean over the examples of which a mask of this step keeps at least one position."""
        return "examples" if mask is None else examples_with(self._kind_of(mask))

    def mean(self, value: Tensor, over: Tensor | str | None = None) -> Tensor:
        """Return a mean over these rows as its part of the mean over the whole step.

        Args:
            value: the mean, a scalar.
            over: the mask of the tokens that it was taken over, None for a mean over examples, or a kind of mean: one
                of `distill.models.loss_masks`, or one that the objective counts.
        """
        kind = over if isinstance(over, str) else "examples" if over is None else self._kind_of(over)
        share = self.moment.shares.get(kind, 1.0)
        return value if share == 1.0 else value * share

    @cached_property
    def _label_place(self) -> LabelPlace:
        if self.label_place is not None:
            return self.label_place
        if "labels" not in self.batch or self.batch["labels"].ndim != 2:
            return "none"  # without a run of the student
        return label_place(self.network, logits_if_any(self.student), self.batch)

    def _answer_labels(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        return answer_labels(batch, self._label_place, answer_mask(self.network, batch))

    def _labels_in_place(self, batch: Mapping[str, Tensor]) -> Tensor:
        counts = labelled(self.network, batch, self._label_place)
        return batch["labels"] if counts is None else batch["labels"].masked_fill(~counts, IGNORED)

    @cached_property
    def _masks(self) -> Mapping[str, Tensor | None]:
        return loss_masks(self.network, self.batch, self._label_place)

    def _masked(
        self, masks: Mapping[str, Tensor | None], model: nn.Module, at: Location | None, tokens: str, states: Tensor
    ) -> Tensor | None:
        """Return the mask for states at a location of a model, None if they have no positions, or other ones."""
        side = None if at is None else architecture(model).place(at).side
        if states.ndim < 3 or (side is not None and side.beside):  # of an image or a sound no token of the text counts
            return None
        kind = TOKENS if tokens == "labelled" else ALL
        if side is not None and answers_by_decoder(self.network, self.batch) and not side.mask.startswith("decoder"):
            kind = SOURCE
        mask = masks[kind]
        return mask if mask is not None and mask.shape == states.shape[:2] else None

    def _kind_of(self, mask: Tensor) -> str:
        """Return the kind of a mean over the positions that a mask keeps."""
        return next((kind for kind, each in self._masks.items() if each is mask), TOKENS)

    def on_batch(
        self, batch: Mapping[str, Tensor], teacher: Run | None, base: Callable[[], Run], reads: Reads
    ) -> "Step":
        """Return the step of the same rows with other inputs, in which labels stand where they stand in this one.

        Args:
            batch: all columns.
            teacher: the teacher's run on them.
            base: makes the student's run on them.
            reads: the locations that are recorded in the two runs.
        """
        return replace(
            self, batch=batch, teacher=teacher, base=base, reads=reads, label_place=self._label_place, derivable=None
        )

    def agreed(self, otherwise: torch.Generator) -> torch.Generator:
        """Return the generator of what decides which blocks run, e.g. the entry that is interchanged.

        Several processes that train together draw from it alike: a sharded model waits in each block for all of them.

        Args:
            otherwise: the generator where one process trains alone.
        """
        return otherwise if self.moment.agreed is None else self.moment.agreed

    def drawing(self, name: str) -> torch.Generator:
        """Return a new generator, decided by the step's and a name: drawing from it changes no other draws."""
        description = f"{name} {self.moment.part} {self.teacher is not None and self.teacher.is_counterfactual}"
        seed = crc32(description.encode()) ^ self.generator.initial_seed()
        return torch.Generator(self.generator.device).manual_seed(seed % 2**63)


def zero_of(values: Tensor | LazyLogits) -> Tensor:
    """Return 0 with a graph to the values, whatever they are."""
    return values[..., :0].sum() if isinstance(values, Tensor) else values.zero()


def average_loss(
    step: Step,
    loss: Callable[..., Tensor],
    student: Tensor | LazyLogits,
    teacher: Tensor | LazyLogits,
    mask: Tensor | None,
) -> Tensor:
    """Return the loss at the positions that a mask keeps, as its part of the whole step; 0 where it keeps none."""
    if mask is not None and not bool(on_host(mask).any()):
        return zero_of(student)
    return step.mean(loss(student, teacher), mask)
