"""Learned rotations: distributed alignment search, and its boundless variant.

Distributed alignment search learns an orthonormal frame R, `[width, k]`, and replaces the coordinates x R:
x + (z − x R) Rᵀ (Geiger et al. 2023, arXiv:2303.02536, section 3). The boundless variant rotates the whole space,
k = width, and learns how many of the rotated dims to replace: x + (m · (z − x R)) Rᵀ with
mⱼ = σ((boundary · width − j) / τ) (Wu et al. 2023, arXiv:2305.08809, section 3).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interventions.arguments import checked
from interventions.errors import InterventionError
from interventions.names import shown
from interventions.precision import at_least_single
from interventions.subspaces.frames import frame, random_reflections, reflections_of
from interventions.subspaces.masks import SoftChoice
from interventions.subspaces.subspace import Learned, check_dims, difference, unbuilt


@checked
class Rotation(Learned):
    """Learned orthonormal directions: distributed alignment search, DAS (Geiger et al. 2023, arXiv:2303.02536).

    The directions, `[width, dims]`, are orthonormal for all values of the parameters (see section 3 of the paper for
    the search), and start as a uniformly random frame.

    Args:
        dims: the number of directions.
        width: the width of the space; None takes that of the first tensor.
        seed: of the random frame it starts from.

    Raises:
        InterventionError: more dims than the width.

    >>> rotation, x, source = Rotation(2, width=8), torch.zeros(3, 8), torch.ones(3, 8)
    >>> new = rotation.replace(x, rotation.coordinates(source))
    >>> torch.allclose(rotation.coordinates(new), rotation.coordinates(source), atol=1e-6)
    True
    """

    signs: Tensor

    def __init__(self, dims: int, width: int | None = None, *, seed: int = 0) -> None:
        super().__init__()
        check_dims(dims, width, "Rotation")
        self.dims, self.seed = dims, seed
        self.reflections = unbuilt()
        self.register_buffer("signs", torch.ones(dims))
        self._build(width)

    @classmethod
    @checked
    def from_directions(cls, directions: Float[Tensor, "width k"]) -> "Rotation":
        """Return a rotation onto the span of the columns of `directions`, orthonormalised in order (Gram–Schmidt).

        Args:
            directions: `[width, k]`, linearly independent columns.

        Raises:
            InterventionError: the columns are not linearly independent, or not finite.

        >>> Rotation.from_directions(torch.tensor([[0.0], [2.0]])).directions.abs().tolist()
        [[0.0], [1.0]]
        """
        if directions.is_meta or directions.layout != torch.strided or not directions.isfinite().all():
            raise InterventionError(
                f"Rotation.from_directions was given {shown(directions)} ({directions.device}, {directions.layout}), "
                "which is without values, or holds NaN or infinite ones; give a dense matrix [width, k]."
            )
        width, dims = directions.shape
        check_dims(dims, width, "Rotation.from_directions(matrix [width, k])")
        rank = int(torch.linalg.matrix_rank(directions.detach().float().cpu()))
        if rank < dims:
            raise InterventionError(
                f"Rotation.from_directions was given {dims} directions of rank {rank}; leave out those that depend on "
                "the others."
            )
        rotation = cls(dims, width)
        with torch.no_grad():
            reflections, signs = reflections_of(directions)
            rotation.reflections.copy_(reflections)
            rotation.signs.copy_(signs)
        return rotation.to(directions.device)

    @property
    def directions(self) -> Float[Tensor, "width k"]:
        """The directions as columns, `[width, dims]`."""
        self._check_built()
        return frame(self.reflections, self.signs, at_least_single(self.reflections.dtype))

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that build this module again."""
        return {"dims": self.dims, "width": self.width, "seed": self.seed}

    def _initial(self, width: int) -> dict[str, Tensor]:
        check_dims(self.dims, width, "Rotation")
        return dict(zip(("reflections", "signs"), random_reflections(width, self.dims, self.seed), strict=True))

    def _coordinates(self, x: Tensor) -> Tensor:
        return x @ frame(self.reflections, self.signs, x.dtype)

    def _replaced(self, x: Tensor, coordinates: Tensor) -> Tensor:
        directions = frame(self.reflections, self.signs, x.dtype)
        return x + difference(coordinates, x @ directions) @ directions.T


@checked
class BoundlessRotation(SoftChoice):
    """A learned rotation of the whole space with a learned number of dims to replace: boundless DAS.

    Rotated dim j, counted from ½, is replaced by the share σ((boundary · width − j) / τ) (Wu et al. 2023,
    arXiv:2305.08809, section 3). Penalise `size` to find the smallest subspace that suffices.

    The authors' code (pyvene 0.1.8, BoundlessRotatedSpaceIntervention) differs in three ways. Its mask is
    σ(j / τ) · σ((b · width − j) / τ), j counted from 0: the first factor never moves, so dim 0 is replaced by one half
    at most at any temperature, and at the first temperature all dims by about a quarter (here about a half). Its b is a
    parameter clamped to [0.001, 1] (here a sigmoid; both start at one half). And it has no hard mask in eval mode (here
    0 or 1), with τ set by the caller between steps (here `distill.align` anneals it).

    Args:
        width: the width of the space; None takes that of the first tensor.
        seed: of the random rotation it starts from.
        temperature: τ in dims; the paper anneals it from 50 to 0.1.

    Raises:
        InterventionError: a width below 1; a temperature that is not positive.

    >>> rotation = BoundlessRotation(8, temperature=0.5).eval()
    >>> x = torch.arange(8.0)
    >>> (rotation.replace(x, torch.zeros(8)) - x).norm() < x.norm(), rotation.boundary.item()  # half of them
    (tensor(True), 0.5)
    """

    signs: Tensor

    def __init__(self, width: int | None = None, *, seed: int = 0, temperature: float = 50.0) -> None:
        super().__init__(temperature)
        self.seed = seed
        self.reflections = unbuilt()
        self.register_buffer("signs", torch.ones(0))
        self.logit = nn.Parameter(torch.zeros(()))
        self._build(width)

    @property
    def boundary(self) -> Float[Tensor, ""]:
        """The share of the rotated dims that is replaced, between 0 and 1, differentiable."""
        return self.logit.sigmoid()

    @property
    def size(self) -> Float[Tensor, ""]:
        """The expected share of the dims that is replaced: the boundary."""
        return self.boundary

    @property
    def directions(self) -> Float[Tensor, "width width"]:
        """The rotated dims as columns, `[width, width]`."""
        self._check_built()
        return frame(self.reflections, self.signs, at_least_single(self.reflections.dtype))

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that build this module again."""
        return {"width": self.width, "seed": self.seed, "temperature": self.temperature}

    def _initial(self, width: int) -> dict[str, Tensor]:
        return dict(zip(("reflections", "signs"), random_reflections(width, width, self.seed), strict=True))

    def _coordinates(self, x: Tensor) -> Tensor:
        return x @ frame(self.reflections, self.signs, x.dtype)

    def _replaced(self, x: Tensor, coordinates: Tensor) -> Tensor:
        directions = frame(self.reflections, self.signs, x.dtype)
        mask = self._mask().to(x.dtype)
        return x + (mask * difference(coordinates, x @ directions)) @ directions.T

    def _scores(self) -> Tensor:
        width = len(self.reflections)
        numbers = torch.arange(width, device=self.logit.device, dtype=at_least_single(self.logit.dtype)) + 0.5
        return self.boundary * width - numbers
