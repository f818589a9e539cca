"""A location found in one model: a tensor of one of its modules, and the axes of that tensor."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from jaxtyping import Bool
from torch import Tensor, nn

from interventions.errors import InterventionError
from interventions.locations import HEAD_SITES, STATES, Location
from interventions.models.attentions import heads_of, kind_of
from interventions.models.axes import axes_of
from interventions.models.final_norms import AfterBlocks
from interventions.models.padding import real_of
from interventions.models.sides import NOWHERE, Side, token_lengths
from interventions.models.stacks import Stack

_MOST_SHAPES = 64


@dataclass(frozen=True, eq=False)
class Place:
    """A location found in a model.

    Attributes:
        module: the module with the activation.
        path: its dotted path.
        io: the activation: "input" or "output" of the module, a site with heads of an attention, the final state of a
            recurrent module, or the "logits" of a model.
        block: the block that is or contains the module; None outside of all blocks.
        side: the input to which its tokens belong, with the argument of the model that masks them.
        lengths: the part of the model that counts the tokens its convolutions make of frames, if there is one.
        stack: the stack before it, for the normalisation after the blocks and for the logits (the last stack).
        heads: the number of heads side by side on the last axis; None where the last axis has no heads.
        kind: the kind of attention, as in `interventions.models.attentions.Attention`.
        turn: the number of the call of the block, where layers share blocks.
        axes: the axes of activations in the block, where `interventions.models.overrides` states them.
        unflattens: whether examples and tokens may lie on one axis, as in the feed-forward part of OPT.
        operations: the name of an operation in the forward of the module, after those of the calls that it is in; ()
            for the module itself.
    """

    module: nn.Module
    path: str
    io: str
    block: nn.Module | None
    side: Side = NOWHERE
    lengths: nn.Module | None = None
    stack: Stack | None = None
    heads: int | None = None
    kind: str = ""
    turn: int | None = None
    axes: str = ""
    unflattens: bool = False
    operations: tuple[str, ...] = ()
    # The axes that were found for each shape, as all modules inside the place are looked at to find them.
    _axes_by_shape: dict[tuple[int, ...], str] = field(default_factory=dict, init=False, repr=False)

    @property
    def after(self) -> AfterBlocks | None:
        """The condition on a call of the normalisation after the blocks of a stack; None for other places."""
        return None if self.stack is None or self.io == "logits" else AfterBlocks(self.stack)

    @property
    def mask(self) -> str:
        """The argument of the model that masks the padding among its tokens; "" if none does."""
        return self.side.mask

    def real(self, arguments: Mapping[str, object], batch: int, width: int) -> Bool[Tensor, "batch width"] | None:
        """Return which of `width` tokens are real in a run of the model with these arguments; see `real_of`."""
        mask = arguments.get(self.mask)
        lengths = None if self.lengths is None else partial(token_lengths, self.lengths)
        return real_of(
            mask if isinstance(mask, Tensor) else None, batch, width, beside=self.side.beside, lengths=lengths
        )

    @property
    def is_block_output(self) -> bool:
        """True for the output of a block, False for a place inside one or outside of all blocks."""
        return self.module is self.block and self.io == "output" and not self.operations

    def axes_of(self, state: Tensor) -> str:
        """Return the axes of an activation at this place, as an einops pattern of `interventions.models.axes`."""
        shape = state.shape
        axes = self._axes_by_shape.get(shape)
        if axes is None:
            if len(self._axes_by_shape) == _MOST_SHAPES:
                self._axes_by_shape.clear()
            axes = self._axes_by_shape[shape] = self._find_axes(state)
        return axes

    def _find_axes(self, state: Tensor) -> str:
        if self.operations and state.ndim == 4 and kind_of(self.module) is not None:
            return self._axes_inside(state)
        if self.io in ("attention_scores", "attention_pattern"):
            return "b h t d"  # a row of scores over the keys is the vector of one head and query
        if self.heads is not None and self.axes == "t b d":
            return "t b h d"
        if self.io in HEAD_SITES or self.heads is not None:
            return "b x y h d" if state.ndim == 5 else "b t h d"
        if self.io in STATES and state.ndim == 3:
            return "t b d"  # one final state for each layer and direction
        if state.ndim == len(self.axes.split()):
            return self.axes
        return axes_of(self.module, state)

    @property
    def _is_function(self) -> bool:
        """True for the attention function of transformers, which returns `[batch, token, head, dims]`."""
        return len(self.operations) == 1 and self.operations[0].rpartition("_")[0].endswith("interface")

    def _axes_inside(self, state: Tensor) -> str:
        """Return the order of four axes in the forward of an attention: heads before the tokens, or after."""
        if self._is_function:
            return "b t h d"
        config = getattr(self.module, "config", None)
        heads = {heads_of(self.module), getattr(config, "num_key_value_heads", None)}
        before, after = (size in heads for size in state.shape[1:3])
        return "b t h d" if after and not before else "b h t d"

    def check_axes(self, state: Tensor, location: Location) -> None:
        """Raise InterventionError for heads or positions where the axes of heads and tokens cannot be distinguished."""
        if not (self.operations and state.ndim == 4 and kind_of(self.module) is not None):
            return
        if self._is_function or tuple(state.shape[1:3]) == (1, 1):
            return
        if self.axes_of(state) == self.axes_of(state.transpose(1, 2)):
            raise InterventionError(
                f"{location} has shape {list(state.shape)}: as many heads as tokens, or neither, so which are which "
                "is unknown; leave heads and positions out, use a sequence of another length, or a site with heads."
            )
