"""Differential binary masking: a learned choice of dims, soft in train mode and hard in eval mode.

A mask m of one number per dim mixes old and new coordinates, m · z + (1 − m) · x. In train mode m = σ(s / τ) for a
learned score s and temperature τ, in eval mode m = 1 where s > 0, else 0 (De Cao et al. 2020, arXiv:2004.14992).
"""

from abc import abstractmethod
from math import inf
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from interventions.arguments import checked
from interventions.errors import InterventionError
from interventions.subspaces.subspace import Learned, Subspace, difference, unbuilt


class SoftChoice(Learned):
    """A learned choice of dims: its mask is between 0 and 1 in train mode, and 0 or 1 in eval mode.

    A subclass defines `size` and `_scores`, and multiplies with `_mask()` what it writes. `subspace.eval()` switches to
    the hard choice.

    Attributes:
        temperature: of the sigmoid; lower is harder. Set it between steps to anneal; the state dict keeps it.
    """

    tau: Tensor

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.register_buffer("tau", torch.ones(()))
        self.temperature = temperature

    @property
    def temperature(self) -> float:
        """The temperature of the sigmoid, above 0."""
        return float(self.tau)

    @temperature.setter
    def temperature(self, value: float) -> None:
        if not 0 < value < inf:
            raise InterventionError(
                f"{type(self).__name__}(temperature={value}) divides by it and it must be above 0 and finite; evaluate "
                "the hard choice with subspace.eval()."
            )
        self.tau = torch.full_like(self.tau, value)

    @property
    @abstractmethod
    def size(self) -> Float[Tensor, ""]:
        """The expected share of the dims that is replaced, differentiable in both modes: penalise it to shrink it."""

    @property
    def chosen(self) -> Bool[Tensor, " k"]:
        """True for each dim that is replaced in eval mode; `chosen.sum()` is their number."""
        self._check_built()
        return self._scores() > 0

    @abstractmethod
    def _scores(self) -> Float[Tensor, " k"]:
        """Return one number for each dim, above 0 where it is chosen."""

    def _mask(self) -> Float[Tensor, " k"]:
        scores = self._scores()
        return (scores / self.tau).sigmoid() if self.training else (scores > 0).to(scores)


@checked
class Mask(SoftChoice):
    """A learned choice of the entries to replace: differential binary masking (De Cao et al. 2020, arXiv:2004.14992).

    The entries are those of the vector itself (neurons), or the coordinates of another subspace: principal components
    `Mask(within=PCA(16))`, features of a sparse autoencoder `Mask(within=SparseCoder(encode, decode))`, learned
    directions `Mask(within=Rotation(16))` (Mueller et al. 2025, MIB, arXiv:2504.13151). With all entries chosen it
    replaces what `within` replaces; with none, nothing.

    The mask is a sigmoid of one number for each entry, without the noise of De Cao et al.'s hard concrete gates. It
    starts at one half everywhere, which in eval mode chooses nothing. Penalise `size` to find the fewest entries that
    suffice.

    Args:
        width: the width of the space; None takes that of the first tensor.
        temperature: of the sigmoid.
        within: the subspace whose coordinates are chosen from, trained along with the mask if it has parameters. It
            knows the width of its space; the number of its coordinates is read off the first call.

    Raises:
        InterventionError: a width together with `within`; a temperature that is not positive.

    >>> mask = Mask(3)
    >>> mask.replace(torch.zeros(3), torch.ones(3)).tolist(), mask.size.item()
    ([0.5, 0.5, 0.5], 0.5)
    >>> from interventions import Rotation
    >>> mask = Mask(within=Rotation(2))
    >>> mask.coordinates(torch.zeros(5, 3)).shape, mask.chosen.tolist()
    (torch.Size([5, 2]), [False, False])
    """

    _own_width: int | None = None

    def __init__(self, width: int | None = None, *, temperature: float = 1.0, within: Subspace | None = None) -> None:
        super().__init__(temperature)
        if width is not None and within is not None:
            name = type(within).__name__
            raise InterventionError(
                f"Mask(width={width}) was given within={name}(…), which knows the width of its space; write "
                f"Mask(within={name}(…))."
            )
        self.within = within
        self.logits = unbuilt()
        self._build(width)

    @property
    def width(self) -> int | None:
        """The width of the space; with `within`, the width that it has."""
        return self._own_width if self.within is None else self.within.width

    @width.setter
    def width(self, value: int | None) -> None:
        self._own_width = value

    @property
    def size(self) -> Float[Tensor, ""]:
        """The expected share of the entries that is replaced, differentiable: the mean of the soft mask."""
        self._check_built()
        return (self.logits / self.tau).sigmoid().mean()

    def learned(self) -> list[nn.Parameter]:
        """Return the scores of the mask and the learned parameters of `within`."""
        return [self.logits, *([] if self.within is None else self.within.learned())]

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments but `within`, which is a module."""
        return {**({"width": self.width} if self.within is None else {}), "temperature": self.temperature}

    def _initial(self, width: int) -> dict[str, Tensor]:  # `width` is the number of coordinates of `within`, if given
        return {"logits": torch.zeros(width)}

    def _check_fit(self, x: Tensor) -> None:
        if self.within is not None and self._unbuilt:
            first = x.detach().reshape(-1, x.shape[-1])[:1]
            self._build(self.within.coordinates(first).shape[-1], x.device)
        super()._check_fit(x)

    def _check_built(self) -> None:
        if self.within is not None and self._unbuilt:
            raise InterventionError(
                f"Mask(within={type(self.within).__name__}(…)) has not run yet, so it does not know how many entries "
                "it has; run it once: mask.coordinates(activation)."
            )
        super()._check_built()

    def _coordinates(self, x: Tensor) -> Tensor:
        return x if self.within is None else self.within.coordinates(x)

    def _replaced(self, x: Tensor, coordinates: Tensor) -> Tensor:
        old = self._coordinates(x)
        difference(coordinates, old)
        if self.training:
            new = torch.lerp(old, coordinates, self._mask().to(old.dtype).expand_as(old))
        else:  # exact, also where an entry that is not chosen is infinite
            new = torch.where(self.chosen, coordinates, old)
        return new if self.within is None else self.within.replace(x, new)

    def _scores(self) -> Tensor:
        return self.logits
