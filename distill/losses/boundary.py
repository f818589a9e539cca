"""Samples at the teacher's decision boundary, for losses there.

Heo et al. 2018 (BSS, arXiv:1805.05532), sections 3 and 4.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from distill.errors import DistillError, checked
from distill.losses.common import counted, loss, same_shapes
from distill.precision import widen

Network = Callable[[Tensor], Tensor]
"""From inputs `[B, …]` to logits `[B, C]`."""
Bounds = tuple[float | Tensor, float | Tensor]
STOPS = ("label", "target")
"""When an example has crossed."""


@checked
@dataclass(frozen=True, eq=False)
class BoundarySamples:
    """Inputs moved towards another class.

    Args:
        inputs: all of the batch, where they ended; those that were not attacked are as they came.
        attacked: which rows were moved: those classified right.
        crossed: which of them have crossed, by the rule of `stop`.
    """

    inputs: Float[Tensor, "batch ..."]
    attacked: Bool[Tensor, " batch"]
    crossed: Bool[Tensor, " batch"]


@loss
def boundary_samples(
    teacher: Network,
    inputs: Shaped[Tensor, "batch ..."],
    labels: Shaped[Tensor, "..."],
    *,
    student: Network | None = None,
    lr: float = 0.3,
    eps: float = 1e-4,
    steps: int = 10,
    clamp: Bounds | None = None,
    probabilities: bool = False,
    stop: str = "label",
    generator: torch.Generator | None,
) -> BoundarySamples:
    """Move each rightly classified example over the teacher's boundary to a class drawn by the teacher's probabilities.

    One step goes η (gap + ε) along the normalised gradient of z_k − z_y, where the gap is z_y − z_k, k the drawn class
    and y the label. An example stops once it has crossed, or after `steps`.

    Heo et al. 2018 (arXiv:1805.05532), section 3.2; `stop="label"` and `student` are those of the published code
    (bhheo/BSS_distillation, commit 6a318cb).

    Args:
        teacher: from inputs to logits `[B, C]`, of the whole batch at a time, in eval mode. Its parameters get
            no gradient.
        inputs: floating: for text, the output of the embedding.
        labels: `[B]`: classes, or −100 for a row to leave as it is.
        student: if given, the student must classify an example right too.
        lr: η.
        eps: ε, so that a step crosses and does not end on the boundary.
        steps: how many steps at most.
        clamp: lowest and highest value of an input, as numbers or as tensors that broadcast over it.
        probabilities: climb on probabilities instead of logits, as other published code does.
        stop: when an example has crossed: `"label"`, once the label is no longer the most probable class, so that a
            third class ends it too; or `"target"`, once the drawn class is more probable than the label.
        generator: of the drawn classes.

    >>> line = lambda x: torch.cat([-x, x], 1)
    >>> moved = boundary_samples(line, torch.tensor([[-1.0]]), torch.tensor([0]), lr=1.0, generator=None)
    >>> moved.inputs.item(), moved.crossed.item()  # −1 + 1 · (2 + 0.0001)
    (1.000..., True)
    """
    _refuse_settings(inputs, (lr, eps), steps, clamp, stop)
    with torch.no_grad():
        logits = _answers(teacher, inputs)
        attacked = _right(logits, labels)
        if student is not None:
            attacked = attacked & _right(_answers(student, inputs), labels)
    sides = _Sides(labels.long().clamp(min=0), _targets(logits, labels, generator), probabilities, stop)
    moved = widen(inputs.detach())
    for _ in range(steps):
        gap, uphill, crossed = sides.gap(teacher, moved, inputs.dtype)
        short = attacked & ~crossed
        if not short.any():
            break
        ahead = moved + _over(lr * (gap + eps), moved) * uphill
        ahead = ahead if clamp is None else ahead.clamp(*(torch.as_tensor(bound).to(moved) for bound in clamp))
        moved = torch.where(_over(short, moved), ahead, moved)
    with torch.no_grad():
        ended = moved.to(inputs.dtype)
        crossed = attacked & sides.crossed(_answers(teacher, ended))
    return BoundarySamples(ended, attacked, crossed)


@loss
@same_shapes
def most_different(
    student_probs: Float[Tensor, "batch classes"],
    teacher_probs: Float[Tensor, "batch classes"],
    labels: Shaped[Tensor, "..."],
    n: int = 64,
) -> Int[Tensor, " chosen"]:
    """The rows, n at most, where student and teacher differ most beside the label: the largest Σ_{k≠y} (p_t − p_s)².

    Heo et al. 2018 (arXiv:1805.05532), section 3.3.

    >>> student, teacher = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    >>> most_different(student, teacher, torch.tensor([0, 0]), n=1).tolist()
    [1]
    """
    if n < 1:
        raise DistillError(f"most_different chooses one row at least: n={n}; the paper's is n=64.")
    counts = counted("most_different", teacher_probs, labels)
    others = (widen(teacher_probs) - widen(student_probs)).square()
    places = labels.long().clamp(min=0)[:, None]
    others = torch.where(counts[:, None], others.scatter(1, places, 0), others)
    return others.sum(1).topk(min(n, len(others))).indices


@dataclass(frozen=True)
class _Sides:
    """Between which two classes each example moves, and on what."""

    labels: Tensor
    targets: Tensor
    probabilities: bool
    stop: str

    def crossed(self, logits: Tensor) -> Bool[Tensor, " batch"]:
        """Which examples are beyond the boundary."""
        return self.difference(logits) > 0 if self.stop == "target" else logits.argmax(1) != self.labels

    def difference(self, logits: Tensor) -> Float[Tensor, " batch"]:
        """Target less label."""
        scores = logits.softmax(-1) if self.probabilities else logits
        return (scores.gather(1, self.targets[:, None]) - scores.gather(1, self.labels[:, None]))[:, 0]

    def gap(self, teacher: Network, at: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Label less target, the unit vector along which it falls fastest, and which examples have crossed."""
        with torch.enable_grad():
            points = at.detach().requires_grad_()
            logits = _answers(teacher, points.to(dtype))
            difference = self.difference(logits)
            (gradient,) = torch.autograd.grad(difference.sum(), points)
        norms = gradient.flatten(1).norm(dim=1).clamp(min=torch.finfo(gradient.dtype).tiny)
        return -difference.detach(), gradient / _over(norms, gradient), self.crossed(logits.detach())


