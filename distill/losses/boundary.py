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
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

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
        teacher: from inputs to logits `[B, C]`, in eval mode. Its parameters get no gradient. A module is run on the
            examples that are still moving, and so is a function with a method `take(rows)` that returns the function
            of these rows; any other is given the whole batch at a time.
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
    climb = Climb(lr, eps, steps, clamp, probabilities, stop)
    climb.refuse(inputs)
    with torch.no_grad():
        logits = _logits_of(teacher, inputs)
        attacked = _is_correct(logits, labels)
        if student is not None:
            attacked = attacked & _is_correct(_logits_of(student, inputs), labels)
    rows = attacked.nonzero()[:, 0]
    ended, _, left = climb(teacher, inputs, labels, (logits, rows), generator)
    return BoundarySamples(ended, attacked, attacked.index_fill(0, left, False))


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
class Climb:
    """The ascent of examples to other classes. Its attributes are the arguments of `boundary_samples`."""

    lr: float = 0.3
    eps: float = 1e-4
    steps: int = 10
    clamp: Bounds | None = None
    probabilities: bool = False
    stop: str = "label"

    def __call__(
        self,
        teacher: Network,
        inputs: Tensor,
        labels: Tensor,
        start: tuple[Tensor, Tensor],
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return where the examples ended, the logits of the teacher there, and the rows that have not crossed.

        The teacher runs once a step, at the examples that have not crossed yet. Which these are is read from the device
        between the forward pass and the backward pass: one wait a step, without which all rows would take all steps.

        Args:
            teacher: the network whose boundary is crossed.
            inputs: the inputs that the examples start from.
            labels: their classes.
            start: the logits of the teacher at the inputs, and the rows to move, which the teacher classifies right.
            generator: draws the classes that they move to.
        """
        ends, rows = start
        moved, bounds = widen(inputs.detach()), self._bounds(inputs)
        targets = _draw_targets(ends, labels, generator)
        if not (len(rows) and self.steps):
            return moved.to(inputs.dtype), ends, rows
        boundary = _Boundary(labels.long().clamp(min=0)[rows], targets[rows], self.probabilities, self.stop)
        network = _Rows.of(teacher, inputs).take(rows)
        points, logits = network(moved, derived=True)
        left = torch.arange(len(rows), device=rows.device)
        for number in range(1, self.steps + 1):
            ahead = self._ahead(boundary, points, logits)
            if len(left) < len(rows):
                ahead, rows, boundary, network = ahead[left], rows[left], boundary.take(left), network.take(left)
            moved = moved.index_copy(0, rows, ahead.clamp(*(bound[rows] for bound in bounds)) if bounds else ahead)
            points, logits = network(moved, derived=number < self.steps)
            ends = ends.index_copy(0, rows, logits.detach().to(ends.dtype))
            left = (~boundary.crossed(logits.detach())).nonzero()[:, 0]
            if not len(left):
                break
        return moved.to(inputs.dtype), ends, rows[left]

    def refuse(self, inputs: Tensor) -> None:
        """Raise DistillError if the inputs cannot be moved, or a setting is out of its range."""
        if self.stop not in STOPS:
            raise DistillError(
                f"boundary_samples(stop={self.stop!r}) does not exist; use stop='label' (the label is no longer the "
                "most probable class) or stop='target' (the drawn class is more probable than the label)."
            )
        if not inputs.is_floating_point():
            raise DistillError(
                f"boundary_samples moves the inputs, and {inputs.dtype} cannot be moved a little; give floating "
                "values: for text, the output of the embedding, with a teacher that starts from it."
            )
        if self.clamp is not None and len(self.clamp) != 2:
            raise DistillError(
                f"boundary_samples(clamp={self.clamp}) takes a lowest and a highest value; use clamp=(0.0, 1.0)."
            )
        if self.steps < 0:
            raise DistillError(f"boundary_samples(steps={self.steps}) is negative; use steps=10, as the paper does.")
        if not (0 < self.lr < math.inf and 0 <= self.eps < math.inf):
            raise DistillError(
                f"boundary_samples needs a finite lr above 0 and eps of 0 or more: lr={self.lr}, eps={self.eps}; the "
                "paper's are lr=0.3 and eps=1e-4."
            )

    def _bounds(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the lowest and the highest value of each entry of the inputs; an empty tuple without bounds."""
        like = widen(inputs)
        return tuple(torch.as_tensor(bound).to(like).expand_as(like) for bound in self.clamp or ())

    def _ahead(self, boundary: "_Boundary", points: Tensor, logits: Tensor) -> Tensor:
        """Return the points one step further, along the unit vector in which the gap falls fastest."""
        with torch.enable_grad():
            difference = boundary.difference(logits)
            (gradient,) = torch.autograd.grad(difference.sum(), points)
        norms = gradient.flatten(1).norm(dim=1).clamp(min=torch.finfo(gradient.dtype).tiny)
        length = self.lr * (self.eps - difference.detach())
        return points.detach() + _broadcast(length, gradient) * (gradient / _broadcast(norms, gradient))


@dataclass(frozen=True)
class _Boundary:
    """The boundary between the label and the target class of each example, and the rule for having crossed it.

    Attributes:
        labels: `[rows]`, the classes that the examples come from.
        targets: `[rows]`, the classes that they are moved to.
        probabilities: whether probabilities are compared instead of logits.
        stop: one of `STOPS`.
    """

    labels: Tensor
    targets: Tensor
    probabilities: bool
    stop: str

    def take(self, rows: Tensor) -> "_Boundary":
        """Return the boundary of some of the examples."""
        return replace(self, labels=self.labels[rows], targets=self.targets[rows])

    def crossed(self, logits: Tensor) -> Bool[Tensor, " rows"]:
        """Return which examples are beyond the boundary."""
        return self.difference(logits) > 0 if self.stop == "target" else logits.argmax(1) != self.labels

    def difference(self, logits: Tensor) -> Float[Tensor, " rows"]:
        """Return the score of the target class minus that of the label."""
        scores = logits.softmax(-1) if self.probabilities else logits
        return (scores.gather(1, self.targets[:, None]) - scores.gather(1, self.labels[:, None]))[:, 0]


@dataclass(frozen=True)
class _Rows:
    """A network at some rows of a batch.

    It runs these rows alone if it is a module in eval mode, or says by `take` which function some rows have. Of any
    other function it is unknown what it holds of the batch, a mask for example: it runs the whole batch.

    Attributes:
        network: the network, at these rows if it runs them alone.
        rows: their numbers in the batch.
        dtype: that of the inputs of the network.
        alone: whether it runs them alone.
    """

    network: Any
    rows: Tensor
    dtype: torch.dtype
    alone: bool

    @classmethod
    def of(cls, network: Network, inputs: Tensor) -> "_Rows":
        """Return a network at all rows of its inputs."""
        still = isinstance(network, nn.Module) and not any(module.training for module in network.modules())
        rows = torch.arange(len(inputs), device=inputs.device)
        return cls(network, rows, inputs.dtype, still or hasattr(network, "take"))

    def take(self, rows: Tensor) -> "_Rows":
        """Return the network at some of these rows, each at most once and in order."""
        if len(rows) == len(self.rows):
            return self
        network = self.network.take(rows) if hasattr(self.network, "take") else self.network
        return replace(self, network=network, rows=self.rows[rows])

    def __call__(self, moved: Tensor, *, derived: bool) -> tuple[Tensor, Tensor]:
        """Return the points of these rows and the logits there, with a graph between the two if they are `derived`."""
        points = moved[self.rows].requires_grad_(derived)
        with torch.set_grad_enabled(derived):
            if self.alone:
                return points, _logits_of(self.network, points.to(self.dtype))
            whole = moved.index_copy(0, self.rows, points)
            return points, _logits_of(self.network, whole.to(self.dtype))[self.rows]


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
    if not _is_here(others):
        others = others.nan_to_num(1.0)  # to look would be to wait; the loss is not finite either
    elif not others.isfinite().all():
        raise DistillError(
            "boundary_samples draws by the teacher's probabilities, and some of its logits are NaN or infinite; see "
            "whether the inputs are: inputs.isfinite().all()."
        )
    weights = others.to("cpu" if generator is None else generator.device)
    return torch.multinomial(weights, 1, generator=generator)[:, 0].to(logits.device)


def _is_here(values: Tensor) -> bool:
    """Return whether values can be looked at without waiting for an accelerator."""
    return values.is_cpu


def _broadcast(values: Shaped[Tensor, " batch"], like: Tensor) -> Tensor:
    """Return one value an example, `[batch]`, with the axes to broadcast over a whole example of `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
