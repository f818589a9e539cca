"""Sobolev training: the student's answers, and how they change with the input, should be the teacher's.

With the answers m(x) of the student and f(x) of the teacher, both of n entries, the loss of order K adds up the
distances of the answers and of their derivatives by the input,

    ‖m − f‖² + Σ_{j ≤ K} ‖∂ʲm/∂xʲ − ∂ʲf/∂xʲ‖²_F,

or, cheaper, of their derivatives along random unit vectors v of the answers, E_v ‖∂⟨m, v⟩/∂x − ∂⟨f, v⟩/∂x‖².

Czarnecki et al. 2017 (arXiv:1706.04859), sections 2 and 3. Examples must not influence each other: derivatives are
taken of sums over the batch, so that batch normalisation in train mode, for example, mixes them.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill.errors import DistillError
from distill.losses.common import loss
from distill.precision import widen

Network = Callable[[Tensor], Tensor]
"""From inputs `[B, …]` to answers `[B, n]`."""


@loss
def sobolev(  # noqa: PLR0917 (a point, an order and how to draw)
    student: Network,
    teacher: Network,
    inputs: Shaped[Tensor, "batch ..."],
    order: int = 1,
    projections: int | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """Squared distance of the answers plus that of their derivatives: the sum of `sobolev_terms`, same arguments.

    Czarnecki et al. 2017 (arXiv:1706.04859), equation 1.

    >>> x = torch.tensor([[1.0, 2.0]])
    >>> sobolev(lambda x: 3 * x, lambda x: x, x).item()  # ‖(2, 4)‖² + ‖3 I − I‖²
    28.0
    """
    return torch.stack([*sobolev_terms(student, teacher, inputs, order, projections, generator).values()]).sum()


@loss
def sobolev_terms(  # noqa: PLR0917 (as sobolev)
    student: Network,
    teacher: Network,
    inputs: Shaped[Tensor, "batch ..."],
    order: int = 1,
    projections: int | None = None,
    generator: torch.Generator | None = None,
    *,
    mask: Shaped[Tensor, "batch ..."] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Squared distances of answers (`sobolev_value`), Jacobians (`sobolev_1`) and Hessians (`sobolev_2`).

    Each is summed over entries and averaged over the batch. Gradients reach the parameters of the student alone, not
    those of the teacher and not the inputs. Under `torch.no_grad` the same values come without a graph.

    Args:
        student: from `[B, …]` to `[B, n]`; it is called once, as is the teacher, with torch's math kernel for
            attention, because fused kernels have no second derivative.
        teacher: the same.
        inputs: the points, floating: for text, the output of the embedding. They are not changed.
        order: of the highest derivative, 1 or 2.
        projections: None compares all entries, in n backward passes (order 2: also n · entries of an input). k compares
            k random directions, in k passes (order 2: 2 k): the mean of ‖∂⟨m, v⟩/∂x − ∂⟨f, v⟩/∂x‖², with v uniform on
            the unit sphere for each example. Its expectation is 1/n of the whole; for order 2, with a second direction
            in input space, 1/(n · entries of an input).
        generator: draws the directions.
        mask: shaped like the inputs, 0 or False where they are padding: the second direction is 0 there.

    Raises:
        DistillError: inputs, settings or answers that cannot be derived or compared.

    Czarnecki et al. 2017 (arXiv:1706.04859), sections 2 and 3.

    >>> terms = sobolev_terms(lambda x: x**2, lambda x: x, torch.tensor([[3.0]]), order=2)
    >>> {name: term.item() for name, term in terms.items()}  # (9 − 3)², (6 − 1)², (2 − 0)²
    {'sobolev_value': 36.0, 'sobolev_1': 25.0, 'sobolev_2': 4.0}
    """
    _refuse_settings(inputs, order, projections)
    if mask is not None and mask.shape != inputs.shape:
        raise DistillError(
            f"Sobolev needs a mask of the shape of the inputs: mask {tuple(mask.shape)}, inputs {tuple(inputs.shape)}; "
            "give mask.expand_as(inputs)."
        )
    answers = (Answers.of(student, inputs, "student"), Answers.of(teacher, inputs, "teacher"))
    return distances(*answers, order, projections, generator, mask=mask)


