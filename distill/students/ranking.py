"""The importance of the parts of a model, by which smaller students keep the most important ones."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from distill.errors import DistillError
from distill.statistics.tables import table_of
from interventions import Location, Picture, Result, label, plain_data, printed

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]

DIMS = "residual stream"


@dataclass(frozen=True)
class LayerSearch:
    """The sets of layers that a search has tried.

    Attributes:
        stack: the list of blocks, as `Location(stack=…)` takes it; None is the one that locations without it mean.
        criterion: "kl", the KL divergence to the answers of the whole model, or "loss", both [nats / answer].
        tried: {layers that were kept: the criterion}, in the order in which they were tried.
        best: {number of layers: the best ones of that number}.
    """

    stack: str | None
    criterion: str
    tried: Mapping[tuple[int, ...], float]
    best: Mapping[int, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Importance(Result):
    """The importance of the layers, heads, neurons and dims of a model on some data; see `importance`.

    Attributes:
        layers: {output of a block: its block influence}, from 0 to 2.
        heads: {output of the heads of an attention: `[heads]`}, the length of the output of each.
        neurons: {activation of a feed-forward part: `[units]`}, in units of the residual stream.
        dims: of the residual stream, `[width]`; None for a model whose blocks differ in width.
        search: the sets of layers that were tried; None without a search.
        tokens: {stack, "" for the only one: the number of tokens, or other positions, that were measured}.
    """

    layers: Mapping[Location, float] = field(default_factory=dict)
    heads: Mapping[Location, Float[Tensor, " heads"]] = field(default_factory=dict)
    neurons: Mapping[Location, Float[Tensor, " units"]] = field(default_factory=dict)
    dims: Float[Tensor, " width"] | None = None
    search: LayerSearch | None = None
    tokens: Mapping[str, int] = field(default_factory=dict)

    def most_layers(self, count: int, stack: str | None = None) -> tuple[int, ...]:
        """Return the numbers of the most important layers, in order: those of the search, if there was one.

        Args:
            count: their number.
            stack: one of several lists of blocks; None is the one that locations without it mean.

        Raises:
            DistillError: a number of layers that was not searched, or a stack whose layers were not measured.
        """
        if self.search is not None and stack == self.search.stack:
            if count not in self.search.best:
                searched = ", ".join(map(str, sorted(self.search.best)))
                raise DistillError(
                    f"{count} layers were not searched for (searched: {searched}); search for them: "
                    f"importance(teacher, data, search={count})."
                )
            return self.search.best[count]
        values = {at.layer: value for at, value in self.layers.items() if at.stack == stack}
        if not values:
            known = ", ".join(sorted({f"stack={at.stack!r}" for at in self.layers})) or "none"
            raise DistillError(
                f"the layers of stack={stack!r} have no importance here (known: {known}); measure the model itself: "
                "importance(teacher, data)."
            )
        if not 1 <= count <= len(values):
            raise DistillError(f"{count} of {len(values)} layers cannot be kept; choose 1 to {len(values)}.")
        return tuple(most(torch.tensor(list(values.values())), count).tolist())

    def plot(self) -> Picture:
        """Draw the influence of the layers, and the importance of the units of each place from the largest down.

        Raises:
            DistillError: nothing was measured.
        """
        panels = {"heads": self.heads, "neurons": self.neurons, "dims": {} if self.dims is None else {DIMS: self.dims}}
        shown: dict[str, Any] = {name: found for name, found in panels.items() if found}
        if not shown and not self.layers:
            raise DistillError(
                "no part was measured, so there is nothing to draw; measure one: importance(model, data)."
            )
        count = len(shown) + bool(self.layers)
        figure = Picture(figsize=(3.2 * count, 3.0), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))
        axes = list(figure.subplots(1, count, squeeze=False)[0])
        if self.layers:
            names = [label(str(at)) for at in self.layers]
            first = axes.pop(0)
            first.barh(range(len(names)), list(self.layers.values()), color="#4477aa")
            first.set(title="layers", xlabel="block influence")
            first.set_yticks(range(len(names)), names, fontsize=7)
            first.invert_yaxis()
        for panel, (name, found) in zip(axes, shown.items(), strict=True):
            for number, values in enumerate(found.values()):
                shade = 0.2 + 0.7 * number / max(1, len(found) - 1)
                ranked = values.sort(descending=True).values.tolist()
                panel.plot(range(1, len(ranked) + 1), ranked, color=(0.27, 0.47, 0.67, shade), linewidth=1.2)
            panel.set(title=name, xlabel="rank", ylabel="importance", ylim=(0, None))
        return figure

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain data, by the text form of their locations."""
        search = None
        if self.search is not None:
            search = {
                "stack": self.search.stack,
                "criterion": self.search.criterion,
                "tried": [{"layers": kept, "value": value} for kept, value in self.search.tried.items()],
                "best": {str(count): kept for count, kept in self.search.best.items()},
            }
        return plain_data(
            {
                "layers": {str(at): value for at, value in self.layers.items()},
                "heads": {str(at): values for at, values in self.heads.items()},
                "neurons": {str(at): values for at, values in self.neurons.items()},
                "dims": self.dims,
                "search": search,
                "tokens": dict(self.tokens),
            }
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """Return a table with a row for each layer, head, neuron and dim; layers have the number 0.

        Raises:
            DistillError: pandas is not installed.
        """
        rows = [self._row("layer", at, 0, value) for at, value in self.layers.items()]
        for part, found in (("head", self.heads), ("neuron", self.neurons)):
            rows += [
                self._row(part, at, i, value) for at, each in found.items() for i, value in enumerate(each.tolist())
            ]
        dims = [] if self.dims is None else self.dims.tolist()
        rows += [self._row("dim", DIMS, i, value) for i, value in enumerate(dims)]
        return table_of(rows, "part", "place", "number")

    @staticmethod
    def _row(part: str, place: object, number: int, value: float) -> dict[str, Any]:
        return {"part": part, "place": str(place), "number": number, "importance": value}

    @printed
    def __repr__(self) -> str:
        lines = [f"Importance of {len(self.layers)} layers, measured on {sum(self.tokens.values())} tokens"]
        lines += [f"  {at!s:24} block influence {value:.4f}" for at, value in self.layers.items()]
        for name, found in (("heads", self.heads), ("neurons", self.neurons)):
            for at, values in found.items():
                order = values.argsort(descending=True, stable=True).tolist()
                few = ", ".join(map(str, order[:4])) + (", …" if len(order) > 4 else "")
                lines.append(f"  {at!s:24} {len(order)} {name}, most important {few}")
        if self.dims is not None:
            order = self.dims.argsort(descending=True, stable=True).tolist()
            lines.append(f"  {DIMS:24} {len(order)} dims, most important {', '.join(map(str, order[:4]))}, …")
        if self.search is not None:
            for count, kept in self.search.best.items():
                value = self.search.tried[kept]
                lines.append(
                    f"  best {count} layers: {', '.join(map(str, kept))} ({self.search.criterion} {value:.4f} nats, "
                    f"{len(self.search.tried)} sets tried)"
                )
        return "\n".join(lines)


def most(values: Float[Tensor, " units"], count: int, group: int = 1) -> Int[Tensor, " kept"]:
    """Return the numbers of the most important units, in order; of equal ones the first.

    Args:
        values: the importance of each.
        count: the number of units to keep, a multiple of `group`.
        group: as many neighbours are kept or left out together, by the sum of their importance.

    >>> most(torch.tensor([0.1, 0.9, 0.5, 0.2]), 2)
    tensor([1, 2])
    >>> most(torch.tensor([0.1, 0.9, 0.5, 0.2]), 2, group=2)
    tensor([0, 1])
    """
    sums = values.reshape(-1, group).sum(1)
    kept = sums.argsort(descending=True, stable=True)[: count // group].sort().values
    return (kept[:, None] * group + torch.arange(group)).reshape(-1)
