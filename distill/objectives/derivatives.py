"""Sobolev training: the student's answers, and their derivatives by the input, should be those of the teacher.

With the logits z of student and teacher at an input x and random unit vectors v (over answers) and w (over inputs),

    L = ‖z_s − z_t‖² + E_v ‖∂⟨z_s, v⟩/∂x − ∂⟨z_t, v⟩/∂x‖²,

and for order 2 E_vw of the squared difference of ∂⟨∂⟨z, v⟩/∂x, w⟩/∂x; the losses are in `distill.losses.derivatives`.

Czarnecki et al. 2017 (arXiv:1706.04859), sections 2 and 3.
"""

from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from distill.errors import DistillError, checked
from distill.losses import sobolev_terms
from distill.models.inputs import answer_mask, students
from distill.models.loss_masks import checked_tokens
from distill.objectives.objective import About, Objective
from distill.objectives.points import Places, check_points, functions
from distill.objectives.step import Step, zero_of


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

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the terms up to the order."""
        # In half precision, differences of derivatives are mostly rounding.
        with torch.autocast(step.generator.device.type, enabled=False):
            teacher, student = functions(step, self.at, "Sobolev()")
            points, draws = teacher.points, step.drawing("sobolev")
            real = answer_mask(step.network, students(step.batch))
            if points.ndim != 3 or real is None or real.shape != points.shape[:2]:
                real = None
            tokens = step.mask(step.taught.logits, tokens=self.tokens)
            if step.taught.logits.ndim == 3:
                token = _draw_tokens(step, self.tokens)
                teacher, student = replace(teacher, token=token), replace(student, token=token)
            if tokens is not None and not bool(tokens.bool().any(1).all()):
                some = tokens.bool().any(1).nonzero()[:, 0]
                if not len(some):
                    return {name: zero_of(step.student.logits) for name in self._names}
                teacher, student, points = teacher.take(some), student.take(some), points[some]
                real = None if real is None else real[some]
            mask = None if real is None else real[..., None].expand(points.shape)
            terms = sobolev_terms(student, teacher, points, self.order, self.projections, draws, mask=mask)
        return {name: step.mean(term, step.kind_of(tokens)) for name, term in terms.items()}

    def extra_repr(self) -> str:
        """Return the settings for printing."""
        shown = ", tokens='all'" if self.tokens == "all" else ""
        return f"order={self.order}, projections={self.projections}, at={self.at}{shown}"

    @property
    def _names(self) -> tuple[str, ...]:
        return ("sobolev_value", "sobolev_1", "sobolev_2")[: self.order + 1]


def _draw_tokens(step: Step, tokens: str = "labelled") -> Int[Tensor, " batch"]:
    """Draw the position of one token of each example, uniformly from those that count."""
    logits = step.taught.logits
    mask = step.mask(logits, tokens=tokens)
    real = torch.ones(logits.shape[:2], device=logits.device).long() if mask is None else mask.long()
    generator = step.drawing("sobolev token")
    uniform = torch.rand(len(real), generator=generator, device=generator.device).to(real.device)
    rank = (uniform * real.sum(1)).long()
    return ((real.cumsum(1) - 1 == rank[:, None]) & real.bool()).long().argmax(1)
