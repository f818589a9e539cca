"""The memory of CRD: features of all rows of the data, and which rows are of one class."""

from math import sqrt
from typing import Any, NamedTuple

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize

from distill.data.rows import Rows
from distill.processes import gather

HIGHEST = 2**62


class Classes(NamedTuple):
    """The classes of the rows of the data; a row without a class is the only one of its own.

    Attributes:
        order: the numbers of the rows, sorted by class.
        firsts: for each row, where its class begins in that order.
        sizes: for each row, how many rows are of its class.
    """

    order: Int[Tensor, " rows"]
    firsts: Int[Tensor, " rows"]
    sizes: Int[Tensor, " rows"]

    @classmethod
    def of(cls, data: Rows) -> "Classes":
        """Return the classes by the column `labels`, if it holds one class a row; −100 is no class."""
        labels, alone = data.table.get("labels"), torch.arange(len(data))
        if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
            return cls(alone, alone, torch.ones_like(alone))
        labels = labels.cpu().long()
        named = torch.where(labels == -100, labels.max().clamp(min=0) + 1 + alone, labels)
        _, number, counts = torch.unique(named, return_inverse=True, return_counts=True)
        return cls(number.argsort(stable=True), (counts.cumsum(0) - counts)[number], counts[number])

    def others(
        self, rows: Int[Tensor, " batch"], number: int, generator: torch.Generator
    ) -> Int[Tensor, "batch number"]:
        """Draw rows of other classes for each of these rows, uniformly and with replacement."""
        # In the order of classes, the others lie before the first of the class and after its last.
        first, size = self.firsts[rows][:, None], self.sizes[rows][:, None]
        drawn = torch.randint(HIGHEST, (len(rows), number), generator=generator, device=generator.device)
        place = drawn.to(rows.device) % (len(self.order) - size)
        return self.order[torch.where(place < first, place, place + size)]


class Memory(nn.Module):
    """The features of all rows, `[rows, width]`, near the unit sphere, and the constant Z that scores are divided by.

    Both are buffers, so that checkpoints hold them.
    """

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        bound = sqrt(3 / width)  # so that the expected squared length is 1
        self.features: Any
        self.normaliser: Any
        self.register_buffer("features", torch.empty(rows, width).uniform_(-bound, bound))
        self.register_buffer("normaliser", torch.zeros(()))
        self._is_decided = False  # known without a look at the device
        self.register_load_state_dict_post_hook(_forget_decision)

    def scores(
        self, anchors: Float[Tensor, "batch width"], rows: Int[Tensor, "batch k"], temperature: float
    ) -> Float[Tensor, "batch k"]:
        """Return exp(cosine / temperature) / Z of each anchor with the features of some rows.

        Z is the number of rows times the mean exponential in the first batch in training mode, over all processes; it
        is constant from then on.
        """
        with torch.autocast(anchors.device.type, enabled=False):
            if len(self.features) <= rows.shape[1] * self.features.shape[1]:  # the products with all take less memory
                cosines = (anchors @ self.features.T).gather(1, rows)
            else:
                cosines = einsum(anchors, self.features[rows], "batch width, batch k width -> batch k")
            scores = (cosines / temperature).exp()
        return scores / self._normaliser(scores.detach())

    def remember(self, rows: Int[Tensor, " batch"], features: Float[Tensor, "batch width"], momentum: float) -> None:
        """Move the features of some rows towards new ones; `momentum` is the share of the old features."""
        # Not in place: the backward pass needs the memory as it was.
        self.features = update(self.features, rows, features, momentum)

    def _normaliser(self, scores: Tensor) -> Tensor:
        """Return Z; in training mode the first batch decides it."""
        if self._is_decided or bool(self.normaliser > 0):
            self._is_decided = True
            return self.normaliser
        if not self.training:
            return scores.mean() * len(self.features)
        self._is_decided = True
        self.normaliser = gather(scores.mean()[None]).mean() * len(self.features)
        return self.normaliser


def _forget_decision(memory: Memory, keys: object) -> None:
    """Look at the constant again after it was loaded."""
    memory._is_decided = False


def update(
    memory: Float[Tensor, "rows width"],
    rows: Int[Tensor, " batch"],
    features: Float[Tensor, "batch width"],
    momentum: float,
) -> Float[Tensor, "rows width"]:
    """Return a memory in which the features of some rows are moved towards new ones, and normalised again.

    >>> update(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([1]), torch.tensor([[0.0, 1.0]]), 0.5)
    tensor([[1.0000, 0.0000],
            [0.7071, 0.7071]])
    """
    moved = momentum * memory[rows] + (1 - momentum) * features.detach()
    return memory.index_copy(0, rows, normalize(moved, dim=1))
