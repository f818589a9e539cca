"""The derivative of a metric in the direction of a write: how it changes when a small share of the write is made.

A write replaces x by op(x, s). The operator `Towards(op)` writes x + α (op(x, s) − x) with α = 0, which changes
nothing, and ∂ metric / ∂ α is the first-order effect of the write, for one α in each example or in each written vector.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from interventions.endings import with_gradients
from interventions.errors import InterventionError
from interventions.execution.fits import check_value
from interventions.execution.run import Run, locations_of
from interventions.interchanges import intervene
from interventions.locations import Location
from interventions.metrics import name_of
from interventions.models.architectures import architecture
from interventions.models.wrappers import Model, is_traced
from interventions.operators import Interpolate, Operator
from interventions.runs import check_eval, run


@dataclass(eq=False)
class Towards:
    """An operator that writes its base, and whose derivative by its shares is the change that another operator makes.

    The first run keeps that change. In the runs after it, at other points, it stays the direction of the derivative.

    Attributes:
        op: the operator.
        location: where it is written.
        count: the number of shares: the written vectors, or the examples where all tokens are written.
        shares: a zero for each of them, `[count]`, by which the derivative is taken.
        cuts: whether gradients stop at the base, so that no earlier place is seen through it.
    """

    op: Operator
    location: Location
    count: int
    shares: Tensor
    cuts: bool = False
    _changes: list[Tensor] = field(default_factory=list)
    _turn: int = 0

    @classmethod
    def of(cls, op: Operator, location: Location, count: int, *, cuts: bool = False) -> "Towards":
        """Return the operator with new shares."""
        with torch.inference_mode(False):
            return cls(op, location, count, torch.zeros(count, requires_grad=True), cuts)

    @property
    def needs_source(self) -> bool:
        """True where the operator takes from a source."""
        return getattr(self.op, "needs_source", True)

    @property
    def pools_source(self) -> bool:
        """True where the operator takes from all sources at once."""
        return getattr(self.op, "pools_source", False)

    def begin(self) -> None:
        """Begin another run."""
        self._turn = 0

    def __call__(self, base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
        if self._turn == len(self._changes):
            with torch.no_grad():
                value = self.op(base, source, generator)
                check_value(value, base, self.op, self.location)
                self._changes.append(value - base)
        change = self._changes[self._turn]
        self._turn += 1
        if len(base) != self.count:
            raise InterventionError(
                f"an activation holds {len(base)} vectors where {self.count} are examples, as the model cuts examples "
                "into windows; name a place with one row for each example, e.g. at=Location(3)."
            )
        shares = rearrange(self.shares, f"n -> n {'1 ' * (base.ndim - 1)}").to(base.device, base.dtype)
        return (base.detach() if self.cuts else base) + shares * change


@dataclass(frozen=True, eq=False)
class Directions:
    """Writes whose derivatives are taken together.

    Attributes:
        ops: the operator at each location.
        positions: the tokens that are written at each location; None is all of them.
        source_positions: the tokens of the source; None is those written.
    """

    ops: Mapping[Location, Towards]
    positions: Mapping[Location, Any] | None = None
    source_positions: Mapping[Location, Any] | None = None

    @contextmanager
    def opened(self, model: Model, source: Run | None, generator: torch.Generator | None = None) -> Iterator[None]:
        """Hold the writes on the model inside the block."""
        for op in self.ops.values():
            op.begin()
        takes = any(op.needs_source for op in self.ops.values())
        with intervene(
            model,
            self.ops,
            source=source if takes else None,
            positions=self.positions,
            source_positions=self.source_positions,
            generator=generator,
        ):
            yield


def derivatives(
    base: Run,
    source: Run | None,
    directions: Sequence[Directions],
    metric: Callable[[Any], Tensor],
    *,
    generator: torch.Generator | None = None,
) -> list[dict[Location, Tensor]]:
    """Return ∂ metric / ∂ share for every share of every operator, `[count]` in double precision, by one backward.

    Args:
        base, source: the runs; the source may be None where no operator takes from one.
        directions: the writes. Those of one location stand in several of them.
        metric: a function of the output.
        generator: for operators that draw.

    Raises:
        InterventionError: the metric has no derivative.
    """
    ops = [op for each in directions for op in each.ops.values()]
    with with_gradients(), ExitStack() as stack:
        for each in directions:
            stack.enter_context(each.opened(base.model, source, generator))
        total = torch.as_tensor(metric(run(base.model, base.inputs, resumable=False).output)).sum()
        found = gradients(total, [op.shares for op in ops], f"the metric {name_of(metric)}")
    each_op = iter(found)
    return [{at: next(each_op).double().cpu() for at in each.ops} for each in directions]


def integrated(
    base: Run,
    source: Run,
    directions: Sequence[Directions],
    metric: Callable[[Any], Tensor],
    *,
    generator: torch.Generator | None = None,
    steps: int,
    along: Sequence[Location],
) -> list[dict[Location, Tensor]]:
    """Return the mean of `derivatives` at points on the way from base to source, after a call of `derivatives`.

    Args:
        base, source, directions, metric, generator: as for `derivatives`.
        steps: the number of points, the middles of equal parts of the way.
        along: the locations that lie on the way.
    """
    found: list[dict[Location, Tensor]] = [{} for _ in directions]
    for weight in midpoints(steps):
        with part_of_the_way(base.model, source, weight, along):
            here = derivatives(base, source, directions, metric, generator=generator)
        for total, each in zip(found, here, strict=True):
            for at, derivative in each.items():
                total[at] = total.get(at, 0) + derivative / steps
    return found


def gradients(total: Tensor, by: Sequence[Tensor], what: str, *, keep: bool = False) -> list[Tensor]:
    """Return the derivatives of a number by several tensors; zeros by those that it does not depend on.

    Args:
        total: the number.
        by: the tensors.
        what: the name of the number in an error.
        keep: whether to keep the graph for another derivative.

    Raises:
        InterventionError: the number depends on nothing by a function with a derivative.
    """
    if not total.requires_grad:
        raise InterventionError(
            f"{what} has no derivative by any of these places: it is a step function, such as accuracy, or does not "
            "depend on them; use a difference of logits, metric=logit_difference(answers, foils), or sweep(…)."
        )
    found = torch.autograd.grad(total, list(by), allow_unused=True, retain_graph=keep)
    return [torch.zeros_like(x) if each is None else each for x, each in zip(by, found, strict=True)]


def check_derivable(model: Model, verb: str) -> None:
    """Raise InterventionError for a model through which no derivatives are taken here, or one in train mode."""
    if is_traced(model):
        raise InterventionError(
            f"{verb} takes derivatives, which is not done on a model of nnsight; pass the torch model that it wraps, "
            "or use sweep(…)."
        )
    check_eval(model)


@contextmanager
def part_of_the_way(model: Model, source: Run, weight: float, along: Sequence[Location]) -> Iterator[None]:
    """Hold the base's embeddings at `base + weight · (source − base)` inside the block."""
    with intervene(model, dict.fromkeys(along, Interpolate(weight)), source=source):
        yield


def along_of(model: Model, along: object) -> list[Location]:
    """Return the locations along which base and source are joined: those given, or the embeddings of each stack.

    Raises:
        InterventionError: none was given, and the model has no blocks.
    """
    if along is not None:
        return locations_of(along)  # type: ignore[arg-type]
    found = architecture(model)
    if not found.stacks:
        raise InterventionError(
            "steps=… joins base and source at the embedding, and this model has no blocks; name where: "
            "along=Location(module='…')."
        )
    return [Location(site="embedding", stack=stack.name or None) for stack in found.stacks]


def midpoints(steps: int) -> list[float]:
    """Return the middles of so many equal parts of the way from 0 to 1.

    >>> midpoints(2)
    [0.25, 0.75]
    """
    return [(number + 0.5) / steps for number in range(steps)]
