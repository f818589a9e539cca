"""Contrastive objectives: a student's features of an example should single out the teacher's features of that example.

Linear maps put the features of student and teacher on one unit sphere, as u and v. CRD compares them with a memory u',
v' of the features of all N rows, with scores P(a, b) = exp(⟨a, b⟩ / τ) / Z, by noise-contrastive estimation against m
negatives of other classes; ICD compares them within the batch,

    CRD = NCE(P(u, v')) + NCE(P(v, u')), times 0.8
    ICD = CE(s u vᵀ, diagonal) + 0.5 KL(softmax over u for each v ‖ softmax over v for each u), s = min(e^learned, 10).

CRD: Tian, Krishnan, Isola 2019 (arXiv:1910.10699), section 3.2. ICD: Giakoumoglou, Stathaki 2024 (arXiv:2407.11802),
section 3. The losses are in `distill.losses.contrastive`.
"""

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from distill.errors import DistillError, checked, refuse_unless_positive
from distill.interchange.mapping import Entry
from distill.losses import Divergence, contrast, forward_kl, invariance, nce
from distill.models.head import penultimate
from distill.models.loss_masks import checked_tokens
from distill.objectives.memories import Classes, Memory
from distill.objectives.objective import About, Objective, linear
from distill.objectives.points import Places, of_both
from distill.objectives.step import Reads, Step, zero_of
from distill.objectives.term_weights import describe_function
from distill.precision import widen
from distill.processes import gather, processes
from distill.teachers.verbs import refuse_elsewhere
from interventions import Location, Run, on_host

COLDEST = 0.02
"""The lowest temperature at which exp(1 / τ) is finite in single precision."""


