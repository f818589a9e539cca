"""Losses on how answers change with their inputs: the derivatives of student and teacher.

Czarnecki et al. 2017 (Sobolev training, arXiv:1706.04859), sections 2 and 3. Examples must not influence each other:
derivatives are taken of sums over the batch, so batch normalisation in train mode, for one, mixes them.
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

    Each is summed over entries and averaged over the batch. The teacher is never trained by it; gradients reach the
    student's parameters alone, none the inputs. Under `torch.no_grad` the same values come without a graph.

    Args:
        student: from `[B, …]` to `[B, n]`; called once, as the teacher, with torch's math kernel for attention, as
            fused ones have no second derivative.
        teacher: the same.
        inputs: the points, floating: for text, the output of the embedding. Left as they are.
        order: of the highest derivative, 1 or 2.
        projections: None compares all entries, in n backward passes (order 2: also n · entries of an input). k compares
            k random directions, in k passes (order 2: 2 k): the mean of ‖∂⟨m, v⟩/∂x − ∂⟨f, v⟩/∂x‖², with v uniform on
            the unit sphere for each example. Its expectation is 1/n of the whole; for order 2, with a second direction
            in input space, 1/(n · entries of an input).
        generator: of the directions.
        mask: shaped like the inputs, 0 or False where they are padding: the second direction leaves it alone.

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
    trained = torch.is_grad_enabled()
    with torch.enable_grad():
        learnt = _Side.at(student, inputs, "student", trained)
        taught = _Side.at(teacher, inputs, "teacher", False)
        if learnt.answers.shape != taught.answers.shape:
            raise DistillError(
                f"Sobolev needs the same answers on both sides: student {tuple(learnt.answers.shape)}, teacher "
                f"{tuple(taught.answers.shape)}; keep the outputs that they share, as with logits[:, :2]."
            )
        totals = [_squared(learnt.answers, taught.answers)] + [inputs.new_zeros(())] * order
        directions = list(_directions(learnt.answers, projections, generator))
        for v in directions:
            ours, theirs = (side.derivative(side.answers, v, order > 1) for side in (learnt, taught))
            totals[1] = totals[1] + _squared(ours, theirs)
            if order == 2:
                for w in _directions(ours.detach().flatten(1), projections and 1, generator, mask):
                    second = (side.derivative(g.flatten(1), w) for side, g in ((learnt, ours), (taught, theirs)))
                    totals[2] = totals[2] + _squared(*second)
    means = [totals[0], *(total / (1 if projections is None else len(directions)) for total in totals[1:])]
    names = ("sobolev_value", "sobolev_1", "sobolev_2")
    return {name: mean if trained else mean.detach() for name, mean in zip(names, means, strict=False)}


class _Side(NamedTuple):
    """One network at the points: its answers, with a graph down to its own copy of them."""

    points: Tensor
    answers: Tensor
    trained: bool

    @classmethod
    def at(cls, network: Network, inputs: Tensor, name: str, trained: bool) -> "_Side":
        points = inputs.detach().clone().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):
            answers: Any = network(points)
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
        return cls(points, widen(answers), trained)

    def derivative(self, values: Tensor, direction: Tensor, again: bool = False) -> Tensor:
        """∂⟨values, direction⟩/∂x for each example; with a graph for the student, or if it is derived again."""
        if not values.requires_grad:
            return torch.zeros_like(widen(self.points))
        (found,) = torch.autograd.grad(
            (values * direction).sum(),
            self.points,
            create_graph=self.trained or again,
            retain_graph=True,
            materialize_grads=True,
        )
        return widen(found)


def _squared(ours: Tensor, theirs: Tensor) -> Tensor:
    """Summed over entries, averaged over the batch; the teacher's side without a graph."""
    return (ours - theirs.detach()).square().flatten(1).sum(1).mean()


def _directions(
    values: Tensor, draws: int | None, generator: torch.Generator | None, mask: Tensor | None = None
) -> Iterator[Tensor]:
    """Each axis of `[B, n]` in turn, or `draws` times a random direction for each example."""
    if draws is None:
        yield from torch.eye(values.shape[1], dtype=values.dtype, device=values.device)
        return
    device = values.device if generator is None else generator.device
    for _ in range(draws):
        drawn = torch.randn(values.shape, generator=generator, device=device, dtype=values.dtype)
        kept = drawn if mask is None else drawn * mask.flatten(1).to(drawn)
        yield functional.normalize(kept, dim=-1).to(values.device)


def _refuse_settings(inputs: Tensor, order: int, projections: int | None) -> None:
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