def _refuse_settings(inputs: Tensor, sizes: tuple[float, float], steps: int, clamp: Bounds | None, stop: str) -> None:
    lr, eps = sizes
    if stop not in STOPS:
        raise DistillError(
            f"boundary_samples(stop={stop!r}) does not exist; use stop='label' (the label is no longer the most "
            "probable class) or stop='target' (the drawn class is more probable than the label)."
        )
    if not inputs.is_floating_point():
        raise DistillError(
            f"boundary_samples moves the inputs, and {inputs.dtype} cannot be moved a little; give floating values: "
            "for text, the output of the embedding, with a teacher that starts from it."
        )
    if clamp is not None and len(clamp) != 2:
        raise DistillError(f"boundary_samples(clamp={clamp}) takes a lowest and a highest value; use clamp=(0.0, 1.0).")
    if steps < 0:
        raise DistillError(f"boundary_samples(steps={steps}) goes back; use steps=10, as the paper does.")
    if not (0 < lr < math.inf and 0 <= eps < math.inf):
        raise DistillError(
            f"boundary_samples needs a finite lr above 0 and eps of 0 or more: lr={lr}, eps={eps}; the paper's are "
            "lr=0.3 and eps=1e-4."
        )


def _answers(network: Network, inputs: Tensor) -> Float[Tensor, "batch classes"]:
    logits: Any = network(inputs)
    if not isinstance(logits, Tensor):
        raise DistillError(
            f"boundary_samples needs logits [batch, two classes or more], but a network gives {type(logits).__name__}; "
            "let it return a tensor, as lambda x: model(x).logits."
        )
    if logits.ndim != 2 or len(logits) != len(inputs) or logits.shape[1] < 2:
        raise DistillError(
            f"boundary_samples needs logits [batch, two classes or more], but inputs {tuple(inputs.shape)} give "
            f"{tuple(logits.shape)}; let the network return the logits of one answer an example."
        )
    return widen(logits)


def _right(logits: Tensor, labels: Tensor) -> Bool[Tensor, " batch"]:
    return counted("boundary_samples", logits, labels) & (logits.argmax(-1) == labels)


def _targets(logits: Tensor, labels: Tensor, generator: torch.Generator | None) -> Int[Tensor, " batch"]:
    """A class other than the label for each example, by the teacher's probabilities of those."""
    others = logits.scatter(1, labels.long().clamp(min=0)[:, None], -math.inf).softmax(-1)
    if not others.isfinite().all():
        raise DistillError(
            "boundary_samples draws by the teacher's probabilities, and some of its logits are NaN or infinite; see "
            "whether the inputs are: inputs.isfinite().all()."
        )
    drawn = others.to("cpu" if generator is None else generator.device)
    return torch.multinomial(drawn, 1, generator=generator)[:, 0].to(logits.device)


def _over(values: Shaped[Tensor, " batch"], like: Tensor) -> Tensor:
    """One value an example, broadcast over the example's axes."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
