"""How an operator is applied to the vectors that a location and its positions select, and how they are put back."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from interventions.architectures import Place
from interventions.axes import axes_of, dims_axis, from_vectors, to_vectors
from interventions.errors import InterventionError
from interventions.hooks import Scope, check_recomputable
from interventions.locations import Dims, Location
from interventions.operators import Operator
from interventions.positions import Positions, Selection, select


@dataclass(frozen=True, eq=False)
class Source:
    """The state that a source run has at a place, and which of its tokens are real (None: all)."""

    state: Tensor
    mask: Tensor | None


@dataclass(eq=False)
class Write:
    """One operator at one place: a tap function that returns the new state.

    Attributes:
        firings: how often it ran.
        changed, norm: sums of squares of what it changed and of what was there, for the relative size of the change.
    """

    location: Location
    place: Place
    op: Operator
    positions: Positions = None
    source: Source | None = None
    source_positions: Positions = None
    generator: torch.Generator | None = None
    firings: int = 0
    changed: Tensor | None = field(default=None, repr=False)
    norm: Tensor | None = field(default=None, repr=False)
    _last: int = field(default=-1, repr=False)

    def __call__(self, state: Tensor, scope: Scope) -> Tensor:
        check_recomputable(self.place.module, scope)
        mask = None if self.positions is None else mask_of(scope, self)
        new = self._written(state, mask)
        if not scope.recomputing:
            self._check_once(scope)
            self.firings += 1
            self._measure(state, new)
        return new

    @property
    def change(self) -> float:
        """Root mean square of the change, relative to that of what was there; 0 if it never ran."""
        return (
            0.0
            if self.changed is None or self.norm is None
            else float((self.changed / self.norm.clamp_min(1e-30)).sqrt())
        )

    def _measure(self, state: Tensor, new: Tensor) -> None:
        with torch.no_grad():
            changed, norm = (new - state).float().square().sum(), state.float().square().sum()
        self.changed = changed if self.changed is None else self.changed + changed
        self.norm = norm if self.norm is None else self.norm + norm

    def _written(self, state: Tensor, mask: Tensor | None) -> Tensor:
        axes = axes_of(self.place.module, state)
        vectors = to_vectors(state, axes)
        chosen = None if self.positions is None else self._select(self.positions, vectors, mask)
        base = _part(_at(vectors, chosen), self.location)
        value = self.op(base, self._source_part(vectors, chosen, axes), self.generator)
        self._check_value(value, base)
        merged = _merge(_at(vectors, chosen), value, self.location.dims)
        if chosen is not None:
            merged = vectors.index_put((chosen.rows, chosen.columns), merged)
        elif merged is state or (self.source is not None and _shares(merged, self.source.state)) or merged._is_view():
            merged = merged.clone()  # the model may go on in place, and must not write into a source or a view
        return from_vectors(merged, axes, state)

    def _source_part(self, vectors: Tensor, chosen: Selection | None, axes: str) -> Tensor | None:
        if self.source is None:
            return None
        source = to_vectors(self.source.state, axes)
        if source.dtype != vectors.dtype:
            raise InterventionError(
                f"{self.location} is {vectors.dtype} in the base run and {source.dtype} in the source run; "
                "run both under the same autocast and precision."
            )
        source = source.to(vectors.device)
        if getattr(self.op, "pools_source", False):
            return _part(self._pooled(source, self.source.mask), self.location)
        positions = self.positions if self.source_positions is None else self.source_positions
        if chosen is None and positions is None:
            self._check_shapes(vectors, source)
            return _part(source, self.location)
        if chosen is None:
            raise InterventionError("source_positions was given without positions; say where to write: positions=….")
        selected = self._select(positions, source, self.source.mask)
        self._check_counts(chosen, selected, len(vectors), len(source))
        return _part(_at(source, selected), self.location)

    def _pooled(self, source: Tensor, mask: Tensor | None) -> Tensor:
        positions = self.source_positions if self.source_positions is not None else self.positions
        if positions is None and mask is not None and source.ndim == 3:
            return source[_fitting(mask, source, self.location)]
        return _at(source, None if positions is None else self._select(positions, source, mask))

    def _select(self, positions: Positions, vectors: Tensor, mask: Tensor | None) -> Selection:
        if vectors.ndim < 3:
            raise InterventionError(
                f"{self.location} has no positions: its shape is {list(vectors.shape)}, [batch, dims]; leave "
                "positions out."
            )
        if mask is None:
            real = torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)
        else:
            real = _fitting(mask, vectors, self.location)
        return select(positions, real)

    def _check_shapes(self, vectors: Tensor, source: Tensor) -> None:
        if source.shape != vectors.shape:
            raise InterventionError(
                f"{self.location} has shape {list(vectors.shape)} in the base run and {list(source.shape)} in the "
                "source run; pad both batches to one length, or say which tokens: positions=… and source_positions=…."
            )

    def _check_counts(self, chosen: Selection, selected: Selection, batch: int, source_batch: int) -> None:
        if source_batch != batch:
            raise InterventionError(
                f"the base has {batch} examples and the source of {self.location} {source_batch}; give one source an "
                "example."
            )
        counts, source_counts = chosen.counts(batch), selected.counts(batch)
        if not torch.equal(counts, source_counts):
            row = int((counts != source_counts).nonzero()[0])
            raise InterventionError(
                f"positions selects {int(counts[row])} tokens of base row {row} and {int(source_counts[row])} of its "
                "source; give source_positions=… with as many, e.g. a list of lists."
            )

    def _check_once(self, scope: Scope) -> None:
        again = scope.call is not None and scope.call.number == self._last
        self._last = -1 if scope.call is None else scope.call.number
        if again and self.source is not None and not getattr(self.op, "pools_source", False):
            raise InterventionError(
                f"{self.location} ran twice in one call of the model and its source holds one activation; name a "
                "module that runs once, see describe(model)."
            )

    def _check_value(self, value: object, base: Tensor) -> None:
        if not isinstance(value, Tensor) or value.shape != base.shape or value.dtype != base.dtype:
            got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InterventionError(
                f"operator {self.op!r} returned {got} for {base.dtype} {list(base.shape)} at {self.location}; return "
                "a tensor like its first argument, e.g. value.expand_as(base).to(base.dtype)."
            )


def mask_of(scope: Scope, write: Write) -> Tensor | None:
    """The padding mask that the model was called with."""
    if scope.call is None:
        raise InterventionError(
            f"{write.location} ran outside a call of the model itself, so padding is unknown; call the model that was "
            "passed to intervene, or leave positions out."
        )
    if scope.call.past:
        raise InterventionError(
            f"positions at {write.location} cannot be counted: the cache holds the first {scope.call.past} tokens; "
            "generate with use_cache=False, or leave positions out to write every token."
        )
    mask = scope.call.arguments.get(write.place.mask)
    return mask if isinstance(mask, Tensor) else None


def part_of(state: Tensor, location: Location, place: Place) -> Tensor:
    """The dims of `state` that `location` names, on the axis where they are."""
    if location.dims is None:
        return state
    axis = dims_axis(axes_of(place.module, state))
    _check_dims(location, location.dims, state.shape[axis])
    return state.index_select(axis, torch.tensor(location.dims, device=state.device))


def _fitting(mask: Tensor, vectors: Tensor, location: Location) -> Tensor:
    if mask.shape != vectors.shape[:2]:
        raise InterventionError(
            f"the attention mask has shape {list(mask.shape)} and {location} has [batch, token] = "
            f"{list(vectors.shape[:2])}, so positions cannot be counted over real tokens; leave positions out, or "
            "pass a [batch, token] mask."
        )
    return mask.to(vectors.device).bool()


def _at(vectors: Tensor, chosen: Selection | None) -> Tensor:
    return vectors if chosen is None else vectors[chosen.rows, chosen.columns]


def _part(vectors: Tensor, location: Location) -> Tensor:
    if location.dims is None:
        return vectors
    _check_dims(location, location.dims, vectors.shape[-1])
    return vectors[..., _slice(location.dims) if isinstance(location.dims, range) else list(location.dims)]


def _merge(vectors: Tensor, value: Tensor, dims: Dims | None) -> Tensor:
    if dims is None:
        return value
    if isinstance(dims, range):
        return torch.slice_scatter(vectors, value, -1, dims.start, dims.stop, dims.step)
    return vectors.index_copy(-1, torch.tensor(dims, device=vectors.device), value)


def _slice(dims: range) -> slice:
    return slice(dims.start, dims.stop, dims.step)


def _check_dims(location: Location, dims: Dims, width: int) -> None:
    if max(dims) >= width:
        raise InterventionError(
            f"{location} names dim {max(dims)} and the width there is {width}; write dims=range(0, {width})."
        )


def _shares(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
