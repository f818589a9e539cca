"""How far an interchange moves the answers of teacher and student, and whether it moves both alike.

With z the logits of an answer and c the class that the teacher gives to the base, the log-odds of c are

    l(z) = z_c − log Σ_{k ≠ c} exp z_k,

and the shift of an answer is l(z after the interchange) − l(z on the base); of a real-valued answer it is the
difference of the values. The correlation of the shifts of student and teacher is 1 where the student moves as the
teacher does, up to a factor, also where no answer changes, so that it says more of few pairs than shares do.
"""

from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from distill.statistics.tally import Tally

LARGEST = 1e3
"""Log-odds beyond this count as this: classes that a model excludes have logits of −∞."""
SUMS = ("shift", "teacher_shift", "shift_squared", "teacher_shift_squared", "shift_product")


def log_odds(logits: Float[Tensor, "*batch classes"], classes: Tensor) -> Float[Tensor, " *batch"]:
    """Return the log-odds of one class for each answer.

    Args:
        logits: of the answers; of one class alone they are the values themselves.
        classes: the class of each answer, `[*batch]`.

    >>> round(log_odds(torch.tensor([0.75, 0.25]).log(), torch.tensor(0)).item(), 4)  # log 3
    1.0986
    """
    logits = logits.double()
    if logits.shape[-1] == 1:
        return logits[..., 0]
    chosen = classes[..., None]
    others = logits.scatter(-1, chosen, -torch.inf).logsumexp(-1)
    return (logits.gather(-1, chosen)[..., 0] - others).nan_to_num(0.0).clamp(-LARGEST, LARGEST)


def moments(teacher: tuple[Tensor, Tensor], student: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Return what each answer adds to the moments of the shifts, by the names in `SUMS`.

    Args:
        teacher, student: the logits after the interchange and on the base, `[*batch, classes]`.
    """
    classes = teacher[1].argmax(-1)
    return moments_of(*(log_odds(after, classes) - log_odds(base, classes) for after, base in (teacher, student)))


def moments_of(taught: Tensor, own: Tensor) -> dict[str, Tensor]:
    """Return what each answer adds to the moments, from the shifts of the teacher and of the student."""
    return dict(zip(SUMS, (own, taught, own * own, taught * taught, own * taught), strict=True))


def correlation(tally: Tally) -> tuple[float, Float[Tensor, " pairs"]] | None:
    """Return the correlation of the shifts of student and teacher, and what each pair adds to its deviation.

    None where one of the two never moves, or where no shifts were summed.
    """
    if SUMS[0] not in tally:
        return None
    total = tally["total"].sum(1).double()
    own, taught, squares, taught_squares, products = (tally[name].sum(1).double() for name in SUMS)
    n = float(total.sum())
    if not n:
        return None
    x, y = float(own.sum()) / n, float(taught.sum()) / n
    spread = [float(s.sum()) / n - mean * mean for s, mean in ((squares, x), (taught_squares, y))]
    if min(spread) <= 1e-12 * max(float(squares.sum()), float(taught_squares.sum()), 1e-12) / n:
        return None
    scale = sqrt(spread[0] * spread[1])
    value = (float(products.sum()) / n - x * y) / scale
    # Σ over the predictions of a pair of u v − value (u² + v²) / 2, with u and v the standardized shifts
    uv = (products - x * taught - y * own + total * x * y) / scale
    uu = (squares - 2 * x * own + total * x * x) / spread[0]
    vv = (taught_squares - 2 * y * taught + total * y * y) / spread[1]
    return min(1.0, max(-1.0, value)), (uv - value * (uu + vv) / 2) / n
