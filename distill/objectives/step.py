"""What an objective is: a small module that compares runs and returns named, unweighted terms."""

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
from distill.data.rows import Rows
from distill.errors import DistillError, checked, refuse_negative, refuse_unless_positive
from distill.interchange.mapping import Pair
from distill.models.inputs import answer_mask, reads_apart, teachers
from distill.models.loss_masks import (
    ALL,
    IGNORED,
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
from interventions import Location, Run, architecture, shown


@checked
@dataclass(frozen=True)
class Reads:
    """Locations whose activations an objective compares."""

    teacher: tuple[Location, ...] = ()
    student: tuple[Location, ...] = ()


@checked
@dataclass(frozen=True, eq=False)
class Moment:
    """When in the training a step is, and which part of it these rows are.

    Attributes:
        rows: the numbers of the rows in the data, `[batch]`; None where the data has no numbers.
        epoch, epochs: passes over the data that are done, and how many there will be.
        part: the number of this part of the step.
        shares: of each kind of mean ("examples", "tokens" and the others of `distill.models.loss_masks`, or as an
            objective counts), what a mean over these rows is times to add up to the mean over the whole step; 1 where a
            step is computed in one part.
    """

    rows: Int[Tensor, " batch"] | None = None
    epoch: float = 0.0
    epochs: float = 1.0
    part: int = 0
    shares: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        refuse_unless_positive("Moment", epochs=self.epochs)
        refuse_negative("Moment", epoch=self.epoch, part=self.part)

    @property
    def progress(self) -> float:
        """The share of the training that is done."""
        return min(self.epoch / self.epochs, 1.0)


@checked
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
        label_place: where the label of the answer at a token stands; None decides it by the batch.
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
    label_place: LabelPlace | None = None

    @cached_property
    def student(self) -> Run:
        """The run of the student on the batch, attached to the graph."""
        found: Any = self.base()
        if not isinstance(found, Run):
            raise DistillError(
                f"Step(base=…) made {shown(found)}, and the run of the student is needed; give a function that makes "
                "it: base=lambda: interventions.run(student, inputs)."
            )
        return found

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

    def mask(self, states: Tensor, at: Location | None = None, tokens: str = "labelled") -> Tensor | None:
        """For states of tokens, `[batch, token, …]`: which positions count. None for one an example, or where all do.

        Padding never counts, nor does, where tokens have labels, one whose answer has the label −100: of a causal
        language model the answer at t has the label at t + 1.

        Args:
            states: the answers, or what the student has at a place.
            at: that place: in an encoder other tokens count than in the answers of a decoder.
            tokens: `"labelled"` as above, `"all"` leaves out padding alone.
        """
        return self._masked(self._masks, self.network, at, tokens, states)

    def mask_of_keys(self, states: Tensor, at: Location) -> Tensor | None:
        """For an attention pattern of the student, what its keys are: which of them, `[batch, key, …]`, are real."""
        keys = replace(at, site="key") if at.module is None else replace(at, io="key")
        return self._masked(self._masks, self.network, keys, "all", states)

    def mask_of_teacher(self, states: Tensor, at: Location, tokens: str = "labelled") -> Tensor | None:
        """As `mask`, of what the teacher has at a place; where it reads tokens of its own they have no labels."""
        model = self.taught.model
        masks = self._masks
        if reads_apart(self.batch):
            masks = loss_masks(model, teachers(self.batch), "none")
        elif not answers_by_decoder(model, self.batch):
            masks = loss_masks(model, self.batch, self._label_place)
        return self._masked(masks, model, at, tokens, states)

    def labels(self, asked: str) -> Tensor:
        """The label of each answer, `[batch]` or `[batch, token]`, −100 where none counts; `asked` needs them."""
        labels = self.column("labels", asked)
        found = answer_labels(self.batch, self._label_place, answer_mask(self.network, self.batch))
        return labels if found is None else found

    def labels_in_place(self, asked: str) -> Tensor:
        """The labels as they stand in the data, −100 where none counts; `asked` needs them."""
        labels, counts = self.column("labels", asked), labelled(self.network, self.batch, self._label_place)
        return labels if counts is None or self._label_place == "none" else labels.masked_fill(~counts, IGNORED)

    @property
    def labels_tokens(self) -> bool:
        """Whether every answer at a token has a label of its own."""
        return self._label_place != "none"

    def kind_of(self, mask: Tensor | None) -> str:
        """The kind of a mean over the examples that a mask of this step keeps any position of."""
        return "examples" if mask is None else examples_with(self._kind_of(mask))

    def mean(self, value: Tensor, over: Tensor | str | None = None) -> Tensor:
        """A mean over these rows as its part of the mean over the whole step.

        Args:
            value: the mean, a scalar.
            over: the mask of the tokens that it is over, None for a mean over examples, or a kind that is counted: one
                of `distill.models.loss_masks`, or of the objective's own.
        """
        kind = over if isinstance(over, str) else "examples" if over is None else self._kind_of(over)
        share = self.moment.shares.get(kind, 1.0)
        return value if share == 1.0 else value * share

    @cached_property
    def _label_place(self) -> LabelPlace:
        if self.label_place is not None:
            return self.label_place
        if "labels" not in self.batch or self.batch["labels"].ndim != 2:
            return "none"  # which asks for no run
        return label_place(self.network, logits_if_any(self.student), self.batch)

    @cached_property
    def _masks(self) -> Mapping[str, Tensor | None]:
        return loss_masks(self.network, self.batch, self._label_place)

    def _masked(
        self, masks: Mapping[str, Tensor | None], model: nn.Module, at: Location | None, tokens: str, states: Tensor
    ) -> Tensor | None:
        """The mask that holds at a place of a model, where the states there have positions, and as many."""
        side = None if at is None else architecture(model).place(at).side
        if states.ndim < 3 or (side is not None and side.beside):  # of an image or a sound no token of the text counts
            return None
        kind = TOKENS if tokens == "labelled" else ALL
        if side is not None and answers_by_decoder(self.network, self.batch) and not side.mask.startswith("decoder"):
            kind = SOURCE
        mask = masks[kind]
        return mask if mask is not None and mask.shape == states.shape[:2] else None

    def _kind_of(self, mask: Tensor) -> str:
        return next((kind for kind, each in self._masks.items() if each is mask), TOKENS)

    def drawing(self, name: str) -> torch.Generator:
        """A generator for draws of one's own, decided by the step's: to use it changes no other draws."""
        told = f"{name} {self.moment.part} {self.teacher is not None and self.teacher.is_counterfactual}"
        seed = crc32(told.encode()) ^ self.generator.initial_seed()
        return torch.Generator(self.generator.device).manual_seed(seed % 2**63)


def nothing(values: Tensor) -> Tensor:
    """0 with a graph to the values, which are not looked at."""
    return values[..., :0].sum()


def averaged(
    step: Step, loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor, mask: Tensor | None
) -> Tensor:
    """The loss of the positions that a mask keeps, as its part of the whole step; 0 where it keeps none."""
    if mask is not None and not bool(mask.any()):
        return nothing(student)
    return step.mean(loss(student, teacher), mask)