@checked
class CRD(Objective):
    """Contrastive representation distillation, with a memory of the features of all rows. Term `crd`.

    Features are mapped to the unit sphere in `width` dims. The student's features of a row should single out the
    teacher's of that row among those of `negatives` other rows, which a memory holds, and the teacher's features the
    student's. The rows of the data must have numbers. Negatives are drawn with replacement, and where the data has
    labels of classes, from rows of other classes.

    Tian, Krishnan, Isola 2019 (arXiv:1910.10699), section 3.2; memory and constants as in the published code.

    Args:
        width: dims of the features that are compared.
        negatives: the number of other rows that each row is compared with.
        temperature: divides the cosines.
        momentum: the share of the old features when the memory is updated.
        at: the location of the features; None is the input of each model's last linear layer. Features of tokens are
            averaged over the tokens that count; an example without any is left out.
        lr: the learning rate of the two linear maps; None is that of the schedule.
        tokens: `"labelled"` or `"all"`, as for `KD`.

    Raises:
        DistillError: no numbers of the rows, or no row of another class.
    """

    about = About(
        terms=("crd",),
        formula="NCE(exp(u·v'/τ) / Z) + NCE(exp(v·u'/τ) / Z), u, v unit features, u', v' in memory; weight .8",
        source="Tian, Krishnan, Isola 2019, arXiv:1910.10699",
    )

    def __init__(
        self,
        width: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        *,
        at: Places | None = None,
        lr: float | None = None,
        tokens: str = "labelled",
    ) -> None:
        super().__init__()
        if negatives < 1 or not COLDEST <= temperature < inf or not 0 <= momentum < 1:
            raise DistillError(
                f"CRD(negatives={negatives}, temperature={temperature}, momentum={momentum}): one negative at least, a "
                f"temperature of {COLDEST} or more (exp(1/τ) overflows below) and a momentum from 0 to below 1 are "
                "needed; CRD() has the paper's."
            )
        refuse_unless_positive("CRD", lr=lr)
        self.embedded, self.lr = Embedded(width, at, checked_tokens(tokens, "CRD")), lr
        self.negatives, self.temperature, self.momentum = negatives, temperature, momentum
        self.classes: Classes | None = None
        self.student_memory: Any = None
        self.teacher_memory: Any = None

    @property
    def weights(self) -> Mapping[str, float]:
        """The weight of the paper: 0.8."""
        return {"crd": 0.8}

    def reads(self, mapping: Sequence[Entry]) -> Reads:
        """Return the locations of the features of both models."""
        return self.embedded.reads

    def prepare(self, step: Step, rows: int) -> None:
        """Make the linear maps and an empty memory."""
        if step.data is None or step.data.stream is not None:
            raise DistillError(
                "CRD() remembers the features of every row of the data, and these rows have no numbers; give rows of "
                "data, or use ICD(), which compares the rows of a batch."
            )
        self.embedded.prepare(step)
        classes = Classes.of(step.data)
        if int(classes.sizes.max()) == rows:
            raise DistillError(
                f"CRD() compares each row with those of other classes, and all {rows} are of one; give data of several "
                "classes, or leave the labels out to compare it with any other."
            )
        device = step.generator.device
        self.classes = Classes(*(each.to(device) for each in classes))
        memories = (Memory(rows, self.embedded.width).to(device).train(self.training) for _ in range(2))
        self.student_memory, self.teacher_memory = memories

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the term `crd`; in training mode the rows are remembered."""
        rows, memories = step.moment.rows, (self.teacher_memory, self.student_memory)
        if rows is None or self.classes is None:
            raise DistillError(
                "CRD() compares with its memory of numbered rows, and it has none, or these have no numbers; train by "
                "distill.fit or distill.steps."
            )
        features, rows = self.embedded(step), self.embedded.select(step, rows)
        if not len(rows):
            self._remember(step, rows, *features)
            return {"crd": zero_of(features[0]) + zero_of(features[1])}
        chosen = torch.cat([rows[:, None], self.classes.others(rows, self.negatives, step.drawing("crd"))], 1)
        scores = (m.scores(each, chosen, self.temperature) for each, m in zip(features, memories, strict=True))
        values = [nce(each[:, :1], each[:, 1:], len(self.classes.order)) for each in scores]
        self._remember(step, rows, *features)
        return {"crd": step.mean(torch.stack(values).sum(), self.embedded.kind(step))}

    def extra_repr(self) -> str:
        """Return the settings for printing."""
        settings = f"negatives={self.negatives}, temperature={self.temperature}, momentum={self.momentum}"
        return f"{self.embedded.extra_repr()}, {settings}, lr={self.lr}"

    def _remember(self, step: Step, rows: Tensor, student: Tensor, teacher: Tensor) -> None:
        """Move the features of these rows, of all processes, in memory towards the new ones; in training mode alone."""
        if not self.training:
            return
        if processes() > 1:
            if step.moment.shares.get("examples") == 0:  # a row that only keeps this process busy
                rows, student, teacher = rows[:0], student[:0], teacher[:0]
            rows, student, teacher = (gather(each) for each in (rows, student, teacher))
        self.student_memory.remember(rows, student, self.momentum)
        self.teacher_memory.remember(rows, teacher, self.momentum)


@checked
class ICD(Objective):
    """Invariant causal distillation: contrast in the batch. Terms `icd_contrast`, `icd_invariance`.

    The similarities are cosines of the features in `width` dims, times a learned scale, at most 10. The student's
    features should single out the teacher's features of the same row within the batch, and the probabilities should be
    the same from student to teacher as from teacher to student. Negatives are the other rows of the batch, so a batch
    that is computed in parts, or by several processes, has fewer of them, and one of a single row has none: both terms
    are 0.

    Giakoumoglou, Stathaki 2024 (arXiv:2407.11802), section 3.

    Args:
        width: dims of the features that are compared.
        at: the location of the features; None is the input of each model's last linear layer. Features of tokens are
            averaged over the tokens that count; an example without any is left out.
        lr: the learning rate of the linear maps and the scale; None is that of the schedule.
        divergence: that of the invariance: `forward_kl`, KL(P₂ ‖ P₁), as in the published code, where P₁ is the softmax
            over the teacher's features for each student's and P₂ that over the student's for each teacher's;
            `reverse_kl`, KL(P₁ ‖ P₂); or another of `distill.losses`.
        tokens: `"labelled"` or `"all"`, as for `KD`.
    """

    about = About(
        terms=("icd_contrast", "icd_invariance"),
        formula="CE(s u vᵀ, diagonal), KL(softmax over u of each v ‖ over v of each u), s = min(exp(learned), 10); u "
        "of the student, v of the teacher; weights 1, .5",
        source="Giakoumoglou, Stathaki 2024, arXiv:2407.11802",
    )

    def __init__(
        self,
        width: int = 128,
        *,
        at: Places | None = None,
        lr: float | None = None,
        divergence: Divergence = forward_kl,
        tokens: str = "labelled",
    ) -> None:
        super().__init__()
        refuse_unless_positive("ICD", lr=lr)
        self.embedded, self.lr = Embedded(width, at, checked_tokens(tokens, "ICD")), lr
        self.divergence = divergence
        self.log_scale = nn.Parameter(torch.tensor(1.0))

    @property
    def weights(self) -> Mapping[str, float]:
        """The weight of the invariance, 0.5; the contrast has weight 1."""
        return {"icd_invariance": 0.5}

    def reads(self, mapping: Sequence[Entry]) -> Reads:
        """Return the locations of the features of both models."""
        return self.embedded.reads

    def prepare(self, step: Step, rows: int) -> None:
        """Make the linear maps, and start the scale anew."""
        self.embedded.prepare(step)
        self.log_scale = nn.Parameter(torch.tensor(1.0, device=step.generator.device))

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the terms `icd_contrast` and `icd_invariance`."""
        student, teacher = self.embedded(step)
        scale, kind = self.log_scale.exp().clamp(max=10.0), self.embedded.kind(step)
        if not len(student):
            zero = zero_of(student) + zero_of(scale[None])
            return {"icd_contrast": zero, "icd_invariance": zero}
        return {
            "icd_contrast": step.mean(contrast(student, teacher, scale), kind),
            "icd_invariance": step.mean(invariance(student, teacher, scale, divergence=self.divergence), kind),
        }

    def extra_repr(self) -> str:
        """Return the settings for printing."""
        shown = f", divergence={describe_function(self.divergence)}" if self.divergence is not forward_kl else ""
        return f"{self.embedded.extra_repr()}, lr={self.lr}{shown}"


