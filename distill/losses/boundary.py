"""Boundary supporting samples (BSS): inputs moved just over a decision boundary of the teacher.

Ordinary inputs show the student little of where the teacher's classes meet. A boundary supporting sample is an input
of class y that is moved towards another class k by gradient ascent on the teacher until its answer changes; the student
then learns the teacher's answers there. With logits z of the teacher at the input x, one step is

    x ← x + η (gap + ε) g / ‖g‖₂,    gap = z_y − z_k,    g = ∂(z_k − z_y)/∂x,

and the class k ≠ y is drawn with the teacher's probabilities of the classes other than y.

Heo et al. 2018 (arXiv:1805.05532), sections 3 and 4.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from distill.errors import DistillError, checked
from distill.losses.common import find_labelled, loss, same_shapes
from distill.precision import widen

Network = Callable[[Tensor], Tensor]
"""From inputs `[B, …]` to logits `[B, C]`."""
Bounds = tuple[float | Tensor, float | Tensor]
STOPS = ("label", "target")
"""The rules that say when an example has crossed the boundary."""


@checked
@dataclass(frozen=True, eq=False)
class BoundarySamples:
    """Inputs that were moved towards another class, and which of them have crossed the boundary.

    Attributes:
        inputs: those of the whole batch, where they ended; rows that were not moved are unchanged.
        attacked: which rows were moved: those that were classified correctly.
        crossed: which of these have crossed the boundary, by the rule of `stop`.
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
    """Move each correctly classified example over the teacher's boundary, to a class drawn by its probabilities.

    One step is η (gap + ε) along the normalised gradient of z_k − z_y, where the gap is z_y − z_k, k the drawn class
    and y the label. An example stops once it has crossed, or after `steps`.

    Heo et al. 2018 (arXiv:1805.05532), section 3.2; `stop="label"` and `student` are those of the published code
    (bhheo/BSS_distillation, commit 6a318cb).

    Args:
        teacher: from inputs to logits `[B, C]`, of the whole batch at a time, in eval mode. Its parameters get
            no gradient.
        inputs: floating values: for text, the output of the embedding.
        labels: `[B]`: classes, or −100 for a row that is not moved.
        student: if given, only examples that the student classifies correctly too are moved.
        lr: η.
        eps: ε, so that a step crosses and does not end on the boundary.
        steps: the largest number of steps.
        clamp: lowest and highest value of an input, as numbers or as tensors that broadcast over it.
        probabilities: climb on probabilities instead of logits, as other published code does.
        stop: when an example has crossed: `"label"`, once the label is no longer the most probable class, so that a
            third class ends it too; or `"target"`, once the drawn class is more probable than the label.
        generator: draws the classes k.

    Raises:
        DistillError: inputs that are not floating, settings out of range, or a network without logits `[B, C]`.

    >>> line = lambda x: torch.cat([-x, x], 1)
    >>> moved = boundary_samples(line, torch.tensor([[-1.0]]), torch.tensor([0]), lr=1.0, generator=None)
    >>> moved.inputs.item(), moved.crossed.item()  # −1 + 1 · (2 + 0.0001)
    (1.000..., True)
    """
    _refuse_settings(inputs, (lr, eps), steps, clamp, stop)
    with torch.no_grad():
        logits = _logits_of(teacher, inputs)
        attacked = _is_correct(logits, labels)
        if student is not None:
            attacked = attacked & _is_correct(_logits_of(student, inputs), labels)
    boundary = _Boundary(labels.long().clamp(min=0), _draw_targets(logits, labels, generator), probabilities, stop)
    moved = widen(inputs.detach())
    for _ in range(steps):
        gap, uphill, crossed = boundary.gap(teacher, moved, inputs.dtype)
        remaining = attacked & ~crossed
        if not remaining.any():
            break
        ahead = moved + _broadcast(lr * (gap + eps), moved) * uphill
        ahead = ahead if clamp is None else ahead.clamp(*(torch.as_tensor(bound).to(moved) for bound in clamp))
        moved = torch.where(_broadcast(remaining, moved), ahead, moved)
    with torch.no_grad():
        ended = moved.to(inputs.dtype)
        crossed = attacked & boundary.crossed(_logits_of(teacher, ended))
    return BoundarySamples(ended, attacked, crossed)


