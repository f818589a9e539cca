"""Learned choices of dims: soft while they are trained, hard in eval mode."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interventions.errors import InterventionError
from interventions.subspaces.subspace import Learned, difference, unbuilt


class SoftChoice(Learned):
    """A learned choice of dims: between 0 and 1 in train mode, 0 or 1 in eval mode (`subspace.eval()`).

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
        return float(self.tau)

    @temperature.setter
    def temperature(self, value: float) -> None:
        if not value > 0:
            raise InterventionError(
                f"{type(self).__name__}(temperature={value}) divides by it and it must be above 0; evaluate the hard "
                "choice with subspace.eval()."
            )
        self.tau = torch.full_like(self.tau, value)

    def _chosen(self, scores: Tensor) -> Tensor:
        return (scores / self.tau).sigmoid() if self.training else (scores > 0).to(scores)


class Mask(SoftChoice):
    """Which entries of the vector itself to replace: a differentiable mask (De Cao et al. 2020, arXiv:2004.14992).

    A sigmoid of one number an entry, without the noise of their hard concrete gates. It starts at one half everywhere,
    which in eval mode is nothing. Penalise `share` to find the fewest entries that do.

    Args:
        width: of the space; None: that of the first tensor seen.
        temperature: of the sigmoid.

    >>> mask = Mask(3)
    >>> mask.replace(torch.zeros(3), torch.ones(3)).tolist(), mask.share.item()
    ([0.5, 0.5, 0.5], 0.5)
    """

    def __init__(self, width: int | None = None, *, temperature: float = 1.0) -> None:
        super().__init__(temperature)
        self.logits = unbuilt()
        self._build(width)

    @property
    def share(self) -> Float[Tensor, ""]:
        """The expected share of entries replaced, differentiable in either mode."""
        self._check_built()
        return (self.logits / self.tau).sigmoid().mean()

    @property
    def settings(self) -> dict[str, Any]:
        return {"width": self.width, "temperature": self.temperature}

    def _initial(self, width: int) -> dict[str, Tensor]:
        return {"logits": torch.zeros(width)}

    def _coordinates(self, x: Tensor) -> Tensor:
        return x

    def _replaced(self, x: Tensor, coordinates: Tensor) -> Tensor:
        difference(coordinates, x)
        mask = self._chosen(self.logits).to(x.dtype)
        return torch.lerp(x, coordinates, mask.expand_as(x))  # exact at both ends
