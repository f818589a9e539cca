"""Apply an operator to the vectors that a location and its positions select, and put them back.

With the activation x, the part P of a vector that the location names, and the positions T, a write computes
x′[t] = x[t] with P(x′[t]) = op(P(x[t]), P(s[t])) for t in T, where s is the activation of the source; other vectors and
other parts stay as they are.
"""

from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

from interventions.endings import without_gradients
from interventions.errors import InterventionError
from interventions.execution.parts import coordinates_of, replace_part, select_entries, select_part
from interventions.execution.targets import Targets, check_positions, find_targets
from interventions.hooks.checkpointing import check_recomputable
from interventions.locations import Location
from interventions.models.axes import from_vectors, to_vectors
from interventions.models.calls import Call, CallContext
from interventions.models.places import Place
from interventions.operators import Operator
from interventions.positions import Positions, Selection, select
from interventions.steps import Window, window_of
from interventions.subspaces.frames import shared_frames


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
        changed: the sum of squares of the change, over the written entries.
        norm: the sum of squares of the activation before, over the same entries.
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
    _last_call: object = field(default=None, repr=False)
    _turn: int = field(default=0, repr=False)

    def __call__(self, state: Tensor, context: CallContext) -> Tensor | None:
        check_recomputable(self.place.module, context)
        if not context.recomputing:
            self._count(context)
        with shared_frames():
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
    def change(self) -> float:
        """The root mean square of the change, divided by that of the activation before it; 0 if it never ran."""
        if self.changed is None or self.norm is None:
            return 0.0
        return float((self.changed / self.norm.clamp_min(1e-30)).sqrt())

    def _measure(self, state: Tensor, new: Tensor) -> None:
        """Add the squares of a change, and of the entries before it, to the sums."""
        with without_gradients():
            before, after = (_unmasked(each) if self.place.io == "attention_scores" else each for each in (state, new))
            changed, norm = (after - before).float().square().sum(), before.float().square().sum()
        self.changed = changed if self.changed is None else self.changed + changed
        self.norm = norm if self.norm is None else self.norm + norm

    def _compute(self, state: Tensor, context: CallContext) -> Tensor | None:
        """Return the new activation; None where no token is written."""
        self._check_labels(context)
        if self.location.heads is not None or self.positions is not None or self.steps is not None:
            self.place.check_axes(state, self.location)
        axes = self.place.axes_of(state)
        vectors = to_vectors(state, axes)
        targets = find_targets(
            vectors,
            context,
            location=self.location,
            place=self.place,
            positions=self.positions,
            steps=self.steps,
        )
        if targets.is_nothing:
            return None
        selected = _select(vectors, targets.to)
        base = select_part(selected, self.location)
        source = self._source_part(vectors, targets, axes, context)
        versions = _versions(base, source)
        value = self.op(base, source, self.generator)
        if _versions(base, source) != versions:
            raise InterventionError(
                f"operator {self.op!r} wrote into what it was given at {self.location}, which is the run's own; return "
                "a new tensor, e.g. base * 2 and not base.mul_(2)."
            )
        self._check_value(value, base)
        if self.place.io == "attention_scores" and self.location.subspace is None:
            value = torch.where(_is_masked(base), base, value)  # masked keys stay masked
        merged = replace_part(selected, value, self.location)
        if not context.recomputing:
            self._measure(select_entries(selected, self.location), select_entries(merged, self.location))
        if targets.to is not None:
            to = targets.to.to(vectors.device)
            merged = vectors.index_put((to.rows, to.columns), merged)
        elif (
            merged is state
            or (self.source is not None and any(_share_memory(merged, held) for held in self.source.states))
            or merged._is_view()
        ):
            merged = merged.clone()  # the model may continue in place, and must not write into a source or a view
        return from_vectors(merged, axes, state)

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
        source = source.to(vectors.device)
        if read is not None:  # the entries read need not be those written
            vectors, source = select_entries(vectors, self.location), select_entries(source, read)
            self._check_fits(vectors, source, read)
            if read.subspace is not None:  # coordinates of one size fit, whatever the widths of the spaces
                vectors = vectors[..., :1].expand(*vectors.shape[:-1], source.shape[-1])
        if getattr(self.op, "pools_source", False):
            taken = self._pool(source, self.source.mask)
        else:
            taken = self._align(vectors, source, targets, context.call)
        part = select_part(taken, self.location) if read is None else coordinates_of(taken, read)
        self._check_numbers(part)
        return part

    def _check_fits(self, vectors: Tensor, source: Tensor, read: Location) -> None:
        """Raise InterventionError for vectors of another shape than the written ones, from another model or place."""
        shape, source_shape = coordinates_of(vectors, self.location).shape, coordinates_of(source, read).shape
        leading = 1 if vectors.ndim < 3 else 2
        is_of_keys = self.place.io in ("attention_scores", "attention_pattern")  # as wide as the text is long
        if len(shape) == len(source_shape) and (is_of_keys or shape[leading:] == source_shape[leading:]):
            return
        raise InterventionError(
            f"{self.location} is {list(shape)} where it is written and {read} is {list(source_shape)} where it "
            "is read, so the vectors do not fit; name parts of one size: "
            f"dims=range(0, {min(shape[-1], source_shape[-1])}) in "
            "at= and in source_at={…: …}."
        )

    def _align(self, vectors: Tensor, source: Tensor, targets: Targets, call: Call | None) -> Tensor:
        """Return the vectors of the source in the order of the written ones, `[n, …, dims]` with positions."""
        if self.positions is None:
            if self.source_positions is not None:
                raise InterventionError(
                    "source_positions was given without positions; say where to write: positions=…."
                )
            self._check_shapes(vectors, source, targets, call)
            return _select(source, targets.to)
        if vectors.shape[2:] != source.shape[2:]:
            self._check_shapes(vectors, source, targets, call)
        mask = self.source.mask if self.source is not None else None
        positions = self.positions if self.source_positions is None else self.source_positions
        selected = self._select_positions(positions, source, mask)
        for named, _ in targets.named:
            self._check_counts(named, selected, len(vectors), len(source))
        rows = torch.cat([selected.rows[new] for _, new in targets.named])
        columns = torch.cat([selected.columns[new] for _, new in targets.named])
        return _select(source, Selection(rows, columns))

    def _pool(self, source: Tensor, mask: Tensor | None) -> Tensor:
        """Return the vectors of all examples and positions of the source, `[n, …, dims]`."""
        positions = self.source_positions if self.source_positions is not None else self.positions
        if positions is not None:
            return _select(source, self._select_positions(positions, source, mask))
        if source.ndim < 3:
            return source
        if mask is not None:
            return source[self._window_of_source(source, mask, slice(None)).real.to(source.device)]
        return rearrange(source, "b t ... -> (b t) ...")

    def _select_positions(self, positions: Positions, vectors: Tensor, mask: Tensor | None) -> Selection:
        """Return the tokens of the source that positions name, counted over real tokens."""
        check_positions(vectors, self.location)
        return select(positions, self._window_of_source(vectors, mask, positions).real)

    def _window_of_source(self, vectors: Tensor, mask: Tensor | None, positions: Positions) -> Window:
        """Return the tokens that the vectors of the source belong to."""
        place = self.place if self.source is None or self.source.place is None else self.source.place
        return window_of(vectors, place, None, [{place.mask: mask}], positions)

    def _check_shapes(self, vectors: Tensor, source: Tensor, targets: Targets, call: Call | None) -> None:
        """Raise InterventionError for a source that lacks vectors to write, or has others."""
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
        """Raise InterventionError where base and source differ in examples, or in the tokens of an example."""
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
        """Raise InterventionError for a source with NaN."""
        with without_gradients():
            wrong = part.isnan() if part.is_floating_point() else None
        if wrong is not None and wrong.any():
            raise InterventionError(
                f"the source has NaN at {self.location} in {int(wrong.sum())} of {wrong.numel()} entries; look at the "
                "source run, or choose other positions with source_positions=…."
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

    def _check_value(self, value: object, base: Tensor) -> None:
        """Raise InterventionError for a value of an operator that is no tensor like the base."""
        if not isinstance(value, Tensor) or value.shape != base.shape or value.dtype != base.dtype:
            got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InterventionError(
                f"operator {self.op!r} returned {got} for {base.dtype} {list(base.shape)} at {self.location}; return "
                "a tensor like its first argument, e.g. value.expand_as(base).to(base.dtype)."
            )

    def _check_labels(self, context: CallContext) -> None:
        """Raise InterventionError for logits that are written after the model has computed its loss from them."""
        if self.place.io == "logits" and context.call is not None and context.call.arguments.get("labels") is not None:
            raise InterventionError(
                "logits are written when the loss has been computed from the old ones; leave labels out and compute "
                "the loss from the output: cross_entropy(output.logits, labels)."
            )


def _unmasked(scores: Tensor) -> Tensor:
    """Return attention scores with 0 in place of the lowest number, which marks masked keys."""
    return scores.masked_fill(_is_masked(scores), 0)


def _is_masked(scores: Tensor) -> Tensor:
    return scores < torch.finfo(scores.dtype).min / 4


def _outside_of_tokens(vectors: Tensor) -> tuple[int, ...]:
    """Return the shape of vectors without the axis of tokens."""
    return (vectors.shape[0], *vectors.shape[2:])


def _versions(*tensors: Tensor | None) -> list[int]:
    """Return the versions of tensors, which count the writes into them."""
    return [tensor._version for tensor in tensors if tensor is not None and not tensor.is_inference()]


def _select(vectors: Tensor, selection: Selection | None) -> Tensor:
    """Return the vectors of a selection, `[n, …, dims]`; all of them for None."""
    if selection is None:
        return vectors
    selection = selection.to(vectors.device)
    return vectors[selection.rows, selection.columns]


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
