"""Objectives on the answers: what the models say, whatever they compute inside."""

from torch import Tensor

from distill.errors import DistillError
from distill.losses import Divergence, cross_entropy, forward_kl, kd
from distill.objectives.objective import Objective, Step


class KD(Objective):
    """Knowledge distillation: divergence between the softened answers of teacher and student. Term `kd`.

    Hinton, Vinyals, Dean 2015 (arXiv:1503.02531), section 2.

    Args:
        temperature: softens both answers.
        reduction: `"batchmean"` (mean over examples or unmasked tokens) or `"mean"` (also ÷ classes, as DIITO-XXS and
            PKD).
        scale_t2: multiply by temperature².
        divergence: `forward_kl`, `reverse_kl`, `jensen_shannon` of `distill.losses`, or a function like them.
    """

    def __init__(
        self,
        temperature: float = 2.0,
        *,
        reduction: str = "batchmean",
        scale_t2: bool = True,
        divergence: Divergence = forward_kl,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise DistillError(
                f"KD(temperature={temperature}) softens nothing; use a temperature above 0, e.g. KD(2.0)."
            )
        self.temperature, self.reduction, self.scale_t2, self.divergence = temperature, reduction, scale_t2, divergence

    def forward(self, step: Step) -> dict[str, Tensor]:
        """The term `kd`."""
        student, teacher = step.student.logits, step.taught.logits
        loss = kd(
            student,
            teacher,
            self.temperature,
            self.reduction,
            self.scale_t2,
            mask=step.mask(student),
            divergence=self.divergence,
        )
        return {"kd": loss}

    def extra_repr(self) -> str:
        """For printing."""
        return f"temperature={self.temperature}"


class Labels(Objective):
    """Cross-entropy of the student's answer under the labels of the data; −100 is left out. Term `labels`."""

    def forward(self, step: Step) -> dict[str, Tensor]:
        """The term `labels`."""
        if "labels" not in step.batch:
            raise DistillError(
                f"Labels() needs a column 'labels' and the data has {', '.join(step.batch)}; leave Labels() out to "
                "train "
                "on the teacher's answers alone."
            )
        return {"labels": cross_entropy(step.student.logits, step.batch["labels"])}
