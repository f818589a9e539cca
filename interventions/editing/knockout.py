"""`knockout`: attention edges between positions are cut, and the rest of each row of the pattern is renormalized.

The score of a query q for a key k becomes the lowest number of its dtype, so that the softmax gives it 0 and shares its
weight among the other keys (Geva et al. 2023, arXiv:2304.14767, section 5).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from interventions.errors import InterventionError
from interventions.execution.parts import is_masked
from interventions.execution.requests import Handle
from interventions.interchanges import intervene
from interventions.locations import Location
from interventions.models.architectures import architecture
from interventions.models.wrappers import Model
from interventions.positions import Positions, check_positions, select


@dataclass(frozen=True, eq=False)
class Knockout:
    """The operator at `attention_scores` that keeps some queries from attending to some keys.

    Attributes:
        queries: the positions that attend, counted over real tokens.
        keys: the positions that they no longer attend to.
    """

    queries: Positions
    keys: Positions
    needs_source: ClassVar[bool] = False

    def __call__(self, base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
        masked = is_masked(base)
        real = (~masked).flatten(1, -2).any(1)  # [batch, key]: padding is seen by no query
        asking, seen = (_flags(each, real) for each in (self.queries, self.keys))
        first = real.shape[1] - base.shape[1]  # with a cache the queries are the last tokens
        cut = (asking[:, first:, None] & seen[:, None, :])[:, :, None, :].expand(base.shape)
        alone = (~masked).any(-1) & (masked | cut).all(-1)
        if alone.any():
            row, token = alone.nonzero()[0, :2].tolist()
            raise InterventionError(
                f"after the knockout of queries={self.queries!r}, keys={self.keys!r}, token {token + first} of example "
                f"{row} attends to no key at all; leave it out of queries, or leave it a key."
            )
        return base.masked_fill(cut, torch.finfo(base.dtype).min)


def _flags(positions: Positions, real: Tensor) -> Tensor:
    """Return which tokens positions name, `[batch, token]`."""
    if positions is None:
        return real
    chosen = select(positions, real.cpu()).to(real.device)
    flags = torch.zeros_like(real)
    flags[chosen.rows, chosen.columns] = True
    return flags


@contextmanager
def knockout(
    model: Model,
    queries: Positions,
    keys: Positions,
    *,
    layers: int | Iterable[int] | None = None,
    heads: Any = None,
    stack: str | None = None,
) -> Iterator[Handle]:
    """Cut attention edges in every call inside the block: the queries no longer attend to the keys.

    Attention knockout (Geva et al. 2023, arXiv:2304.14767, section 5). The other keys of a row share its weight, so the
    rows of the pattern still sum to 1.

    Args:
        model: a torch model, or one of nnsight; its hooks and weights stay as they are.
        queries: the tokens that attend, counted over real tokens, as `interventions.select` takes them; None is all.
        keys: the tokens that they no longer attend to, in the same forms.
        layers: the blocks, a number or several, counted from 0, −1 the last; None is all of them.
        heads: which heads, as in `Location`; None is all of them.
        stack: which list of blocks, in a model with several; None is the decoder of an encoder–decoder model.

    Yields:
        The Handle of `intervene`.

    Raises:
        InterventionError: a model without blocks or without attention that was found; layers, heads or positions that
            do not exist; a token that would attend to no key at all.

    >>> from transformers import GPT2Config, GPT2Model
    >>> from interventions import record
    >>> model = GPT2Model(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=10)).eval()
    >>> with knockout(model, queries=-1, keys=[0, 1]), record(model, [Location(0, "attention_pattern")]) as kept:
    ...     output = model(torch.tensor([[1, 2, 3, 4]]))
    >>> kept[Location(0, "attention_pattern")][0, 0, -1, :2].tolist()
    [0.0, 0.0]
    """
    for positions in (queries, keys):
        check_positions(positions)
    count = len(architecture(model).stack_of(Location(0, stack=stack)).blocks)
    several = isinstance(layers, Iterable) and not isinstance(layers, Tensor | str)
    chosen: Any = range(count) if layers is None else layers if several else [layers]
    places = [Location(layer, "attention_scores", heads=heads, stack=stack) for layer in chosen]
    if not places:
        raise InterventionError(f"layers={layers!r} names no block; write layers=range(0, {count}), or None for all.")
    with intervene(model, dict.fromkeys(places, Knockout(queries, keys))) as handle:
        yield handle
