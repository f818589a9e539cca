"""The controls of an audit: the same measurement where the answer is known."""

from dataclasses import dataclass

from distill.auditing.behaviour import Behaviour
from distill.auditing.parts import Part
from distill.evaluation.interchange_result import InterchangeAccuracy


@dataclass(frozen=True)
class Controls:
    """The same measurement of two other models: the original itself, and an untrained network.

    Attributes:
        itself: the largest divergence of the original against itself, of its answers and of every part: 0 where the
            measurement adds nothing of its own. None where it was not measured.
        untrained: how alike the original and a network of its architecture with new weights answer.
        untrained_parts: the whole blocks of that network, exchanged one by one.
        interchange: its interchange accuracy of the first kind.
    """

    itself: float | None = None
    untrained: Behaviour | None = None
    untrained_parts: tuple[Part, ...] = ()
    interchange: InterchangeAccuracy | None = None
