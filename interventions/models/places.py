"""A location found in one model: which tensor of which module it is, and what its axes are."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from jaxtyping import Bool
from torch import Tensor, nn

from interventions.errors import InterventionError
from interventions.locations import HEAD_SITES, STATES, Location
from interventions.models.axes import axes_of
from interventions.models.final_norms import AfterBlocks
from interventions.models.padding import real_of
from interventions.models.sides import NOWHERE, Side, token_lengths
from interventions.models.sites import heads_of, kind_of
from interventions.models.stacks import Stack


@dataclass(frozen=True, eq=False)
class Place:
    """A location found in a model.

    Attributes:
        module: the module whose input, output or attention it is.
        path: its dotted path.
        io: "input" or "output", or what else is read or written: a site with heads of an attention module, the final
            state of a recurrent one, the "logits" of a model.
        block: the block that is or contains it, None outside of all blocks.
        side: whose tokens its tokens are, and which argument of the model masks them.
        lengths: what says how many tokens the convolutions before it make of so many frames, if anything does.
        stack: the stack that it comes after: the normalisation after its blocks, or the logits (of the last stack).
        heads: into how many heads its last axis is divided, where these lie side by side.
        kind: of the attention, see `interventions.models.sites.Attention`.
        turn: which call of the block it is, where layers share blocks.
        axes: of what its block holds, where `interventions.models.overrides` states them.
        unflattens: whether its examples and tokens may lie on one axis, as in OPT's feed-forward part.
        operations: the names of an operation in the forward of the module, and of those inside of it; none for the
            module itself.
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

    @property
    def after(self) -> AfterBlocks | None:
        """What each run is held to, of the normalisation after the blocks of a stack."""
        return None if self.stack is None or self.io == "logits" else AfterBlocks(self.stack)

    @property
    def mask(self) -> str:
        """The argument of the model that says which of its tokens are real; "" if none does."""
        return self.side.mask

    def real(self, arguments: Mapping[str, object], batch: int, width: int) -> Bool[Tensor, "batch width"] | None:
        """Which of `width` tokens there are no padding, in a run of the model with these arguments; see `real_of`."""
        mask = arguments.get(self.mask)
        counted = None if self.lengths is None else partial(token_lengths, self.lengths)
        return real_of(
            mask if isinstance(mask, Tensor) else None, batch, width, beside=self.side.beside, lengths=counted
        )

    @property
    def is_block_output(self) -> bool:
        """Whether it is what a block returns, not what is inside one."""
        return self.module is self.block and self.io == "output" and not self.operations

    def axes_of(self, state: Tensor) -> str:
        """The axes of what is there, as `interventions.models.axes` writes them."""
        if self.operations and state.ndim == 4 and kind_of(self.module) is not None:
            return self._axes_inside(state)
        if self.io in ("attention_scores", "attention_pattern"):
            return "b h t d"  # of scores one row of keys for each head and query
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
        """Whether it is the attention function of transformers, which returns `[batch, token, head, dims]`."""
        return len(self.operations) == 1 and self.operations[0].rpartition("_")[0].endswith("interface")

    def _axes_inside(self, state: Tensor) -> str:
        """Those of four axes in the forward of an attention: heads before the tokens, or after."""
        if self._is_function:
            return "b t h d"
        config = getattr(self.module, "config", None)
        heads = {heads_of(self.module), getattr(config, "num_key_value_heads", None)}
        before, after = (size in heads for size in state.shape[1:3])
        return "b t h d" if after and not before else "b h t d"

    def check_axes(self, state: Tensor, location: Location) -> None:
        """Raise where it cannot be told which of two axes is that of the heads, and one of them is chosen from."""
        if not (self.operations and state.ndim == 4 and kind_of(self.module) is not None):
            return
        if self._is_function or tuple(state.shape[1:3]) == (1, 1):
            return
        if self.axes_of(state) == self.axes_of(state.transpose(1, 2)):
            raise InterventionError(
                f"{location} has shape {list(state.shape)}: as many heads as tokens, or neither, so which are which "
                "cannot be told; leave heads and positions out, use a sequence of another length, or a site with heads."
            )
