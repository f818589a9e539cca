"""How an operator is applied to the vectors that a location and its positions select, and how they are put back."""

from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

from interventions.endings import without_gradients
from interventions.errors import InterventionError
from interventions.execution.parts import coordinates_of, replace_part, select_entries, select_part
from interventions.hooks.hooks import Scope, check_recomputable
from interventions.locations import Location
from interventions.models.axes import from_vectors, to_vectors
from interventions.models.calls import Call
from interventions.models.places import Place
from interventions.operators import Operator
from interventions.positions import Positions, Selection, select
from interventions.steps import Span, chosen, everything, span_of
from interventions.subspaces.frames import shared_frames


@dataclass(eq=False)
class Source:
    """The states that a source run has at a place, call by call, and which of its tokens are real (None: all).

    Attributes:
        location, place: where they were read; None is where they are written.
    """

    states: list[Tensor]
    mask: Tensor | None = None
    location: Location | None = None
    place: Place | None = None


@dataclass(frozen=True, eq=False)
class Targets:
    """What is written in one call.

    Attributes:
        to: the vectors of the activation; None is all of them.
        named: for each step, all that the positions name then and which of it is written now. A source is lined up
            with that.
    """

    to: Selection | None
    named: list[tuple[Selection, Tensor]]

    @property
    def is_nothing(self) -> bool:
        return self.to is not None and not len(self.to.rows)


