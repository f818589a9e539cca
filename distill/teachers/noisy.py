"""A teacher that is not sure of its answers."""

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
        noise: how much, of which share of the examples, and of what kind.
        generator: of the noise; one that is given goes on from run to run and is not saved, so that a training that is
            resumed draws otherwise. None draws from torch's default generator, as dropout does, which the seed and the
            number of a step decide.
        answers: what of the teacher's output is the answer, as for `fit`.
    """

    def __init__(
        self, teacher: nn.Module, noise: LogitNoise, generator: torch.Generator | None = None, *, answers: Any = None
    ) -> None:
        super().__init__()
        self.module, self.noise, self.generator, self.answers = teacher, noise, generator, answers
        if hasattr(teacher, "config"):
            self.config = teacher.config

    def forward(self, *inputs: Any, **columns: Any) -> Answer:
        """The teacher's logits with noise."""
        with answered([self], [self.answers]):
            logits = logits_of(self.module(*inputs, **columns), rule_of(self.module))
        return Answer(logits=self.noise(logits, self.generator))

    @property
    def combines(self) -> tuple[nn.Module, ...]:
        """The teacher."""
        return (self.module,)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of the teacher."""
        inner: Any = self.module
        if not hasattr(inner, "get_input_embeddings"):
            raise NotImplementedError(f"{type(inner).__name__} does not say how many tokens it knows")
        return inner.get_input_embeddings()

    def extra_repr(self) -> str:
        """For printing."""
        return f"noise={self.noise}"
