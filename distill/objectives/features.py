"""Objectives on hidden states: what the models compute at a place."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distill.errors import DistillError
from distill.losses import cosine, patient
from distill.mapping import Pair
from distill.objectives.objective import Objective, Reads, Step
from interventions import Location, architecture


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
        student, teacher = step.student.vectors(self.at), step.taught.vectors(self.at)
        return {"cosine": cosine(student, teacher, mask=step.mask(student))}


class PKD(Objective):
    """Patient knowledge distillation: squared error of the L2-normalised first token, layer by layer. Term `pkd`.

    Sun et al. 2019 (arXiv:1908.09355), section 3.2. Both models have the same width.

    Args:
        layers: teacher location → student location. None: the last location of each teacher side of the mapping with
            the last of its student side, but for the last block of the teacher, which the answers show.
    """

    def __init__(self, layers: Mapping[Location, Location] | None = None) -> None:
        super().__init__()
        self.layers = layers

    def reads(self, mapping: Sequence[Pair]) -> Reads:
        """The compared locations of both models."""
        layers = _ends(mapping) if self.layers is None else self.layers
        return Reads(tuple(layers), tuple(layers.values()))

    def forward(self, step: Step) -> dict[str, Tensor]:
        """The term `pkd`."""
        layers = _below_last(step) if self.layers is None else self.layers
        if not layers:
            raise DistillError(
                "PKD() compares the layers of a mapping and there is none below the last; give "
                "PKD({Location(1): Location(0)})."
            )
        teacher = torch.stack([step.taught.vectors(above)[:, 0] for above in layers], 1)
        student = torch.stack([step.student.vectors(below)[:, 0] for below in layers.values()], 1)
        return {"pkd": patient(student, teacher)}


def _ends(mapping: Sequence[Pair]) -> dict[Location, Location]:
    return {pair.teacher[-1]: pair.student[-1] for pair in mapping}


def _below_last(step: Step) -> dict[Location, Location]:
    found = architecture(step.taught.model)
    last = [stack.blocks[-1] for stack in found.stacks]
    return {above: below for above, below in _ends(step.mapping).items() if found.place(above).module not in last}