def distances(
    student: "Answers",
    teacher: "Answers",
    order: int,
    projections: int | None,
    generator: torch.Generator | None,
    *,
    mask: Tensor | None = None,
    kept: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return what `sobolev_terms` does, from answers that are computed already.

    Args:
        student: the answers of the student, derived with a graph unless gradients are disabled.
        teacher: those of the teacher, at the same points.
        order, projections, generator, mask: as in `sobolev_terms`.
        kept: which examples count, `[B]`; None counts all. If none does, all distances are 0.
    """
    if student.answers.shape != teacher.answers.shape:
        raise DistillError(
            f"Sobolev needs the same answers on both sides: student {tuple(student.answers.shape)}, teacher "
            f"{tuple(teacher.answers.shape)}; keep the outputs that they share, as with logits[:, :2]."
        )
    trained = torch.is_grad_enabled()
    with torch.enable_grad():
        totals = [_squared_distance(student.answers, teacher.answers, kept)]
        totals += [totals[0].new_zeros(())] * order
        directions = list(_directions(student.answers, projections, generator))
        for v in directions:
            first = student.derivative(student.answers, v, trained or order > 1)
            taught = teacher.derivative(teacher.answers, v, order > 1)
            totals[1] = totals[1] + _squared_distance(first, taught, kept)
            if order == 2:
                for w in _directions(first.detach().flatten(1), projections and 1, generator, mask):
                    second = student.derivative(first.flatten(1), w, trained), teacher.derivative(taught.flatten(1), w)
                    totals[2] = totals[2] + _squared_distance(*second, kept)
    means = [totals[0], *(total / (1 if projections is None else len(directions)) for total in totals[1:])]
    names = ("sobolev_value", "sobolev_1", "sobolev_2")
    return {name: mean if trained else mean.detach() for name, mean in zip(names, means, strict=False)}


class Answers(NamedTuple):
    """The answers of one network at the points, with a graph down to its own copy of the points.

    Attributes:
        points: the copy, `[batch, …]`.
        answers: `[batch, n]`.
    """

    points: Tensor
    answers: Tensor

    @classmethod
    def of(cls, network: Network, inputs: Tensor, name: str) -> "Answers":
        """Run a network on a copy of the inputs.

        Raises:
            DistillError: it returns something else than answers `[batch, n]` with derivatives by the inputs.
        """
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            points = inputs.detach().clone().requires_grad_()
            return cls.between(points, network(points), name)

    @classmethod
    def between(cls, points: Tensor, answers: Any, name: str) -> "Answers":
        """Return answers that a network has computed from the points.

        Raises:
            DistillError: as `of`.
        """
        if not isinstance(answers, Tensor):
            raise DistillError(
                f"Sobolev needs answers [batch, n]: {name} gives {type(answers).__name__}; let it return a tensor of "
                "one row an example, as lambda x: model(x).logits."
            )
        if answers.ndim != 2 or len(answers) != len(points):
            raise DistillError(
                f"Sobolev needs answers [batch, n]: {name} gives {tuple(answers.shape)} for inputs "
                f"{tuple(points.shape)}; choose the position that answers, or add an axis, as with value[:, None]."
            )
        if not answers.requires_grad:
            raise DistillError(
                f"Sobolev needs answers that can be differentiated by the inputs, and those of {name} cannot; let "
                f"{name} compute from its argument, without torch.no_grad or detach."
            )
        return cls(points, widen(answers))

    def derivative(self, values: Tensor, direction: Tensor, again: bool = False) -> Tensor:
        """Return ∂⟨values, direction⟩/∂x of each example, with a graph where it is derived `again`."""
        if not values.requires_grad:
            return torch.zeros_like(widen(self.points))
        (found,) = torch.autograd.grad(
            (values * direction).sum(), self.points, create_graph=again, retain_graph=True, materialize_grads=True
        )
        return widen(found)


def _squared_distance(student: Tensor, teacher: Tensor, kept: Tensor | None) -> Tensor:
    """Squared distance, summed over entries and averaged over the batch, without gradients to the teacher."""
    distance = (student - teacher.detach()).square().flatten(1).sum(1)
    if kept is None:
        return distance.mean()
    return distance.masked_fill(~kept, 0).sum() / kept.sum().clamp(min=1)


def _directions(
    values: Tensor, draws: int | None, generator: torch.Generator | None, mask: Tensor | None = None
) -> Iterator[Tensor]:
    """Yield each axis of `[B, n]` in turn, or `draws` times a random unit vector for each example."""
    if draws is None:
        yield from torch.eye(values.shape[1], dtype=values.dtype, device=values.device)
        return
    device = values.device if generator is None else generator.device
    for _ in range(draws):
        drawn = torch.randn(values.shape, generator=generator, device=device, dtype=values.dtype)
        masked = drawn if mask is None else drawn * mask.flatten(1).to(drawn)
        yield functional.normalize(masked, dim=-1).to(values.device)


def _refuse_settings(inputs: Tensor, order: int, projections: int | None) -> None:
    """Raise DistillError if the inputs have no derivatives, or a setting is out of its range."""
    if not inputs.is_floating_point():
        raise DistillError(
            f"Sobolev derives by the inputs, and {inputs.dtype} has no derivative; give floating values: for text, the "
            "output of the embedding, with networks that start from it."
        )
    if order not in (1, 2):
        raise DistillError(f"Sobolev compares derivatives of order 1 or 2: order={order}; for values alone use hint.")
    if projections is not None and projections < 1:
        raise DistillError(
            f"Sobolev needs one direction at least: projections={projections}; projections=None compares all entries."
        )
    if len(inputs) == 0:
        raise DistillError(f"No example is left to compare at: inputs {tuple(inputs.shape)}; skip this batch.")
