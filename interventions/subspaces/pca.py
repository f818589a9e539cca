"""Principal component analysis: the directions in which given vectors vary most, as a fixed subspace.

The rows of `components` C, `[dims, width]`, are the first right singular vectors of the vectors minus their mean μ.
Coordinates are (x − μ) Cᵀ, and replacing them gives x + (z − (x − μ) Cᵀ) C.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interventions.arguments import checked
from interventions.errors import InterventionError
from interventions.names import shown
from interventions.subspaces.subspace import Subspace, check_dims, difference


@checked
class PCA(Subspace):
    """A subspace of fixed directions: the principal components of given vectors.

    `PCA.fit(vectors, dims)` is fitted at once; `PCA(dims)` is fitted later, by `pca.fit_to(vectors)` or by alignment.
    The components are no parameters, so alignment does not train them (`learned()` is empty).

    Args:
        dims: the number of components.
        width: the width of the space; None takes that of the vectors it is fitted to.

    Attributes:
        mean: `[width]`.
        components: `[dims, width]` orthonormal rows.
        explained_variance_ratio: `[dims]`, the share of the variance along each; None where it is not known.

    Raises:
        InterventionError: more dims than the width; when called, it is not fitted yet.

    >>> pca = PCA(1).fit_to(torch.tensor([[0.0, 0.0], [2.0, 0.1], [4.0, 0.0]]))
    >>> pca.replace(torch.tensor([4.0, 7.0]), torch.zeros(1)).round(decimals=2).tolist()  # to the mean of the first
    [2.0, 7.0]
    """

    mean: Tensor
    components: Tensor
    explained_variance_ratio: Tensor | None

    def __init__(self, dims: int, width: int | None = None) -> None:
        super().__init__()
        check_dims(dims, width, "PCA")
        self.dims, self.width = dims, width
        self.register_buffer("mean", torch.empty(0))
        self.register_buffer("components", torch.empty(dims, 0))
        self.register_buffer("explained_variance_ratio", None)

    @classmethod
    @checked
    def fit(cls, vectors: Float[Tensor, "*n d"], dims: int) -> "PCA":
        """Return `PCA(dims)` fitted to `vectors`, `[..., width]`; it raises what `fit_to` raises.

        >>> PCA.fit(torch.tensor([[0.0, 0.0], [2.0, 0.1], [4.0, 0.0]]), dims=1)
        PCA(dims=1, width=2)
        """
        return cls(dims).fit_to(vectors)

    @classmethod
    @checked
    def from_components(
        cls,
        mean: Float[Tensor, " width"],
        components: Float[Tensor, "dims d"],
        explained_variance_ratio: Float[Tensor, " dims"] | None = None,
    ) -> "PCA":
        """Return a PCA of components computed elsewhere, e.g. `mean_` and `components_` of scikit-learn.

        Args:
            mean: `[width]`, subtracted before the components are read.
            components: `[dims, width]`, orthonormal rows.
            explained_variance_ratio: `[dims]`, the share of the variance along each; None where it is not known.

        Raises:
            InterventionError: components that are not orthonormal rows.

        >>> PCA.from_components(torch.zeros(3), torch.eye(3)[:2])
        PCA(dims=2, width=3)
        """
        products = components.detach().double() @ components.detach().double().T
        if not torch.allclose(products, torch.eye(len(products), device=products.device).double(), atol=1e-3):
            raise InterventionError(
                f"PCA has components of shape {list(components.shape)} that are not orthonormal rows [dims, width]; "
                "use PCA.fit(vectors, dims), or Rotation.from_directions(components.T)."
            )
        pca = cls(len(components), len(mean))
        pca._hold(mean, components, explained_variance_ratio)
        return pca

    @property
    def fitted(self) -> bool:
        """True once the components are known."""
        return len(self.mean) > 0

    @torch.inference_mode(False)  # a tensor made under it could not be differentiated through
    def fit_to(self, vectors: Float[Tensor, "*n d"]) -> "PCA":
        """Set the components to the first `dims` of `vectors`, `[..., width]`, and return the module itself.

        The largest entry of each component is positive. All axes but the last count examples, so leave padding out:
        `activation[mask.bool()]`.

        Raises:
            InterventionError: vectors of another width, that are not finite, or that vary in fewer than `dims`
                directions.
        """
        super()._check_fit(vectors)
        if vectors.is_meta or vectors.layout != torch.strided or not vectors.numel() or not vectors.isfinite().all():
            raise InterventionError(
                f"PCA was given {shown(vectors)} ({vectors.device}, {vectors.layout}), which is empty, without values, "
                "or holds NaN or infinite ones; give the vectors of real tokens, all finite."
            )
        data = vectors.detach().reshape(-1, vectors.shape[-1]).cpu().double()
        check_dims(self.dims, data.shape[1], "PCA")
        mean = data.mean(0)
        _, scales, components = torch.linalg.svd(data - mean, full_matrices=False)
        rank = int((scales > 1e-10 * data.abs().max() * max(data.shape)).sum())
        if rank < self.dims:
            raise InterventionError(
                f"PCA(dims={self.dims}) has too few directions: {len(data)} vectors vary in {rank}; give more vectors, "
                f"or dims={rank}."
            )
        components, ratio = components[: self.dims], (scales.square() / scales.square().sum())[: self.dims]
        signs = components.gather(1, components.abs().argmax(1, keepdim=True)).sign()
        self._hold(*(value.float().to(vectors.device) for value in (mean, components * signs, ratio)))
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that build this module again."""
        return {"dims": self.dims, "width": self.width}

    def _hold(self, mean: Tensor, components: Tensor, ratio: Tensor | None) -> None:
        # All in one memory layout, so that a loaded module rounds exactly as the saved one.
        self.mean, self.components = mean, components.clone(memory_format=torch.contiguous_format)
        self.explained_variance_ratio = ratio
        self.width = len(mean)

    def _coordinates(self, x: Tensor) -> Tensor:
        return (x - self.mean.to(x.dtype)) @ self.components.to(x.dtype).T

    def _replaced(self, x: Tensor, coordinates: Tensor) -> Tensor:
        return x + difference(coordinates, self._coordinates(x)) @ self.components.to(x.dtype)

    def _check_fit(self, x: Tensor) -> None:
        self._check_fitted()
        super()._check_fit(x)

    def _check_fitted(self) -> None:
        if not self.fitted:
            raise InterventionError(
                f"PCA(dims={self.dims}) is not fitted yet, so it holds no directions; write PCA.fit(vectors, "
                f"dims={self.dims}) or pca.fit_to(vectors), or have distill.align fit it."
            )

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._check_fitted()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        names = ("mean", "components", "explained_variance_ratio")
        mean, components, ratio = (state_dict.get(prefix + name) for name in names)
        shape = (self.dims, self.width or (0 if mean is None else len(mean)))
        if not self.fitted and mean is not None and components is not None and components.shape == shape:
            device = self.mean.device
            empty = None if ratio is None else torch.empty_like(ratio, device=device)
            self._hold(torch.empty_like(mean, device=device), torch.empty_like(components, device=device), empty)
        super()._load_from_state_dict(state_dict, prefix, *args)
