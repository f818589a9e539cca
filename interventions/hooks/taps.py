"""A tap: a function on the input, the output or an inner state of one module, which reads or replaces it."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from interventions.errors import InterventionError
from interventions.locations import HEAD_SITES
from interventions.models.calls import CallContext
from interventions.models.final_norms import AfterBlocks
from interventions.models.places import Place

TapFunction = Callable[[Tensor, CallContext], Tensor | None]
"""From an activation and the running call of the model to a new activation, or None to leave it as it is."""


@dataclass(eq=False)  # not frozen, which takes several times as long to make
class Tap:
    """A function on one activation of a module.

    Attributes:
        io: "input", "output" or an inner state, as in `interventions.models.places.Place`.
        function: returns a new activation, or None to leave it as it is.
        heads: the number of heads into which the last axis is split before the function is called.
        kind: the kind of attention, where `io` lies inside one.
        writes: whether the function replaces the activation; False where it only reads and may return a copy.
        turn: the number of the call of the module within one call of the model; None for every call.
        unflattens: whether examples and tokens that share an axis are put on two before the function is called.
        after: for a final norm, the blocks after which it runs; its other calls are left alone.
    """

    module: nn.Module
    io: str
    function: TapFunction
    heads: int | None = None
    kind: str = ""
    writes: bool = True
    turn: int | None = None
    unflattens: bool = False
    after: AfterBlocks | None = None

    @classmethod
    def at(cls, place: Place, function: TapFunction, *, writes: bool = True) -> "Tap":
        """Return the tap of a function at a place.

        Raises:
            InterventionError: an operation inside a forward, where no hook is.
        """
        if place.operations:
            raise InterventionError(
                f"the operation {'.'.join(place.operations)!r} lies inside the forward of {place.path or 'the model'}, "
                "which hooks cannot open and nnsight does; pass NNsight(model): from nnsight import NNsight."
            )
        return cls(
            place.module, place.io, function, place.heads, place.kind, writes, place.turn, place.unflattens, place.after
        )

    def __call__(self, state: Tensor, context: CallContext) -> Tensor | None:
        call = context.call if self.unflattens and state.ndim == 2 else None
        if call is not None and call.tokens and len(state) == call.tokens * (call.examples or 0):
            new = self.function(state.unflatten(0, (-1, call.tokens)), context)
            return None if new is None else new.flatten(0, 1)
        if self.heads is None:
            return self.function(state, context)
        new = self.function(state.unflatten(-1, (self.heads, -1)), context)
        return None if new is None else new.flatten(-2)

    @property
    def inside_attention(self) -> bool:
        """True where the activation is computed inside an attention: query, key, value, scores, pattern or heads."""
        return self.io in HEAD_SITES

    def has_turn(self, context: CallContext) -> bool:
        """Return whether the running call of the module is the one to tap; call it once for each call."""
        if self.turn is None:
            return True
        return self.turn == (0 if context.call is None else context.call.turn_of(self))