@loss
@same_shapes
def most_different(
    student_probs: Float[Tensor, "batch classes"],
    teacher_probs: Float[Tensor, "batch classes"],
    labels: Shaped[Tensor, "..."],
    n: int = 64,
) -> Int[Tensor, " chosen"]:
    """The n rows at most where student and teacher differ most on the other classes: the largest Σ_{k≠y} (p_t − p_s)².

    Args:
        student_probs: `[B, C]`, probabilities of the student.
        teacher_probs: `[B, C]`, those of the teacher.
        labels: `[B]`: y; for −100 all classes are summed over.
        n: how many rows are chosen at most.

    Heo et al. 2018 (arXiv:1805.05532), section 3.3.

    >>> student, teacher = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    >>> most_different(student, teacher, torch.tensor([0, 0]), n=1).tolist()
    [1]
    """
    if n < 1:
        raise DistillError(f"most_different chooses one row at least: n={n}; the paper's is n=64.")
    is_labelled = find_labelled("most_different", teacher_probs, labels)
    others = (widen(teacher_probs) - widen(student_probs)).square()
    columns = labels.long().clamp(min=0)[:, None]
    others = torch.where(is_labelled[:, None], others.scatter(1, columns, 0), others)
    return others.sum(1).topk(min(n, len(others))).indices


@dataclass(frozen=True)
class _Boundary:
    """The boundary between the label and the target class of each example, and the rule for having crossed it.

    Attributes:
        labels: `[batch]`, the classes that the examples come from.
        targets: `[batch]`, the classes that they are moved to.
        probabilities: whether probabilities are compared instead of logits.
        stop: one of `STOPS`.
    """

    labels: Tensor
    targets: Tensor
    probabilities: bool
    stop: str

    def crossed(self, logits: Tensor) -> Bool[Tensor, " batch"]:
        """Return which examples are beyond the boundary."""
        return self.difference(logits) > 0 if self.stop == "target" else logits.argmax(1) != self.labels

    def difference(self, logits: Tensor) -> Float[Tensor, " batch"]:
        """Return the score of the target class minus that of the label."""
        scores = logits.softmax(-1) if self.probabilities else logits
        return (scores.gather(1, self.targets[:, None]) - scores.gather(1, self.labels[:, None]))[:, 0]

    def gap(self, teacher: Network, at: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gap, label minus target, the unit vector along which it falls fastest, and which have crossed."""
        with torch.enable_grad():
            points = at.detach().requires_grad_()
            logits = _logits_of(teacher, points.to(dtype))
            difference = self.difference(logits)
            (gradient,) = torch.autograd.grad(difference.sum(), points)
        norms = gradient.flatten(1).norm(dim=1).clamp(min=torch.finfo(gradient.dtype).tiny)
        return -difference.detach(), gradient / _broadcast(norms, gradient), self.crossed(logits.detach())


def _refuse_settings(inputs: Tensor, sizes: tuple[float, float], steps: int, clamp: Bounds | None, stop: str) -> None:
    """Raise DistillError if the inputs cannot be moved, or a setting is out of its range."""
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
        raise DistillError(f"boundary_samples(steps={steps}) is negative; use steps=10, as the paper does.")
    if not (0 < lr < math.inf and 0 <= eps < math.inf):
        raise DistillError(
            f"boundary_samples needs a finite lr above 0 and eps of 0 or more: lr={lr}, eps={eps}; the paper's are "
            "lr=0.3 and eps=1e-4."
        )


def _logits_of(network: Network, inputs: Tensor) -> Float[Tensor, "batch classes"]:
    """Return the logits of a network in at least single precision.

    Raises:
        DistillError: it returns something else than logits `[batch, two classes or more]`.
    """
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


def _is_correct(logits: Tensor, labels: Tensor) -> Bool[Tensor, " batch"]:
    """Return which examples have a label and the largest logit there."""
    return find_labelled("boundary_samples", logits, labels) & (logits.argmax(-1) == labels)


def _draw_targets(logits: Tensor, labels: Tensor, generator: torch.Generator | None) -> Int[Tensor, " batch"]:
    """Draw a class other than the label for each example, with the teacher's probabilities of these classes."""
    others = logits.scatter(1, labels.long().clamp(min=0)[:, None], -math.inf).softmax(-1)
    if not others.isfinite().all():
        raise DistillError(
            "boundary_samples draws by the teacher's probabilities, and some of its logits are NaN or infinite; see "
            "whether the inputs are: inputs.isfinite().all()."
        )
    weights = others.to("cpu" if generator is None else generator.device)
    return torch.multinomial(weights, 1, generator=generator)[:, 0].to(logits.device)


def _broadcast(values: Shaped[Tensor, " batch"], like: Tensor) -> Tensor:
    """Return one value an example, `[batch]`, with the axes to broadcast over a whole example of `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
