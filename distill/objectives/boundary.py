"""Distillation at samples that support the teacher's decision boundary (BSS).

Examples x of class y that teacher and student classify correctly are moved over the teacher's boundary towards a drawn
class k, x' ← x' + η (z_y − z_k + ε) ∇(z_k − z_y) / ‖∇(z_k − z_y)‖, and the student learns the teacher's answers there,

    L = KL(p_t^τ(x') ‖ p_s^τ(x')),    weighted by max(2 (1 − 4e / (3E)), 0) after e of E epochs.

Heo et al. 2018 (arXiv:1805.05532), sections 3 and 4; the move is in `distill.losses.boundary`.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from distill.errors import DistillError, checked, refuse_negative, refuse_unless_positive
from distill.losses import kd, most_different
from distill.losses.boundary import STOPS, Bounds, Climb
from distill.losses.common import find_labelled
from distill.objectives.objective import About, Objective
from distill.objectives.points import Places, check_points, functions
from distill.objectives.step import Step, zero_of
from distill.objectives.term_weights import Ramp, Weight
from distill.precision import widen


@checked
class BSS(Objective):
    """Distillation at samples that support the teacher's decision boundary. Term `bss`.

    Examples that teacher and student classify correctly are moved over the teacher's boundary to a class drawn by its
    probabilities, until the label is no longer its answer, and the student learns the teacher's answers there, as in
    `KD` but not times τ². The floating input is moved (images, vectors), or for tokens the input of the teacher's first
    block, which then replaces that of the student's. Of more than `samples` such examples, those are moved on which the
    models differ most in the classes other than the label; if there is none the term is 0.

    The published schedule is the default: weight 2 that falls to 0 by `until`, after which nothing is moved, beside
    `weights={"kd": Ramp(4, 1)}` of KD(3.0, scale_t2=False) and Labels().

    Heo et al. 2018 (arXiv:1805.05532), sections 3 and 4; where their text leaves it open, as their code
    (bhheo/BSS_distillation, commit 6a318cb): `both`, `stop` and `scale_t2`.

    Args:
        temperature: τ of the divergence.
        lr: η, the length of a step: η (gap + ε). The objective has no parameters of its own.
        eps: ε, in units of the logits.
        steps: the largest number of steps of an example.
        samples: the largest number of examples that are moved in each part of a batch.
        clamp: lowest and highest value of the input, as numbers or tensors that broadcast over it.
        both: move only examples that the student classifies correctly too; False looks at the teacher alone.
        probabilities: climb on probabilities rather than logits.
        stop: `"label"`: a move ends once the label is no longer the teacher's answer, even if a third class is;
            `"target"`: once the teacher finds the drawn class more probable than the label.
        scale_t2: multiply by temperature².
        until: the share of the training during which examples are moved.
        at: the location whose activations are moved; None is the input as above.

    Raises:
        DistillError: embeddings of different width, or models without one answer of several classes an example.
    """

    about = About(
        terms=("bss",),
        formula="KL(p_t^τ(x') ‖ p_s^τ(x')), x' moved by η (z_y − z_k + ε) along the gradient of z_k − z_y while the "
        "teacher answers y; weight 2 to 0",
        source="Heo et al. 2018, arXiv:1805.05532",
        runs="one of the student; of the teacher, on the examples that have not crossed yet, one with its backward "
        "pass for each step of the move and one more",
    )
    needs = ("labels",)

    compares_runs = False
    runs_by_rows = True

    def __init__(
        self,
        temperature: float = 3.0,
        *,
        lr: float = 0.3,
        eps: float = 1e-4,
        steps: int = 10,
        samples: int = 64,
        clamp: Bounds | None = None,
        both: bool = True,
        probabilities: bool = False,
        stop: str = "label",
        scale_t2: bool = False,
        until: float = 0.75,
        at: Places | None = None,
    ) -> None:
        super().__init__()
        if steps < 1 or samples < 1:
            raise DistillError(
                f"BSS(steps={steps}, samples={samples}) moves nothing; the paper's are steps=10, samples=64."
            )
        refuse_unless_positive("BSS", temperature=temperature, lr=lr)
        refuse_negative("BSS", eps=eps)
        if stop not in STOPS:
            raise DistillError(f"BSS(stop={stop!r}) does not exist; use stop='label' or stop='target'.")
        self.schedule = Ramp(2.0, 0.0, until)
        self.temperature, self.scale_t2 = temperature, scale_t2
        self.samples, self.both, self.at = samples, both, at
        self.climb = Climb(lr, eps, steps, clamp, probabilities, stop)

    @property
    def weights(self) -> Mapping[str, Weight]:
        """From 2 to 0, as published."""
        return {"bss": self.schedule}

    def prepare(self, step: Step, rows: int) -> None:
        """Check that both models can be given the same points."""
        check_points(*functions(step, self.at, "BSS()"), "BSS()")

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the term `bss`."""
        logits = step.student.logits
        done = step.moment.progress >= self.schedule.until
        chosen = torch.arange(0) if done else self._choose(step)
        if not len(chosen):
            return {"bss": zero_of(logits)}
        teacher, student = functions(step, self.at, "BSS()")
        points, labels = teacher.points, step.batch["labels"][chosen]
        self.climb.refuse(points)
        start = widen(step.taught.logits[chosen]), torch.arange(len(chosen), device=chosen.device)
        moved, target, _ = self.climb(teacher.take(chosen), points[chosen], labels, start, step.drawing("bss"))
        # With the rest of the batch, so that batch normalisation sees as many examples as usual.
        answers = student(points.index_copy(0, chosen, moved))[chosen]
        return {"bss": step.mean(kd(answers, target, self.temperature, scale_t2=self.scale_t2))}

    def extra_repr(self) -> str:
        """Return the settings for printing."""
        settings = f"samples={self.samples}, both={self.both}, until={self.schedule.until}, at={self.at}"
        divergence = f"temperature={self.temperature}, scale_t2={self.scale_t2}"
        return f"{divergence}, {settings}, {vars(self.climb)}"

    def _choose(self, step: Step) -> Int[Tensor, " chosen"]:
        """Return the rows that are moved."""
        labels = step.column("labels", "BSS()")
        teacher, student = step.taught.logits, step.student.logits.detach()
        if teacher.ndim != 2 or teacher.shape[1] < 2:
            raise DistillError(
                f"BSS() moves examples over a boundary of classes, and the answers are {tuple(teacher.shape)}; use it "
                "for a classifier, whose answers are [batch, two classes or more]."
            )
        correct = find_labelled("BSS", teacher, labels) & (teacher.argmax(1) == labels)
        rows = (correct & (student.argmax(1) == labels) if self.both else correct).nonzero()[:, 0]
        if len(rows) <= self.samples:
            return rows
        student_probs, teacher_probs = (widen(logits[rows]).softmax(1) for logits in (student, teacher))
        return rows[most_different(student_probs, teacher_probs, labels[rows], self.samples)]