class Embedded(nn.Module):
    """The features of student and teacher, mapped linearly to one unit sphere: twice `[rows, width]`.

    The rows are those of the batch with at least one token that counts; all rows where features are of examples.
    """

    def __init__(self, width: int, at: Places | None, tokens: str = "labelled") -> None:
        super().__init__()
        if width < 1:
            raise DistillError(f"features of width={width} cannot be compared; the papers' is width=128.")
        self.width, self.at, self.tokens = width, at, tokens
        self._places: tuple[Location, Location] | None = None
        self.student: Any = None
        self.teacher: Any = None

    @property
    def reads(self) -> Reads:
        """The locations of the features, once they are known."""
        return Reads() if self._places is None else Reads((self._places[0],), (self._places[1],))

    def prepare(self, step: Step) -> None:
        """Find the features and make the linear maps."""
        if self.at is None:
            refuse_elsewhere(step.taught, "to find the features", "say where they are: at=Location(-1)")
            above, below = (penultimate(run.model, run.inputs) for run in (step.taught, step.student))
            self._places = (above, below)
        else:
            self._places = of_both(self.at)
        teacher, student = self._features(step)
        self.student = linear(student.shape[1], self.width, student.float())
        self.teacher = linear(teacher.shape[1], self.width, teacher.float())

    def forward(self, step: Step) -> tuple[Float[Tensor, "rows width"], Float[Tensor, "rows width"]]:
        """Return the features of the student and those of the teacher."""
        if self.student is None:
            raise DistillError(
                "the maps of the features were not made yet; call objective.prepare(step, rows), as distill.fit does."
            )
        teacher, student = (self.select(step, features) for features in self._features(step))
        return self._project(self.student, student), self._project(self.teacher, teacher)

    def select(self, step: Step, rows: Tensor) -> Tensor:
        """Return the rows, one an example, of the examples with at least one token that counts."""
        masks = [on_host(mask).bool().any(1) for mask in self._masks(step) if mask is not None]
        kept = torch.stack(masks).all(0) if masks else torch.ones(1, dtype=torch.bool)
        return rows if bool(kept.all()) else rows[kept.nonzero()[:, 0].to(rows.device, non_blocking=True)]

    def kind(self, step: Step) -> str:
        """Return the kind of a mean over these examples."""
        return step.kind_of(self._masks(step)[1])

    def extra_repr(self) -> str:
        """Return the settings for printing."""
        shown = ", tokens='all'" if self.tokens == "all" else ""
        return f"width={self.width}, at={self.at}{shown}"

    def _features(self, step: Step) -> tuple[Tensor, Tensor]:
        """Return the features of the teacher and those of the student, one vector an example."""
        above, below = self._known
        teacher_mask, student_mask = self._masks(step)
        return pool(step.taught, above, teacher_mask), pool(step.student, below, student_mask)

    def _masks(self, step: Step) -> tuple[Tensor | None, Tensor | None]:
        """Return which tokens count at the features of the teacher and at those of the student."""
        above, below = self._known
        teacher, student = step.taught.vectors(above), step.student.vectors(below)
        return step.mask_of_teacher(teacher, above, self.tokens), step.mask(student, below, self.tokens)

    @property
    def _known(self) -> tuple[Location, Location]:
        """The locations of the features of teacher and student; DistillError where they are not known yet."""
        if self._places is None:
            raise DistillError("the places of the features are not known yet; call prepare first, as distill.fit does.")
        return self._places

    @staticmethod
    def _project(projection: nn.Linear, features: Tensor) -> Tensor:
        """Return features mapped linearly to the unit sphere."""
        with torch.autocast(features.device.type, enabled=False):
            return normalize(projection(features.to(projection.weight.dtype)), dim=1)


def pool(run: Run, at: Location, mask: Tensor | None) -> Float[Tensor, "batch width"]:
    """Return one vector an example of the activations at a location, averaged over the positions that a mask keeps."""
    vectors = widen(run.vectors(at))
    if vectors.ndim == 4:
        vectors = rearrange(vectors, "batch position head dims -> batch position (head dims)")
    if vectors.ndim == 2:
        return vectors
    if mask is None:
        return vectors.mean(1)
    real = mask.bool()[..., None]
    return vectors.masked_fill(~real, 0).sum(1) / real.sum(1).clamp(min=1)