@dataclass(eq=False)
class Write:
    """One operator at one place: a tap function that returns the new state, or None where nothing is to be written.

    Attributes:
        steps: which steps of a generation, as `interventions.steps.parse_steps` gives them.
        firings: how often it wrote.
        calls: how often its place ran.
        changed, norm: sums of squares of the change and of what was there, over what is written alone.
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
    changed: Tensor | None = field(default=None, repr=False)
    norm: Tensor | None = field(default=None, repr=False)
    _last: object = field(default=None, repr=False)
    _turn: int = field(default=0, repr=False)

    def __call__(self, state: Tensor, scope: Scope) -> Tensor | None:
        check_recomputable(self.place.module, scope)
        if not scope.recomputing:
            self._count(scope)
        with shared_frames():
            new = self._written(state, scope)
        if new is not None and not scope.recomputing:
            self.firings += 1
        return new

    def _count(self, scope: Scope) -> None:
        """Note which call of the place this is, of those in one call of the model."""
        self.calls += 1
        going_on = scope.call or scope.generation
        self._turn = self._turn + 1 if going_on is not None and going_on is self._last else 0
        self._last = going_on

    @property
    def change(self) -> float:
        """Root mean square of the change, relative to that of what was there; 0 if it never ran."""
        return (
            0.0
            if self.changed is None or self.norm is None
            else float((self.changed / self.norm.clamp_min(1e-30)).sqrt())
        )

    def _measure(self, state: Tensor, new: Tensor) -> None:
        with without_gradients():
            before, after = (_unmasked(each) if self.place.io == "attention_scores" else each for each in (state, new))
            changed, norm = (after - before).float().square().sum(), before.float().square().sum()
        self.changed = changed if self.changed is None else self.changed + changed
        self.norm = norm if self.norm is None else self.norm + norm

    def _written(self, state: Tensor, scope: Scope) -> Tensor | None:
        self._check_labels(scope)
        if self.location.heads is not None or self.positions is not None or self.steps is not None:
            self.place.check_axes(state, self.location)
        axes = self.place.axes_of(state)
        vectors = to_vectors(state, axes)
        targets = self._targets(vectors, scope)
        if targets.is_nothing:
            return None
        there = _at(vectors, targets.to)
        base = select_part(there, self.location)
        source = self._source_part(vectors, targets, axes, scope)
        versions = _versions(base, source)
        value = self.op(base, source, self.generator)
        if _versions(base, source) != versions:
            raise InterventionError(
                f"operator {self.op!r} wrote into what it was given at {self.location}, which is the run's own; return "
                "a new tensor, e.g. base * 2 and not base.mul_(2)."
            )
        self._check_value(value, base)
        if self.place.io == "attention_scores" and self.location.subspace is None:
            value = torch.where(_is_masked(base), base, value)  # nothing looks at what it may not see
        merged = replace_part(there, value, self.location)
        if not scope.recomputing:
            self._measure(select_entries(there, self.location), select_entries(merged, self.location))
        if targets.to is not None:
            to = targets.to.to(vectors.device)
            merged = vectors.index_put((to.rows, to.columns), merged)
        elif (
            merged is state
            or (self.source is not None and any(_shares(merged, held) for held in self.source.states))
            or merged._is_view()
        ):
            merged = merged.clone()  # the model may go on in place, and must not write into a source or a view
        return from_vectors(merged, axes, state)

    def _targets(self, vectors: Tensor, scope: Scope) -> Targets:
        is_key = self.place.io in ("key", "value") and scope.call is not None and scope.call.past > 0
        if is_key and self.place.side.encodes:
            return Targets(Selection(*torch.zeros(2, 0, dtype=torch.long)), [])  # written before it was cached
        if self.positions is None and self.steps is None and not is_key:
            return Targets(None, [])
        if self.positions is not None:
            self._check_positions(vectors)
        elif vectors.ndim < 3:
            return Targets(None, [])  # without positions there are no steps
        span = self._span(vectors, scope)
        if self.positions is None:
            return Targets(everything(span, self.steps), [])
        parts = chosen(span, self.steps, self.positions)
        rows = [named.rows[new] for named, new in parts]
        columns = [named.columns[new] - span.offset for named, new in parts]
        none = torch.zeros(0, dtype=torch.long)
        return Targets(Selection(torch.cat([none, *rows]), torch.cat([none, *columns])), parts)

    def _span(self, vectors: Tensor, scope: Scope) -> Span:
        call = scope.call
        generation = scope.generation if call is None else call.generation
        apart = self.place.side.encodes and not self.place.mask  # nothing of the call belongs to it
        if call is None and generation is None and not apart:
            raise InterventionError(
                f"{self.location} ran outside a call of the model itself, so padding is unknown; call the model that "
                "was passed to intervene, or leave positions and steps out."
            )
        if scope.unsure and not self.place.side.encodes:
            raise InterventionError(
                f"{self.location}: {scope.unsure}, so the prompt cannot be told from what is generated; generate "
                "without that, or leave positions and steps out."
            )
        if self.steps is not None and call is not None and call.past and call.prompt is None:
            raise InterventionError(
                f"steps at {self.location} cannot be counted: this block began when the cache held {call.past} tokens "
                "already; open it before the prompt is read, or leave steps out."
            )
        arguments = [each.arguments for each in (call, generation) if each is not None]
        return span_of(vectors, self.place, call, arguments, self.positions)

    def _source_part(self, vectors: Tensor, targets: Targets, axes: str, scope: Scope) -> Tensor | None:
        if self.source is None:
            return None
        state, place, read = self._state(self.source, scope), self.source.place, self.source.location
        if read is not None and place is not None and read.heads is not None:
            place.check_axes(state, read)
        source = to_vectors(state, axes if place is None else place.axes_of(state))
        if source.dtype != vectors.dtype:
            raise InterventionError(
                f"{self.location} is {vectors.dtype} in the base run and {source.dtype} in the source run; "
                "run both under the same autocast and precision."
            )
        source = source.to(vectors.device)
        if read is not None:  # what is taken need not be what is written of places of one width
            vectors, source = select_entries(vectors, self.location), select_entries(source, read)
            self._check_fits(vectors, source, read)
            if read.subspace is not None:  # coordinates fit, of spaces that need not be as wide
                vectors = vectors[..., :1].expand(*vectors.shape[:-1], source.shape[-1])
        if getattr(self.op, "pools_source", False):
            taken = self._pooled(source, self.source.mask)
        else:
            taken = self._aligned(vectors, source, targets, scope.call)
        part = select_part(taken, self.location) if read is None else coordinates_of(taken, read)
        self._check_numbers(part)
        return part

    def _check_fits(self, vectors: Tensor, source: Tensor, read: Location) -> None:
        """Raise for vectors of another shape than those that are written: of another model, or another place."""
        mine, its = coordinates_of(vectors, self.location).shape, coordinates_of(source, read).shape
        of_vector = 1 if vectors.ndim < 3 else 2
        is_of_keys = self.place.io in ("attention_scores", "attention_pattern")  # as wide as the text is long
        if len(mine) == len(its) and (is_of_keys or mine[of_vector:] == its[of_vector:]):
            return
        raise InterventionError(
            f"{self.location} is {list(mine)} where it is written and {read} is {list(its)} where it "
            f"is read, so the vectors do not fit; name parts of one size: dims=range(0, {min(mine[-1], its[-1])}) in "
            "at= and in source_at={…: …}."
        )

    def _aligned(self, vectors: Tensor, source: Tensor, targets: Targets, call: Call | None) -> Tensor:
        """The vectors of the source in the order of those that are written."""
        if self.positions is None:
            if self.source_positions is not None:
                raise InterventionError(
                    "source_positions was given without positions; say where to write: positions=…."
                )
            self._check_shapes(vectors, source, targets, call)
            return _at(source, targets.to)
        if vectors.shape[2:] != source.shape[2:]:
            self._check_shapes(vectors, source, targets, call)
        mask = self.source.mask if self.source is not None else None
        positions = self.positions if self.source_positions is None else self.source_positions
        selected = self._select(positions, source, mask)
        for named, _ in targets.named:
            self._check_counts(named, selected, len(vectors), len(source))
        rows = torch.cat([selected.rows[new] for _, new in targets.named])
        columns = torch.cat([selected.columns[new] for _, new in targets.named])
        return _at(source, Selection(rows, columns))

    def _pooled(self, source: Tensor, mask: Tensor | None) -> Tensor:
        """The vectors of all examples and positions, `[n, …, dims]`."""
        positions = self.source_positions if self.source_positions is not None else self.positions
        if positions is not None:
            return _at(source, self._select(positions, source, mask))
        if source.ndim < 3:
            return source
        if mask is not None:
            return source[self._span_of_source(source, mask, slice(None)).real.to(source.device)]
        return rearrange(source, "b t ... -> (b t) ...")

    def _select(self, positions: Positions, vectors: Tensor, mask: Tensor | None) -> Selection:
        self._check_positions(vectors)
        return select(positions, self._span_of_source(vectors, mask, positions).real)

    def _span_of_source(self, vectors: Tensor, mask: Tensor | None, positions: Positions) -> Span:
        place = self.place if self.source is None or self.source.place is None else self.source.place
        return span_of(vectors, place, None, [{place.mask: mask}], positions)

    def _check_positions(self, vectors: Tensor) -> None:
        if vectors.ndim < 3:
            raise InterventionError(
                f"{self.location} has no positions: its shape is {list(vectors.shape)}, [batch, dims]; leave "
                "positions out."
            )

    def _check_shapes(self, vectors: Tensor, source: Tensor, targets: Targets, call: Call | None) -> None:
        whole = targets.to is None
        fits = source.shape == vectors.shape if whole else _outside_of_tokens(source) == _outside_of_tokens(vectors)
        if not fits or (targets.to is not None and int(targets.to.columns.max()) >= source.shape[1]):
            generated = call is not None and call.past > 0 and self.positions is None
            raise InterventionError(
                f"{self.location} has shape {list(vectors.shape)} in the base run and {list(source.shape)} in the "
                "source run; "
                + (
                    "swap in the prompt only: steps=0."
                    if generated
                    else "each of its rows is one of keys, so both must be as long; pad both batches to one length."
                    if self.place.io in ("attention_scores", "attention_pattern") and self.positions is not None
                    else "pad both batches to one length, or say which tokens: positions=… and source_positions=…."
                )
            )

    def _check_counts(self, named: Selection, selected: Selection, batch: int, source_batch: int) -> None:
        if source_batch != batch:
            raise InterventionError(
                f"the base has {batch} examples and the source of {self.location} {source_batch}; give one source an "
                "example (beams and several answers repeat each prompt: repeat_interleave the source as often)."
            )
        counts, source_counts = named.counts(batch), selected.counts(batch)
        if not torch.equal(counts, source_counts):
            row = int((counts != source_counts).nonzero()[0])
            raise InterventionError(
                f"positions selects {int(counts[row])} tokens of base row {row} and {int(source_counts[row])} of its "
                "source; give source_positions=… with as many, e.g. a list of lists."
            )

    def _check_numbers(self, part: Tensor) -> None:
        with without_gradients():
            wrong = part.isnan() if part.is_floating_point() else None
        if wrong is not None and wrong.any():
            raise InterventionError(
                f"the source has NaN at {self.location} in {int(wrong.sum())} of {wrong.numel()} entries; look at the "
                "source run, or choose other positions with source_positions=…."
            )

    def _state(self, source: Source, scope: Scope) -> Tensor:
        """What the source holds for this call of the place."""
        if getattr(self.op, "pools_source", False) and len(source.states) > 1:
            return torch.cat(source.states)
        if self._turn >= len(source.states) and not getattr(self.op, "pools_source", False):
            raise InterventionError(
                f"{self.location} ran {self._turn + 1} times in one call of the model and its source holds "
                f"{len(source.states)} activation{'s' * (len(source.states) > 1)}; give a whole run: "
                f"source=run(model, inputs, at=[{self.location!r}]), or name a module that runs once."
            )
        if scope.recomputing and len(source.states) > 1:
            raise InterventionError(
                f"{self.location} runs {len(source.states)} times in a call of the model, which gradient checkpointing "
                "repeats in another order; turn checkpointing off, or name a module that runs once."
            )
        return source.states[0 if len(source.states) == 1 else self._turn]

    def _check_value(self, value: object, base: Tensor) -> None:
        if not isinstance(value, Tensor) or value.shape != base.shape or value.dtype != base.dtype:
            got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InterventionError(
                f"operator {self.op!r} returned {got} for {base.dtype} {list(base.shape)} at {self.location}; return "
                "a tensor like its first argument, e.g. value.expand_as(base).to(base.dtype)."
            )

    def _check_labels(self, scope: Scope) -> None:
        if self.place.io == "logits" and scope.call is not None and scope.call.arguments.get("labels") is not None:
            raise InterventionError(
                "logits are written when the loss has been computed from the old ones; leave labels out and compute "
                "the loss from the output: cross_entropy(output.logits, labels)."
            )


def _unmasked(scores: Tensor) -> Tensor:
    """Attention scores with 0 where the mask put the lowest number."""
    return scores.masked_fill(_is_masked(scores), 0)


def _is_masked(scores: Tensor) -> Tensor:
    return scores < torch.finfo(scores.dtype).min / 4


def _outside_of_tokens(vectors: Tensor) -> tuple[int, ...]:
    return (vectors.shape[0], *vectors.shape[2:])


def _versions(*tensors: Tensor | None) -> list[int]:
    return [tensor._version for tensor in tensors if tensor is not None and not tensor.is_inference()]


def _at(vectors: Tensor, chosen_ones: Selection | None) -> Tensor:
    if chosen_ones is None:
        return vectors
    chosen_ones = chosen_ones.to(vectors.device)
    return vectors[chosen_ones.rows, chosen_ones.columns]


def _shares(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
