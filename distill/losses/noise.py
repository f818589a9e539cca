"""Noise on the logits of the teacher, so that it acts as many uncertain teachers, or, as a control, of the student.

For a random share of the examples the logits z become, with ξ ~ N(0, σ²) drawn for each logit,

    z' = z + ξ    (additive)    or    z' = (1 + ξ) z    (multiplicative).

Sau, Balasubramanian 2016 (arXiv:1610.09650), section 3.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from distill.errors import DistillError, checked
from distill.losses.common import loss
from distill.precision import widen

KINDS = ("additive", "multiplicative")


@checked
@dataclass(frozen=True)
class LogitNoise:
    """Gaussian noise on the logits of a random share of the examples: z' = z + ξ or z' = (1 + ξ) z, ξ ~ N(0, σ²).

    Sau, Balasubramanian 2016 (arXiv:1610.09650), section 3.

    Args:
        sigma: σ, in units of the logits (additive) or as a fraction of each (multiplicative). 0 draws nothing.
        share: the probability from 0 to 1 that an example is perturbed. 0 draws nothing.
        kind: `"additive"` or `"multiplicative"`.

    >>> noisy = LogitNoise(sigma=0.5)(torch.zeros(2, 3), torch.Generator().manual_seed(0))
    >>> noisy.shape
    torch.Size([2, 3])
    """

    sigma: float
    share: float = 1.0
    kind: str = "additive"

    def __post_init__(self) -> None:
        if not 0 <= self.sigma < math.inf:
            raise DistillError(
                f"LogitNoise needs a standard deviation of 0 or more: sigma={self.sigma}; try LogitNoise(sigma=0.5)."
            )
        if not 0 <= self.share <= 1:
            raise DistillError(
                f"LogitNoise needs a share of the examples from 0 to 1: share={self.share}; share=1.0 perturbs all."
            )
        if self.kind not in KINDS:
            raise DistillError(f"LogitNoise has no kind={self.kind!r}; use kind='additive' or 'multiplicative'.")

    @loss
    def __call__(
        self, logits: Float[Tensor, "batch ..."], generator: torch.Generator | None
    ) -> Float[Tensor, "batch ..."]:
        """Return the logits with noise drawn from `generator`, in at least single precision; infinite logits stay.

        With σ or share 0 nothing is drawn, and the same tensor is returned.
        """
        if not logits.is_floating_point():
            raise DistillError(f"LogitNoise needs floating logits, and these are {logits.dtype}; give logits.float().")
        if self.sigma == 0 or self.share == 0:
            return logits
        clean = widen(logits)
        device = logits.device if generator is None else generator.device
        chosen = torch.rand(len(clean), generator=generator, device=device) < self.share
        drawn = torch.randn(clean.shape, generator=generator, device=device, dtype=clean.dtype) * self.sigma
        rows = chosen.reshape(-1, *[1] * (clean.ndim - 1)).to(clean.device)
        noise = drawn.to(clean.device)
        noisy = clean + (noise if self.kind == "additive" else noise * clean)
        return torch.where(rows & clean.isfinite(), noisy, clean)
