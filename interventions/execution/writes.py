"""Apply an operator to the vectors that a location and its positions select, and put them back.

With the activation x, the part P of a vector that the location names, and the positions T, a write computes
x′[t] = x[t] with P(x′[t]) = op(P(x[t]), P(s[t])) for t in T, where s is the activation of the source; other vectors and
other parts stay as they are.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from interventions.devices import moved
from interventions.errors import InterventionError
from interventions.execution import copies
from interventions.execution.fits import check_fits, check_labels, check_shapes, check_value
from interventions.execution.measures import Change, Missing, count_missing, without_graph
from interventions.execution.parts import (
    coordinates_of,
    is_masked,
    replace_part,
    select_entries,
    select_part,
    unmasked,
)
from interventions.execution.stamps import may_read
from interventions.execution.targets import (
    Targets,
    as_selection,
    check_positions,
    find_taken,
    find_targets,
    known_in,
    pads_none,
    reads_all,
    select_in_source,
    vectors_of,
)
from interventions.hooks.checkpointing import check_recomputable
from interventions.locations import Location
from interventions.models.axes import are_views, from_vectors, to_vectors
from interventions.models.calls import CallContext
from interventions.models.places import Place
from interventions.operators import Operator, Swap, Zero
from interventions.positions import Columns, Positions, Selection, column_of
from interventions.subspaces.frames import shared_frames

_COMPUTED = ("attention_scores", "logits")
"""The places whose writes are checked or masked."""


@dataclass(eq=False)
class Source:
    """The activations of a source run at a place.

    Attributes:
        states: the activation of each call of the place.
        mask: which of its tokens are real; None is all of them.
        location: the location at which they were read; None is the one written.
        place: its place.
    """

    states: list[Tensor]
    mask: Tensor | None = None
    location: Location | None = None
    place: Place | None = None


@dataclass(eq=False)
class Write:
    """One operator at one place: a tap function that returns the new activation, or None where nothing is written.

    Attributes:
        location: the location that is written.
        place: its place in the model.
        op: the operator.
        positions: the tokens that are written; None is all of them.
        source: the activations that the operator takes from, if it takes any.
        source_positions: the tokens taken from the source; None is those written.
        generator: the generator of the operator.
        steps: the steps of a generation in which tokens are written, from `interventions.steps.parse_steps`.
        firings: how often it wrote.
        calls: how often its place ran.
        change: the size of what it changed, measured for a user who can read it; None where no user can.
        missing: the NaN in what it took from its source, counted on the device.
    """

    location: Location
    place: Place
    op: Operator
    positions: Positions = None
    source: Source | None = None
    source_positions: Positions = None
    generator: torch.Generator | None = None
    steps: slice | frozenset[int] | None = None
    firings: int = 0
    calls: int = 0
    change: Change | None = field(default=None, repr=False)
    missing: Missing = field(default_factory=Missing, repr=False)
    _last_call: object = field(default=None, repr=False)
    _turn: int = field(default=0, repr=False)

    def __call__(self, state: Tensor, context: CallContext) -> Tensor | None:
        check_recomputable(self.place.module, context)
        if not context.recomputing:
            self._count(context)
        new = self._copy(state, context)
        if new is None:
            with nullcontext() if self.location.subspace is None else shared_frames():
                new = self._compute(state, context)
        if new is not None and not context.recomputing:
            self.firings += 1
        return new

    def _count(self, context: CallContext) -> None:
        """Count the calls of the place, in all and within one call of the model."""
        self.calls += 1
        running = context.call or context.generation
        self._turn = self._turn + 1 if running is not None and running is self._last_call else 0
        self._last_call = running

    @property
    def _copies(self) -> bool:
        """True for a swap or zero that may be a copy of entries, by all that does not depend on the activation."""
        if self.location.subspace is not None or self.place.io in _COMPUTED or self.place.operations:
            return False
        if type(self.op) is Swap:
            return self.source is not None and self.source.location is None
        return type(self.op) is Zero

    def _copy(self, state: Tensor, context: CallContext) -> Tensor | None:
        """Return the new activation where its entries are copied, without an index; None where it is to be computed.

        That is a swap or zero of the same tokens in each example. What does not fit is left to `_compute`, which says
        why.
        """
        if not self._copies or not copies.is_plain(state):
            return None
        location, place, held = self.location, self.place, None
        if type(self.op) is Swap and self.source is not None:
            held = self._state(self.source, context)
            if not copies.is_like(held, state):
                return None
        is_whole = self.positions is None and self.steps is None and place.io not in ("key", "value")
        if is_whole and location.heads is None and location.dims is None:
            return self._copy_whole(state, held, context)
        axes = place.axes_of(state)
        if state.ndim < 3 or not are_views(axes):
            return None
        vectors, others = to_vectors(state, axes), None if held is None else to_vectors(held, axes)
        pieces, cuts = self._pieces(vectors, others, context), copies.cuts_of(location, vectors)
        if pieces is None or cuts is None:
            return None
        new = state.clone()
        if new.stride() != state.stride():
            return None  # a view with gaps, whose layout the operations keep or leave each in its way
        written, old = to_vectors(new, axes), vectors
        if cuts:
            written, old = copies.narrowed(written, cuts), copies.narrowed(vectors, cuts)
            others = None if others is None else copies.narrowed(others, cuts)
        for to, taken in pieces:
            value = None if others is None else copies.read(others, taken)
            copies.put(written, to, value)
            self._note(copies.read(old, to) if self._measures(context) else None, value)
        return new

    def _measures(self, context: CallContext) -> bool:
        """Return whether what this call of the place changes is measured."""
        return self.change is not None and not context.recomputing

    def _note(self, before: Tensor | None, value: Tensor | None) -> None:
        """Check what was copied, and measure what it changes.

        Args:
            before: the activation before, where the change is measured.
            value: the entries of the source; None for zeros.
        """
        shows_numbers = before is not None and self.change is not None and self.change.replace(before, value)
        if value is not None and not shows_numbers:
            self._check_numbers(value)

    def _copy_whole(self, state: Tensor, held: Tensor | None, context: CallContext) -> Tensor | None:
        """Return the new activation where all of it is replaced; None where the source does not fit."""
        if held is not None and (held.shape != state.shape or self.source_positions is not None):
            return None
        new = copies.whole(state, held)
        self._note(state if self._measures(context) else None, held)
        return new

    def _pieces(self, vectors: Tensor, others: Tensor | None, context: CallContext) -> tuple[copies.Piece, ...] | None:
        """Return the tokens that are copied; None where none is written, or those of the source do not fit."""
        if others is not None and self.positions is not None and vectors.shape[2:] != others.shape[2:]:
            return None
        if (token := self._token(vectors, others, context)) is not None:
            return (token,)
        targets = self._targets(vectors, context)
        to = taken = targets.to
        if targets.is_nothing:
            return None
        if others is not None and self.positions is not None:
            taken = self._taken(others, targets, len(vectors), context)
        elif others is not None and (others.shape != vectors.shape or self.source_positions is not None):
            return None
        return copies.pieces_of(to, taken, vectors.shape[1], known_in(context))

    def _token(self, vectors: Tensor, others: Tensor | None, context: CallContext) -> copies.Piece | None:
        """Return the one token that is copied, where all tokens count in base and source; None elsewhere."""
        if type(self.positions) is not int or self.steps is not None or not reads_all(vectors, context, self.place):
            return None
        to = taken = column_of(self.positions, vectors.shape[1])
        if others is not None and self.source is not None:
            if others.shape[0] != vectors.shape[0] or not pads_none(self.source.mask, others, known_in(context)):
                return None
            taken = column_of(
                self.positions if self.source_positions is None else self.source_positions, others.shape[1]
            )
        return None if to is None or taken is None else (slice(to, to + 1), slice(taken, taken + 1))

    def _targets(self, vectors: Tensor, context: CallContext) -> Targets:
        """Return the vectors to write."""
        return find_targets(
            vectors,
            context,
            location=self.location,
            place=self.place,
            positions=self.positions,
            steps=self.steps,
            of_source=() if self.source is None else (self.source.mask, self.source_positions),
        )

    def _compute(self, state: Tensor, context: CallContext) -> Tensor | None:
        """Return the new activation; None where no token is written."""
        check_labels(self.place, context)
        if self.location.heads is not None or self.positions is not None or self.steps is not None:
            self.place.check_axes(state, self.location)
        axes = self.place.axes_of(state)
        vectors = to_vectors(state, axes)
        targets = self._targets(vectors, context)
        if targets.is_nothing:
            return None
        selected = vectors_of(vectors, targets.to)
        base = select_part(selected, self.location)
        source = self._source_part(vectors, targets, axes, context)
        versions = _versions(base, source)
        value = self.op(base, source, self.generator)
        if _versions(base, source) != versions:
            raise InterventionError(
                f"operator {self.op!r} wrote into what it was given at {self.location}, which is the run's own; return "
                "a new tensor, e.g. base * 2 and not base.mul_(2)."
            )
        check_value(value, base, self.op, self.location)
        if self.place.io == "attention_scores" and self.location.subspace is None:
            value = torch.where(is_masked(base), base, value)  # masked keys stay masked
        merged = replace_part(selected, value, self.location)
        if self.change is not None and not context.recomputing:
            self._measure(self.change, without_graph(selected), without_graph(merged))
        if targets.to is not None:
            to = as_selection(targets.to).to(vectors.device)
            merged = vectors.index_put((to.rows, to.columns), merged)
        elif (
            merged is state
            or (self.source is not None and any(copies.share_memory(merged, held) for held in self.source.states))
            or merged._is_view()
        ):
            merged = merged.clone()  # the model may continue in place, and must not write into a source or a view
        return from_vectors(merged, axes, state)

    def _measure(self, change: Change, before: Tensor, after: Tensor) -> None:
        """Add what one call changes, without the masked keys of attention scores.

        Args:
            change: the sum.
            before, after: the written vectors, without their graph: a recomputation under gradient checkpointing, which
                does not measure, saves as many tensors.
        """
        before, after = select_entries(before, self.location), select_entries(after, self.location)
        if self.place.io == "attention_scores":
            before, after = unmasked(before), unmasked(after)
        change.add(before, after)

    def _source_part(self, vectors: Tensor, targets: Targets, axes: str, context: CallContext) -> Tensor | None:
        """Return the part of the source that the operator takes, one vector for each written one; None without one."""
        if self.source is None:
            return None
        state, place, read = self._state(self.source, context), self.source.place, self.source.location
        if read is not None and place is not None and read.heads is not None:
            place.check_axes(state, read)
        source = to_vectors(state, axes if place is None else place.axes_of(state))
        if source.dtype != vectors.dtype:
            raise InterventionError(
                f"{self.location} is {vectors.dtype} in the base run and {source.dtype} in the source run; "
                "run both under the same autocast and precision."
            )
        source = moved(source, vectors.device)
        if read is not None:  # the entries read need not be those written
            vectors, source = select_entries(vectors, self.location), select_entries(source, read)
            check_fits(vectors, self.location, self.place.io, source, read)
            if read.subspace is not None:  # coordinates of one size fit, whatever the widths of the spaces
                vectors = vectors[..., :1].expand(*vectors.shape[:-1], source.shape[-1])
        if getattr(self.op, "pools_source", False):
            taken = self._pool(source, self.source.mask, context)
        else:
            taken = self._align(vectors, source, targets, context)
        part = select_part(taken, self.location) if read is None else coordinates_of(taken, read)
        self._check_numbers(part)
        return part

    def _align(self, vectors: Tensor, source: Tensor, targets: Targets, context: CallContext) -> Tensor:
        """Return the vectors of the source in the order of the written ones, `[n, …, dims]` with positions."""
        names: Any = dict(location=self.location, io=self.place.io, positions=self.positions)
        if self.positions is None:
            if self.source_positions is not None:
                raise InterventionError(
                    "source_positions was given without positions; say where to write: positions=…."
                )
            check_shapes(vectors, source, targets.to, context, **names)
            return vectors_of(source, targets.to)
        if vectors.shape[2:] != source.shape[2:]:
            check_shapes(vectors, source, targets.to, context, **names)
        return vectors_of(source, self._taken(source, targets, len(vectors), context))

    def _taken(self, source: Tensor, targets: Targets, batch: int, context: CallContext) -> Selection | Columns:
        """Return the vectors of the source in the order of the written ones."""
        return find_taken(
            source,
            known_in(context),
            (targets, batch),
            location=self.location,
            place=self._source_place,
            mask=None if self.source is None else self.source.mask,
            positions=self.positions if self.source_positions is None else self.source_positions,
        )

    def _pool(self, source: Tensor, mask: Tensor | None, context: CallContext) -> Tensor:
        """Return the vectors of all examples and positions of the source, `[n, …, dims]`."""
        positions = self.source_positions if self.source_positions is not None else self.positions
        if positions is None and source.ndim < 3:
            return source
        if positions is None and mask is None:
            return rearrange(source, "b t ... -> (b t) ...")
        check_positions(source, self.location)
        chosen = slice(None) if positions is None else positions
        known = known_in(context)
        return vectors_of(
            source, select_in_source(source, known, place=self._source_place, mask=mask, positions=chosen)
        )

    @property
    def _source_place(self) -> Place:
        """The place at which the source was read."""
        return self.place if self.source is None or self.source.place is None else self.source.place

    def _check_numbers(self, part: Tensor) -> None:
        """Raise InterventionError for a source with NaN; on another device `check_sources` does it later."""
        if may_read(part) and (wrong := self.missing.look(part)):
            raise InterventionError(self._missing_text(wrong, part.numel()))

    def _missing_text(self, wrong: int, entries: int) -> str:
        return (
            f"the source has NaN at {self.location} in {wrong} of {entries} entries; look at the source run, or choose "
            "other positions with source_positions=…."
        )

    def _state(self, source: Source, context: CallContext) -> Tensor:
        """Return the activation of the source for this call of the place."""
        if getattr(self.op, "pools_source", False) and len(source.states) > 1:
            return torch.cat(source.states)
        if self._turn >= len(source.states) and not getattr(self.op, "pools_source", False):
            raise InterventionError(
                f"{self.location} ran {self._turn + 1} times in one call of the model and its source holds "
                f"{len(source.states)} activation{'s' * (len(source.states) > 1)}; give a whole run: "
                f"source=run(model, inputs, at=[{self.location!r}]), or name a module that runs once."
            )
        if context.recomputing and len(source.states) > 1:
            raise InterventionError(
                f"{self.location} runs {len(source.states)} times in a call of the model, which gradient checkpointing "
                "repeats in another order; turn checkpointing off, or name a module that runs once."
            )
        return source.states[0 if len(source.states) == 1 else self._turn]


def check_sources(writes: Sequence[Write]) -> None:
    """Raise InterventionError for a source with NaN on another device than the host, which is waited for once."""
    for write, wrong in zip(writes, count_missing([write.missing for write in writes]), strict=True):
        if wrong:
            raise InterventionError(write._missing_text(wrong, write.missing.entries))


def _versions(*tensors: Tensor | None) -> list[int]:
    """Return the versions of tensors, which count the writes into them."""
    return [tensor._version for tensor in tensors if tensor is not None and not tensor.is_inference()]
