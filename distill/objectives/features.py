"""Objectives on hidden states: what the models compute at a place."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distill.losses import cosine, patient
from distill.mapping import Pair
from distill.objectives.objective import Objective, Reads, Step
from interventions import Location


class Cosine(Objective):
    """1 − cosine between the last hidden states of student and teacher, over unmasked tokens. Term `cosine`.

    Sanh et al. 2019 (DistilBERT, arXiv:1910.01108), section 3. Both models have the same width there.

    Args:
        at: the location compared in both, by default the output of the last block.
    """

    def __init__(self, at: Location = Location(-1)) -> None:  # noqa: B008 (frozen)
        super().__init__()
        self.at = at

    def reads(self, mapping: Sequence[Pair]) -> Reads:
        """The compared location of both models."""
        return Reads((self.at,), (self.at,))

    def forward(self, step: Step) -> dict[str, Tensor]:
        """The term `cosine`."""
        student, teacher = step.student.activations[self.at], step.taught.activations[self.at]
        return {"cosine": cosine(student, teacher, mask=step.mask(student))}


class PKD(Objective):
    """Patient knowledge distillation: squared error of the L2-normalised first token, layer by layer. Term `pkd`.

    Sun et al. 2019 (arXiv:1908.09355), section 3.2. Both models have the same width.

    Args:
        layers: teacher location → student location. None: every teacher layer below the last that ends a student layer's share
            under the mapping (the last location of each teacher side with its student location).
    """

    def __init__(self, layers: Mapping[Location, Location] | None = None) -> None:
        super().__init__()
        self.layers = layers

    def reads(self, mapping: Sequence[Pair]) -> Reads:
        """The compared locations of both models."""
        layers = self._layers(mapping)
        return Reads(tuple(layers), tuple(layers.values()))

    def forward(self, step: Step) -> dict[str, Tensor]:
        """The term `pkd`."""
        layers = self._layers(step.mapping)
        teacher = torch.stack([step.taught.activations[above][:, 0] for above in layers], 1)
        student = torch.stack([step.student.activations[below][:, 0] for below in layers.values()], 1)
        return {"pkd": patient(student, teacher)}

    def _layers(self, mapping: Sequence[Pair]) -> Mapping[Location, Location]:
        if self.layers is not None:
            return self.layers
        return {pair.teacher[-1]: pair.student[-1] for pair in mapping}
