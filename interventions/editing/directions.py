"""`direction`: the direction in which activations on two sets of inputs differ, to steer along it or to ablate it.

The difference of means is v = mean(h⁺) − mean(h⁻) (Marks, Tegmark 2023, arXiv:2310.06824; Arditi et al. 2024,
arXiv:2406.11717, section 2.3); the first principal component is that of all vectors of both sets, scaled to v (Zou et
al. 2023, arXiv:2310.01405). With u = v / |v|, adding writes h + s v, ablating h − (uᵀh) u, clamping h + (a − uᵀh) u.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interventions.analysis.data_batches import batches_of
from interventions.analysis.result import Result, data_frame, plain_data
from interventions.analysis.vectors import check_width, vectors_of
from interventions.arguments import checked
from interventions.endings import without_gradients
from interventions.errors import InterventionError
from interventions.execution.requests import Handle
from interventions.interchanges import intervene
from interventions.locations import Location, as_location
from interventions.models.architectures import architecture
from interventions.models.wrappers import Model
from interventions.names import printed, shown
from interventions.operators import Add, Mean, Operator, Zero
from interventions.positions import Positions
from interventions.runs import check_eval, run_to
from interventions.subspaces import Rotation

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]


@dataclass(frozen=True, eq=False)
class Direction(Result):
    """A direction of the activations at a location, and where two sets of inputs lie along it.

    Its methods return {location: operator}, which `intervene`, `interchange` and `bake` take.

    Attributes:
        location: where it was found.
        vector: `[dims]`; for a difference of means, the mean of the positive minus that of the negative vectors.
        positive, negative: `[n]`, the coordinate uᵀh of each vector of the two sets.
    """

    location: Location
    vector: Float[Tensor, " dims"]
    positive: Float[Tensor, " positive"]
    negative: Float[Tensor, " negative"]

    @property
    def unit(self) -> Float[Tensor, " dims"]:
        """The direction with length 1."""
        return self.vector / self.vector.norm()

    def add(self, scale: float = 1.0) -> dict[Location, Operator]:
        """Return the steering that adds the vector, times a scale; a negative one steers the other way."""
        return {self.location: Add(self.vector, scale)}

    def ablate(self) -> dict[Location, Operator]:
        """Return the ablation that leaves nothing along the direction."""
        return {self._along(self.location): Zero()}

    @checked
    def clamp(self, value: float) -> dict[Location, Operator]:
        """Return the write after which the coordinate along the direction is `value`, on the scale of `positive`.

        Args:
            value: the coordinate.

        Raises:
            InterventionError: a coordinate that is not finite.
        """
        if not isfinite(value):
            raise InterventionError(
                f"clamp(value={value}) is not finite; write e.g. clamp({float(self.positive.mean()):.3g})."
            )
        at = self._along(self.location)
        sign = (
            at.subspace.directions.detach().to(self.unit)[:, 0] @ self.unit
        ).sign()  # a frame may point the other way
        return {at: Mean(value * sign[None])}

    def _along(self, location: Location) -> Location:
        """Return the coordinate along the direction at a location."""
        return replace(location, subspace=Rotation.from_directions(self.vector[:, None].detach()))

    @property
    def separation(self) -> float:
        """The share of (positive, negative) pairs in which the positive lies higher: 1 separates, 0.5 tells nothing."""
        higher = self.positive[:, None] - self.negative
        return float(((higher > 0).double() + 0.5 * (higher == 0).double()).mean())

    def plot(self) -> Any:
        """Draw how both sets lie along the direction, as two histograms."""
        from interventions.analysis.plots import Picture  # matplotlib takes half a second

        figure = Picture(figsize=(5, 2.4), dpi=110, layout="constrained")
        axes = figure.subplots()
        both = torch.cat([self.positive, self.negative]).cpu().double()
        low, high = float(both.min()), float(both.max())
        edges = torch.linspace(low, high if high > low else low + 1, 21).tolist()
        for name, values, color in (("positive", self.positive, "C3"), ("negative", self.negative, "C0")):
            axes.hist(values.cpu().double().tolist(), bins=edges, alpha=0.6, color=color, label=name)
        axes.set(xlabel=f"coordinate along the direction at {self.location}", ylabel="vectors")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        return figure

    def to_dict(self) -> dict[str, Any]:
        """Return the direction and the coordinates of both sets as plain data."""
        return {
            "location": str(self.location),
            "vector": plain_data(self.vector),
            "separation": self.separation,
            "positive": plain_data(self.positive),
            "negative": plain_data(self.negative),
        }

    def to_pandas(self) -> "pandas.DataFrame":
        """Return a table with a row for each vector: its set, its number there, and its coordinate.

        Raises:
            InterventionError: pandas is not installed.
        """
        sets = {"positive": self.positive, "negative": self.negative}
        rows = (
            {"set": name, "number": number, "coordinate": value}
            for name, values in sets.items()
            for number, value in enumerate(values.tolist())
        )
        return data_frame(rows, "set", "number")

    @printed
    def __repr__(self) -> str:
        sizes = " and ".join(
            f"{len(values)} {name} vectors, mean {float(values.mean()):.4g}"
            for name, values in (("positive", self.positive), ("negative", self.negative))
        )
        return (
            f"direction at {self.location}, {len(self.vector)} dims, length {float(self.vector.norm()):.4g}: {sizes}; "
            f"separation {self.separation:.2f}"
        )


@checked
def direction(
    model: Model,
    positive: object,
    negative: object,
    at: Location | str,
    *,
    positions: Positions = -1,
    method: Literal["mean", "pca"] = "mean",
    batch_size: int | None = None,
) -> Direction:
    """Return the direction in which activations on two sets of inputs differ: a steering vector.

    Arditi et al. 2024 (arXiv:2406.11717), section 2.3, for the difference of means.

    Args:
        model: a torch model in eval mode, or one of nnsight.
        positive: inputs with the property, batch by batch, or rows, as for `mean_of`.
        negative: inputs without it, in the same forms.
        at: the location, whose activations are vectors; at a site with heads, one head.
        positions: which tokens, counted over real tokens; −1 is the last of each example, None all of them.
        method: "mean" is the difference of means; "pca" the first principal component of all vectors of both sets,
            with the length and the sense of the difference of means along it.
        batch_size: how many rows are read at a time, as for `mean_of`.

    Returns:
        A Direction, whose methods `add`, `ablate` and `clamp` give interventions.

    Raises:
        InterventionError: a set without vectors; a location of several heads, or without a fixed width; sets with one
            mean; a model in train mode.

    >>> net = torch.nn.Sequential(torch.nn.Identity(), torch.nn.ReLU()).eval()
    >>> found = direction(net, [torch.tensor([[3.0, 1.0]])], [torch.tensor([[1.0, 1.0]])], "module:0")
    >>> found.vector.tolist(), found.separation
    ([2.0, 0.0], 1.0)
    """
    check_eval(model)
    location = as_location(at)
    if location.subspace is not None:
        raise InterventionError(f"{location} is a subspace, whose coordinates have no direction in it; leave it out.")
    check_width(architecture(model), [location], "direction")
    high, low = (
        _vectors(model, location, data, name, positions=positions, batch_size=batch_size)
        for data, name in ((positive, "positive"), (negative, "negative"))
    )
    difference = high.double().mean(0) - low.double().mean(0)
    if not difference.norm() > 0:
        raise InterventionError(
            f"positive and negative inputs have the same mean at {location}, so there is no direction between them; "
            "name a later location, or other positions=…."
        )
    vector = difference
    if method == "pca":
        every = torch.cat([high, low]).double()
        component = torch.linalg.svd(every - every.mean(0), full_matrices=False)[2][0]
        vector = (component @ difference) * component
        if not vector.norm() > 1e-9 * difference.norm():
            raise InterventionError(
                f"the first principal component at {location} does not tell the two sets apart: their means do not "
                'differ along it; write method="mean".'
            )
    unit = vector / vector.norm()
    coordinates = [(each.double() @ unit).to(each.dtype) for each in (high, low)]
    return Direction(location, vector.to(high.dtype), *coordinates)


def _vectors(
    model: Model, location: Location, data: Any, name: str, *, positions: Positions, batch_size: int | None
) -> Tensor:
    """Return the vectors of a set of inputs at a location, `[n, dims]`."""
    found = []
    with without_gradients():
        for batch in batches_of(model, data, batch_size, name):
            values = vectors_of(run_to(model, batch.inputs(), [location]), location, positions).values
            if values.ndim == 3 and values.shape[1] != 1:
                raise InterventionError(
                    f"{location} has {values.shape[1]} heads, each with vectors of its own; name one: "
                    f"{replace(location, heads=range(1))!r}."
                )
            found.append(values.reshape(len(values), values.shape[-1]))
    if not sum(map(len, found)):
        raise InterventionError(f"{name} holds no vectors; pass batches of inputs: [inputs].")
    return torch.cat(found)


@checked
def everywhere(model: Model, along: Any) -> dict[Location, Operator]:
    """Return the ablation of a direction in all that is written to the residual stream of a model.

    These are its embedding, and the outputs of the attention and of the feed-forward part of every block, so that no
    part of the model can write along the direction (Arditi et al. 2024, arXiv:2406.11717, section 2.4).

    Args:
        model: the model.
        along: a direction of the residual stream.

    Raises:
        InterventionError: a direction of another width than the residual stream; blocks in which these sites were not
            found.
    """
    if not isinstance(along, Direction):
        raise InterventionError(
            f"along={shown(along)} is no direction; pass direction(model, positive, negative, Location(3))."
        )
    found = architecture(model)
    stack = found.stack_of(Location(0, stack=along.location.stack))
    sites = ("attention_output", "mlp_output")
    places = [Location(layer, site, stack=along.location.stack) for layer in range(len(stack.blocks)) for site in sites]
    places = [Location(site="embedding", stack=along.location.stack), *places]
    for place in places:
        found.place(place)
    return {along._along(place): Zero() for place in places}


@contextmanager
def ablate_direction(model: Model, along: Any) -> Iterator[Handle]:
    """Ablate a direction in all that is written to the residual stream, in every call inside the block.

    Arditi et al. 2024 (arXiv:2406.11717), section 2.4. `bake(model, everywhere(model, along), inputs)` writes the same
    into the weights of a copy, where the blocks add to the residual stream before any norm.

    Args:
        model: a torch model, or one of nnsight; its hooks and weights stay as they are.
        along: the direction, of the residual stream.

    Yields:
        The Handle of `intervene`.

    Raises:
        InterventionError: as `everywhere` and `intervene`.
    """
    with intervene(model, everywhere(model, along)) as handle:
        yield handle
