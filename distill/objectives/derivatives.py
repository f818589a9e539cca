"""Sobolev training: the student's answers, and their derivatives by the input, should be those of the teacher.

With the logits z of student and teacher at an input x and random unit vectors v (over answers) and w (over inputs),

    L = ‖z_s − z_t‖² + E_v ‖∂⟨z_s, v⟩/∂x − ∂⟨z_t, v⟩/∂x‖²,

and for order 2 E_vw of the squared difference of ∂⟨∂⟨z, v⟩/∂x, w⟩/∂x; the losses are in `distill.losses.derivatives`.

Czarnecki et al. 2017 (arXiv:1706.04859), sections 2 and 3.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill.errors import DistillError, checked
from distill.losses.derivatives import Answers, distances
from distill.models.inputs import answer_mask, students
from distill.models.loss_masks import checked_tokens
from distill.objectives.objective import About, BaseRuns, Objective
from distill.objectives.points import Function, Places, check_points, functions, functions_of, is_recurrent
from distill.objectives.step import Derivable, Reads, Step
from interventions import Location, Run


@checked
class Sobolev(Objective):
    """Sobolev training: logits and their derivatives by the input. Terms `sobolev_value`, `sobolev_1`, `sobolev_2`.

    Both models are functions of one input: the floating column of the data (images, vectors), or for tokens the input
    of the teacher's first block, which replaces that of the student's. The student's embedding is then not trained by
    these terms: add another, as `KD()`. Values and derivatives come from one run of the student, so that dropout is
    the same for them, and it is in single precision under autocast. For models that answer at every token, the answer
    at one token of each example is compared, drawn in every step from the tokens that count; an example without any is
    left out.

    Czarnecki et al. 2017 (arXiv:1706.04859), sections 2 and 3.

    Args:
        order: of the highest derivative, 1 or 2.
        projections: the number of random directions v of the answers; None compares all entries.
        at: the location whose activations are the input; None is the input as above.
        tokens: `"labelled"` or `"all"`, as for `KD`.

    Raises:
        DistillError: embeddings of different width, or another order than 1 or 2.
    """

    about = About(
        terms=("sobolev_value", "sobolev_1", "sobolev_2"),
        formula="‖z_s − z_t‖², E_v ‖∂⟨z_s, v⟩/∂x − ∂⟨z_t, v⟩/∂x‖², and E_vw of the second derivative (order=2)",
        source="Czarnecki et al. 2017, arXiv:1706.04859",
        runs="one of each model, and for each direction a backward pass of each by the input (two for order 2), "
        "through which the student's step goes back too",
    )

    compares_runs = False

    def __init__(
        self, order: int = 1, projections: int | None = 1, *, at: Places | None = None, tokens: str = "labelled"
    ) -> None:
        super().__init__()
        if order not in (1, 2) or (projections is not None and projections < 1):
            raise DistillError(
                f"Sobolev(order={order}, projections={projections}): derivatives are of order 1 or 2, and directions "
                "one at least; Sobolev(projections=None) compares all entries."
            )
        self.order, self.projections, self.at = order, projections, at
        self.tokens = checked_tokens(tokens, "Sobolev")

    def prepare(self, step: Step, rows: int) -> None:
        """Check that both models can be given the same points."""
        check_points(*functions(step, self.at, "Sobolev()"), "Sobolev()")

    def base_runs(
        self, models: tuple[nn.Module, nn.Module], batch: Mapping[str, Tensor], reads: Reads, *, resumable: bool
    ) -> BaseRuns | None:
        """Return base runs with a graph down to the points, so that these terms need no other runs.

        The teacher's is one at its own points. The student's is, where both models read one floating column. None where
        the base runs are of half precision, where cuDNN has no derivative, or no graph is wanted.
        """
        half = torch.is_autocast_enabled(next(iter(batch.values())).device.type)
        if half or not torch.is_grad_enabled() or any(map(is_recurrent, models)):
            return None
        teacher, student = functions_of(*models, batch, self.at, "Sobolev()")
        if isinstance(teacher.at, Location) and resumable:
            return None
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH) if self.order > 1 else nullcontext():
            attached, points = teacher.derivable_run(reads.teacher, resumable=resumable)
        taught = attached.detach()
        for at in reads.teacher:
            taught.vectors(at)  # so that it counts as recorded

        def learned() -> Run:
            with sdpa_kernel(SDPBackend.MATH):  # the only one with a second derivative
                return student.derivable_run(reads.student, resumable=resumable)[0]

        column: Any = student.at if teacher.reads_what(student) else None
        return BaseRuns(taught, None if column is None else learned, Derivable(self, points, attached.logits, column))

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the terms up to the order."""
        # In half precision, differences of derivatives are mostly rounding.
        with torch.autocast(step.generator.device.type, enabled=False):
            teacher, student = functions(step, self.at, "Sobolev()")
            if step.taught.logits.ndim == 3:
                token = _draw_tokens(step, self.tokens)
                teacher, student = replace(teacher, token=token), replace(student, token=token)
            taught, learned = self._answers(step, teacher, student)
            points = taught.points
            real = answer_mask(step.network, students(step.batch))
            if points.ndim != 3 or real is None or real.shape != points.shape[:2]:
                real = None
            mask = None if real is None else real[..., None].expand(points.shape)
            tokens = step.mask(step.taught.logits, tokens=self.tokens)
            kept = None if tokens is None else tokens.bool().any(1)
            draws = step.drawing("sobolev")
            terms = distances(learned, taught, self.order, self.projections, draws, mask=mask, kept=kept)
        return {name: step.mean(term, step.kind_of(tokens)) for name, term in terms.items()}

    def _answers(self, step: Step, teacher: Function, student: Function) -> tuple[Answers, Answers]:
        """Return the answers of teacher and student, those of the base runs where these have a graph to the points."""
        kept = None if step.derivable is None or step.derivable.by is not self else step.derivable
        if kept is None:
            taught = Answers.of(teacher, teacher.points, "teacher")
        else:
            taught = Answers.between(kept.points, teacher.answers(kept.logits), "teacher")
        if kept is None or kept.column is None:
            return taught, Answers.of(student, taught.points, "student")
        inputs: Any = step.student.inputs
        return taught, Answers.between(inputs[kept.column], student.answers(step.student.logits), "student")

    def extra_repr(self) -> str:
        """Return the settings for printing."""
        shown = ", tokens='all'" if self.tokens == "all" else ""
        return f"order={self.order}, projections={self.projections}, at={self.at}{shown}"


def _draw_tokens(step: Step, tokens: str = "labelled") -> Int[Tensor, " batch"]:
    """Draw the position of one token of each example, uniformly from those that count."""
    logits = step.taught.logits
    mask = step.mask(logits, tokens=tokens)
    real = torch.ones(logits.shape[:2], device=logits.device).long() if mask is None else mask.long()
    generator = step.drawing("sobolev token")
    uniform = torch.rand(len(real), generator=generator, device=generator.device).to(real.device)
    rank = (uniform * real.sum(1)).long()
    return ((real.cumsum(1) - 1 == rank[:, None]) & real.bool()).long().argmax(1)
