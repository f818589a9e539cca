"""Principal components: fixed directions."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interventions.errors import InterventionError
from interventions.subspaces.subspace import Subspace, check_dims, difference


class PCA(Subspace):
    """Fixed directions: the principal components of given vectors.

    Args:
        mean: `[width]`.
        components: `[dims, width]` orthonormal rows, as `components_` of scikit-learn.
        explained_variance_ratio: `[dims]`, the share of the variance along each.

    Raises:
        InterventionError: components that are not orthonormal rows.

    >>> pca = PCA.fit(torch.tensor([[0.0, 0.0], [2.0, 0.1], [4.0, 0.0]]), dims=1)
    >>> pca.replace(torch.tensor([4.0, 7.0]), torch.zeros(1)).round(decimals=2).tolist()  # to the mean of the first
    [2.0, 7.0]
    """

    mean: Tensor
    components: Tensor
    explained_variance_ratio: Tensor | None

    def __init__(
        self,
        mean: Float[Tensor, " width"],
        components: Float[Tensor, "dims d"],
        explained_variance_ratio: Float[Tensor, " dims"] | None = None,
    ) -> None:
        super().__init__()
        products = components.detach().double() @ components.detach().double().T
        if not torch.allclose(products, torch.eye(len(products), device=products.device).double(), atol=1e-3):
            raise InterventionError(
                f"PCA has components of shape {list(components.shape)} that are not orthonormal rows [dims, width]; "
                "use PCA.fit(vectors, dims), or Rotation.from_directions(components.T)."
            )
        self.width = len(mean)
        self.register_buffer("mean", mean)
        # In one layout, so that what is loaded rounds as what was saved.
        self.register_buffer("components", components.clone(memory_format=torch.contiguous_format))
        self.register_buffer("explained_variance_ratio", explained_variance_ratio)

    def extra_repr(self) -> str:
        """For printing."""
        return f"dims={len(self.components)}, width={self.width}"

    @classmethod
    def fit(cls, vectors: Float[Tensor, "*n d"], dims: int) -> "PCA":
        """The first `dims` components of `vectors`, the largest entry of each positive.

        All axes but the last count examples: leave padding out, e.g. `activation[mask.bool()]`.

        Raises:
            InterventionError: vectors that span fewer than `dims` directions around their mean.
        """
        vectors = vectors.reshape(-1, vectors.shape[-1])
        n, width = vectors.shape
        check_dims(dims, width, "PCA.fit")
        data = vectors.detach().cpu().double()
        mean = data.mean(0)
        _, scales, components = torch.linalg.svd(data - mean, full_matrices=False)
        rank = int((scales > 1e-10 * data.abs().max() * max(n, width)).sum())
        if rank < dims:
            raise InterventionError(
                f"PCA.fit(dims={dims}) has too few directions: {n} vectors vary in {rank}; give more vectors, or "
                f"dims={rank}."
            )
        components = components[:dims]
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        ratio = (scales.square() / scales.square().sum())[:dims]
        return cls(mean.float(), (components * largest.sign()).float(), ratio.float()).to(vectors.device)

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    def _coordinates(self, x: Tensor) -> Tensor:
        return (x - self.mean.to(x.dtype)) @ self.components.to(x.dtype).T

    def _replaced(self, x: Tensor, coordinates: Tensor) -> Tensor:
        return x + difference(coordinates, self._coordinates(x)) @ self.components.to(x.dtype)
