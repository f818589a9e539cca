"""A noisy teacher: its logits are perturbed anew in every run.

Additive noise gives the logits z + ξ and multiplicative noise (1 + ξ) z, with ξ ~ N(0, σ²), for a random share of the
examples (`losses.LogitNoise`).

Sau, Balasubramanian 2016 (arXiv:1610.09650), section 3.
"""

from typing import Any

import torch
from torch import nn

from distill.errors import checked
from distill.losses import LogitNoise
from distill.models.outputs import answered
from distill.teachers.ensemble import Answer
from interventions import logits_of, rule_of


@checked
class NoisyTeacher(nn.Module):
    """A teacher whose logits are perturbed anew in every run, in eval mode too: `NoisyTeacher(teacher, LogitNoise(1))`.

    Sau, Balasubramanian 2016 (arXiv:1610.09650), section 3. The control is a student with noise: as the student of
    `fit`, give `NoisyTeacher(student, noise)`; the network itself, `student`, is trained in place and has none.

    A measurement of it is noisy too: measure its `module`. Locations are those of the teacher, e.g. `Location(2)`, or
    `Location(module="module.…")`.

    Args:
        teacher: a network, or an `Ensemble`.
        noise: the kind and the size of the noise, and the share of the examples that get it.
        generator: the generator of the noise. It advances from run to run and is not saved, so a resumed training
            draws other noise. None draws from torch's default generator, as dropout does, which the seed and the
            number of a step decide.
        answers: the rule that finds the answer in the teacher's output, as for `fit`.
    """

    def __init__(
        self, teacher: nn.Module, noise: LogitNoise, generator: torch.Generator | None = None, *, answers: Any = None
    ) -> None:
        super().__init__()
        self.module, self.noise, self.generator, self.answers = teacher, noise, generator, answers
        if hasattr(teacher, "config"):
            self.config = teacher.config

    def forward(self, *inputs: Any, **columns: Any) -> Answer:
        """Return the teacher's logits with noise."""
        with answered([self], [self.answers]):
            logits = logits_of(self.module(*inputs, **columns), rule_of(self.module))
        return Answer(logits=self.noise(logits, self.generator))

    @property
    def combines(self) -> tuple[nn.Module, ...]:
        """The teacher."""
        return (self.module,)

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of the teacher."""
        inner: Any = self.module
        if not hasattr(inner, "get_input_embeddings"):
            raise NotImplementedError(f"{type(inner).__name__} does not say how many tokens it knows")
        return inner.get_input_embeddings()

    def extra_repr(self) -> str:
        """Return the settings for printing."""
        return f"noise={self.noise}"
