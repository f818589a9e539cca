"""McNemar's test: whether one of two models answers more of the same rows right than the other, by chance alone.

Only rows count that one answers right and the other wrong. If both were equally good, each of these would be won or
lost with the probability ½, so the number that is won is binomial. It treats rows as independent of each other.

McNemar 1947, Psychometrika 12; exact as in Agresti 2002, Categorical Data Analysis, section 10.1.
"""

from dataclasses import dataclass, field

from distill.errors import DistillError, checked


@checked
@dataclass(frozen=True)
class Discordance:
    """On how many answers two models differ in being right.

    Attributes:
        won: the second is right and the first is wrong.
        lost: the first is right and the second is wrong.
        p: the probability of a split at least as uneven if both were equally good; 1 where none is won or lost.

    >>> Discordance(won=3, lost=12)
    Discordance(won=3, lost=12, p=0.0351...)
    """

    won: int
    lost: int
    p: float = field(init=False)

    def __post_init__(self) -> None:
        if self.won < 0 or self.lost < 0:
            raise DistillError(
                f"Discordance(won={self.won}, lost={self.lost}) counts answers; give numbers of 0 or more."
            )
        object.__setattr__(self, "p", _exact(self.won, self.lost))

    def __str__(self) -> str:
        return f"{self.won} won, {self.lost} lost, p = {self.p:.2g}"


def _exact(won: int, lost: int) -> float:
    """Return the two-sided binomial probability of a split that is at least as uneven."""
    from scipy.special import betainc  # type: ignore[import-untyped]

    return min(1.0, 2 * float(betainc(float(max(won, lost)), min(won, lost) + 1.0, 0.5))) if won + lost else 1.0
