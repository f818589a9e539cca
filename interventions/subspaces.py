"""Which directions of an activation: learnable modules that read coordinates and write them back.

An operator at a location with a subspace acts on the coordinates; whatever the subspace does not span stays:
`subspace.replace(base, op(subspace.coordinates(base), subspace.coordinates(source), generator))`.

Half-precision activations are computed on in fp32, autocast or not: coordinates are then fp32 (rounded ones would leave
a residue of what they replace), and `replace` returns the dtype of its `x`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from interventions.errors import InterventionError


class Subspace(nn.Module, ABC):
    """Some directions of the last axis of an activation. Compared by identity, as every module.

    A subclass defines `_coordinates`, `_replaced` and `settings`.

    Attributes:
        width: length of the last axis; None: not known yet, or any.
    """

    width: int | None = None

    def coordinates(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... k"]:
        """The coordinates of `x` in the subspace, in fp32 where `x` is of half precision.

        Raises:
            InterventionError: `x` has another width than the subspace, or is on another device.
        """
        self._check_fit(x)
        with _full_precision(x):
            return self._coordinates(x.to(_precision(x)))

    def replace(self, x: Float[Tensor, "... d"], coordinates: Float[Tensor, "... k"]) -> Float[Tensor, "... d"]:
        """`x` with these coordinates; what the subspace does not span stays. `replace(x, coordinates(x))` is `x`.

        Raises:
            InterventionError: as `coordinates`; or there are more or fewer coordinates than those of `x`.
        """
        self._check_fit(x)
        with _full_precision(x):
            return self._replaced(x.to(_precision(x)), coordinates.to(_precision(x))).to(x.dtype)

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The arguments that, with the state dict, build the module again; what the state dict holds is not here."""

    @abstractmethod
    def _coordinates(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _replaced(self, x: Tensor, coordinates: Tensor) -> Tensor: ...

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings.items())

    def _check_fit(self, x: Tensor) -> None:
        if self.width is not None and x.shape[-1] != self.width:
            raise InterventionError(
                f"{type(self).__name__} spans directions of width {self.width} and was given a tensor of shape "
                f"{list(x.shape)}; build it with width={x.shape[-1]}, or name a location of width {self.width}."
            )
        device = next((tensor.device for tensor in chain(self.parameters(), self.buffers())), x.device)
        if device != x.device:
            raise InterventionError(
                f"{type(self).__name__} is on {device} and the activation on {x.device}; move it there: "
                f"subspace.to({str(x.device)!r})."
            )


class Learned(Subspace):
    """A subspace with parameters, which without `width` are made at the first call, from the width of its `x`.

    The parameters are there before that (an optimizer can be given them), but have no shape.
    """

    def _build(self, width: int | None, device: torch.device | None = None) -> None:
        """Fill the parameters for this width, and move to `device`; without a width that is left to the first call."""
        if width is None:
            return
        # A parameter made under inference_mode could never be trained.
        with torch.inference_mode(False), torch.no_grad():
            for name, value in self._initial(width).items():
                tensor = getattr(self, name)
                if isinstance(tensor, UninitializedParameter):
                    tensor.materialize(tuple(value.shape))
                    tensor.copy_(value)
                else:
                    setattr(self, name, value.to(tensor))
            self.to(device)
        self.width = width

    @abstractmethod
    def _initial(self, width: int) -> dict[str, Tensor]:
        """The first value of each parameter and buffer that depends on the width."""

    def _check_fit(self, x: Tensor) -> None:
        if self.width is None:
            self._build(x.shape[-1], x.device)
        super()._check_fit(x)

    def _known_width(self) -> int:
        if self.width is None:
            raise InterventionError(
                f"{type(self).__name__} was built without a width and has not run yet, so it holds no directions; "
                "write width=…, or run it once."
            )
        return self.width

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._known_width()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        unbuilt = [name for name, p in self._parameters.items() if isinstance(p, UninitializedParameter)]
        if unbuilt and prefix + unbuilt[0] in state_dict:
            self._build(len(state_dict[prefix + unbuilt[0]]))
        super()._load_from_state_dict(state_dict, prefix, *args)


class Rotation(Learned):
    """`dims` orthonormal directions: distributed alignment search (Geiger et al. 2023, arXiv:2303.02536, section 3).

    They are orthonormal whatever values the parameters take, and start as a uniformly random frame.

    Args:
        dims: how many directions.
        width: of the space; None: that of the first tensor seen.
        seed: of the first value.

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
        _check_dims(dims, width, "Rotation")
        self.dims, self.seed = dims, seed
        self.reflections = _unbuilt()
        self.register_buffer("signs", torch.ones(dims))
        self._build(width)

    @classmethod
    def from_directions(cls, directions: Float[Tensor, "width k"]) -> "Rotation":
        """The span of the columns of `directions`, orthonormalised from the first to the last (Gram–Schmidt).

        Raises:
            InterventionError: they are not finite or not linearly independent.

        >>> Rotation.from_directions(torch.tensor([[0.0], [2.0]])).directions.abs().tolist()
        [[0.0], [1.0]]
        """
        width, dims = directions.shape
        _check_dims(dims, width, "Rotation.from_directions(matrix [width, k])")
        _check_finite(directions, "Rotation.from_directions")
        rank = int(torch.linalg.matrix_rank(directions.detach().float().cpu()))
        if rank < dims:
            raise InterventionError(
                f"Rotation.from_directions was given {dims} directions of rank {rank}; leave out those that depend on "
                "the others."
            )
        rotation = cls(dims, width)
        with torch.no_grad():
            reflections, signs = _reflections(directions)
            rotation.reflections.copy_(reflections)
            rotation.signs.copy_(signs)
        return rotation.to(directions.device)

    @property
    def directions(self) -> Float[Tensor, "width k"]:
        """The directions as columns."""
        self._known_width()
        return _frame(self.reflections, self.signs, _precision(self.reflections))

    @property
    def settings(self) -> dict[str, Any]:
        return {"dims": self.dims, "width": self.width, "seed": self.seed}

    def _initial(self, width: int) -> dict[str, Tensor]:
        _check_dims(self.dims, width, "Rotation")
        return dict(zip(("reflections", "signs"), _random_reflections(width, self.dims, self.seed), strict=True))

    def _coordinates(self, x: Tensor) -> Tensor:
        return x @ _frame(self.reflections, self.signs, x.dtype)

    def _replaced(self, x: Tensor, coordinates: Tensor) -> Tensor:
        frame = _frame(self.reflections, self.signs, x.dtype)
        return x + _difference(coordinates, x @ frame) @ frame.T


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


class BoundlessRotation(SoftChoice):
    """A rotation of the whole space and how many of its first dims to replace: boundless distributed alignment search.

    Wu et al. 2023 (arXiv:2305.08809, section 3): rotated dim j is replaced by the share σ((boundary · width − j) / τ),
    j counted from ½. Penalise `boundary` to find the smallest subspace that does.

    Args:
        width: of the space; None: that of the first tensor seen.
        seed: of the first rotation.
        temperature: τ in dims; the paper anneals it from 50 to 0.1.

    >>> rotation = BoundlessRotation(8, temperature=0.5).eval()
    >>> x = torch.arange(8.0)
    >>> (rotation.replace(x, torch.zeros(8)) - x).norm() < x.norm(), rotation.boundary.item()  # half of them
    (tensor(True), 0.5)
    """

    signs: Tensor

    def __init__(self, width: int | None = None, *, seed: int = 0, temperature: float = 50.0) -> None:
        super().__init__(temperature)
        self.seed = seed
        self.reflections = _unbuilt()
        self.register_buffer("signs", torch.ones(0))
        self.logit = nn.Parameter(torch.zeros(()))
        self._build(width)

    @property
    def boundary(self) -> Float[Tensor, ""]:
        """The share of the dims that is replaced, differentiable."""
        return self.logit.sigmoid()

    @property
    def directions(self) -> Float[Tensor, "width width"]:
        """The rotated dims as columns."""
        self._known_width()
        return _frame(self.reflections, self.signs, _precision(self.reflections))

    @property
    def settings(self) -> dict[str, Any]:
        return {"width": self.width, "seed": self.seed, "temperature": self.temperature}

    def _initial(self, width: int) -> dict[str, Tensor]:
        return dict(zip(("reflections", "signs"), _random_reflections(width, width, self.seed), strict=True))

    def _coordinates(self, x: Tensor) -> Tensor:
        return x @ _frame(self.reflections, self.signs, x.dtype)

    def _replaced(self, x: Tensor, coordinates: Tensor) -> Tensor:
        frame = _frame(self.reflections, self.signs, x.dtype)
        numbers = torch.arange(x.shape[-1], device=x.device, dtype=x.dtype) + 0.5
        mask = self._chosen(self.boundary * x.shape[-1] - numbers).to(x.dtype)
        return x + (mask * _difference(coordinates, x @ frame)) @ frame.T


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
        self.logits = _unbuilt()
        self._build(width)

    @property
    def share(self) -> Float[Tensor, ""]:
        """The expected share of entries replaced, differentiable in either mode."""
        self._known_width()
        return (self.logits / self.tau).sigmoid().mean()

    @property
    def settings(self) -> dict[str, Any]:
        return {"width": self.width, "temperature": self.temperature}

    def _initial(self, width: int) -> dict[str, Tensor]:
        return {"logits": torch.zeros(width)}

    def _coordinates(self, x: Tensor) -> Tensor:
        return x

    def _replaced(self, x: Tensor, coordinates: Tensor) -> Tensor:
        _difference(coordinates, x)
        mask = self._chosen(self.logits).to(x.dtype)
        return torch.lerp(x, coordinates, mask.expand_as(x))  # exact at both ends


class PCA(Subspace):
    """Fixed directions: the principal components of given vectors.

    Args:
        mean: `[width]`.
        components: `[dims, width]` orthonormal rows, as `components_` of scikit-learn.
        explained_variance_ratio: `[dims]`, the share of the variance along each.

    Raises:
        InterventionError: data that are not finite, components that are not orthonormal or do not fit the mean.

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
        _check_finite(torch.cat([mean.flatten(), components.flatten()]), "PCA")
        if components.shape[-1] != len(mean):
            raise InterventionError(
                f"PCA has a mean of width {len(mean)} and components of shape {list(components.shape)}; give them as "
                "[dims, width], e.g. components.T."
            )
        products = components.detach().double() @ components.detach().double().T
        if not torch.allclose(products, torch.eye(len(products), device=products.device).double(), atol=1e-3):
            raise InterventionError(
                f"PCA has components that are not orthonormal: their products are up to {products.abs().max():.3g}; "
                "use PCA.fit(vectors, dims), or Rotation.from_directions(components.T)."
            )
        self.width = len(mean)
        self.register_buffer("mean", mean)
        # In one layout, so that what is loaded rounds as what was saved.
        self.register_buffer("components", components.clone(memory_format=torch.contiguous_format))
        self.register_buffer("explained_variance_ratio", explained_variance_ratio)

    @classmethod
    def fit(cls, vectors: Float[Tensor, "n d"], dims: int) -> "PCA":
        """The first `dims` components of `vectors`, the largest entry of each positive.

        Raises:
            InterventionError: vectors that are not finite, or span fewer than `dims` directions around their mean.
        """
        n, width = vectors.shape
        _check_dims(dims, width, "PCA.fit")
        _check_finite(vectors, "PCA.fit")
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
        return x + _difference(coordinates, self._coordinates(x)) @ self.components.to(x.dtype)


class SparseCoder(Subspace):
    """The features of an encoder and its decoder, e.g. a sparse autoencoder (Cunningham et al. 2023, arXiv:2309.08600).

    What it does not reconstruct stays: `replace(x, z)` is `x + decode(z) − decode(encode(x))`.

    Args:
        encode: `[..., width] → [..., features]`. Modules, and the modules whose methods are given
            (`SparseCoder(sae.encode, sae.decode)`), are trained, moved and saved with this one, and are given their own
            dtype; other functions are given fp32.
        decode: `[..., features] → [..., width]`.
        features: which of the features are the coordinates; None: all.

    Raises:
        InterventionError: features that are not distinct numbers from 0 on; when called, a result of another shape.

    >>> coder = SparseCoder(torch.relu, lambda z: z, features=[0])
    >>> coder.replace(torch.tensor([1.0, 2.0, -3.0]), torch.tensor([5.0])).tolist()
    [5.0, 2.0, -3.0]
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        decode: Callable[[Tensor], Tensor],
        features: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if features is not None and (not features or min(features) < 0 or len(set(features)) < len(features)):
            raise InterventionError(
                f"SparseCoder(features={list(features)}) does not name features once each, counted from 0; write "
                "features=[3, 17], or leave it out for all."
            )
        self.encode, self.decode = encode, decode
        self.features = None if features is None else tuple(features)
        owners = (getattr(function, "__self__", None) for function in (encode, decode))
        self.owners = nn.ModuleList(dict.fromkeys(owner for owner in owners if isinstance(owner, nn.Module)))

    @property
    def settings(self) -> dict[str, Any]:
        return {"features": None if self.features is None else list(self.features)}

    def _coordinates(self, x: Tensor) -> Tensor:
        return self._selected(self._encoded(x)).to(x.dtype)

    def _replaced(self, x: Tensor, coordinates: Tensor) -> Tensor:
        old = self._encoded(x)
        _difference(coordinates, self._selected(old))
        new = coordinates.to(old.dtype)
        if self.features is not None:
            new = old.index_copy(-1, torch.tensor(self.features, device=old.device), new)
        change = self.decode(new) - self.decode(old)
        if change.shape != x.shape:
            raise InterventionError(
                f"decode of SparseCoder returned shape {list(change.shape)} for an activation of shape "
                f"{list(x.shape)}; return one vector of width {x.shape[-1]} for each."
            )
        return x + change.to(x.dtype)

    def _encoded(self, x: Tensor) -> Tensor:
        own = next((p.dtype for p in chain(self.parameters(), self.buffers()) if p.is_floating_point()), x.dtype)
        encoded = self.encode(x.to(own))
        if not isinstance(encoded, Tensor) or encoded.shape[:-1] != x.shape[:-1]:
            got = f"shape {list(encoded.shape)}" if isinstance(encoded, Tensor) else type(encoded).__name__
            raise InterventionError(
                f"encode of SparseCoder returned {got} for an activation of shape {list(x.shape)}; return a tensor "
                f"{[*x.shape[:-1], 'features']}."
            )
        return encoded

    def _selected(self, encoded: Tensor) -> Tensor:
        if self.features is None:
            return encoded
        if max(self.features) >= encoded.shape[-1]:
            raise InterventionError(
                f"SparseCoder(features=…) names feature {max(self.features)} and encode returns "
                f"{encoded.shape[-1]}; write features=range(0, {encoded.shape[-1]})."
            )
        return encoded[..., list(self.features)]


# Why reflections: a product of Householder reflections is orthogonal for any vectors, as their length does not enter.
# The exponential and the Cayley map of a skew matrix lose that in fp32 once the matrix is large, and the gradient of a
# QR or polar factor is infinite where columns depend on each other. k reflections reach every frame of k directions, at
# the cost of two products of [width, k] with [k, k] (Mhammedi et al. 2017, arXiv:1612.00188).
def _frame(reflections: Tensor, signs: Tensor, dtype: torch.dtype) -> Tensor:
    """The first k columns of H₁ ⋯ Hₖ, each with its sign, Hⱼ = I − 2 v vᵀ / vᵀv for column v = vⱼ; for v = 0 it is I.

    By the compact form I − V T Vᵀ of the product (Schreiber, Van Loan 1989), T⁻¹ = the upper triangle of VᵀV, its
    diagonal halved.
    """
    with _full_precision(reflections):
        vectors = reflections.to(torch.promote_types(reflections.dtype, dtype))
        largest = vectors.detach().abs().amax(0)
        vectors = vectors / torch.where(largest > 0, largest, 1)  # squares of 1e30 or 1e-30 are not fp32 numbers
        products = vectors.T @ vectors
        halves = torch.where(largest > 0, products.diagonal() / 2, 1)
        inverse = products.triu(1) + halves.diag()
        mixed = torch.linalg.solve_triangular(inverse, vectors[: len(halves)].T, upper=True)
        start = torch.eye(*vectors.shape, dtype=vectors.dtype, device=vectors.device)
        return ((start - vectors @ mixed) * signs).to(dtype)


def _reflections(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`(reflections, signs)` whose frame is the Q of matrix = Q R with a positive diagonal of R."""
    packed, tau = torch.geqrf(matrix.detach().cpu().double())
    vectors = packed.tril(-1) + torch.eye(*packed.shape, dtype=packed.dtype)
    # Where LAPACK skips a reflection (τ = 0), ours along that axis flips one sign, and can be learned.
    signs = torch.where(packed.diagonal() < 0, -1.0, 1.0) * torch.where(tau == 0, -1.0, 1.0)
    return vectors.float(), signs.float()


def _unbuilt() -> nn.Parameter:
    return UninitializedParameter(dtype=torch.float32)  # type: ignore[call-arg, return-value]


def _random_reflections(width: int, dims: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cpu").manual_seed(seed)
    return _reflections(torch.randn(width, dims, generator=generator, device="cpu"))


def _full_precision(x: Tensor) -> AbstractContextManager[Any]:
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def _precision(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _difference(new: Tensor, old: Tensor) -> Tensor:
    if new.shape != old.shape:
        raise InterventionError(
            f"replace was given coordinates of shape {list(new.shape)} and those of x have {list(old.shape)}; give as "
            "many as subspace.coordinates(x)."
        )
    return new - old


def _check_dims(dims: int, width: int | None, what: str) -> None:
    if dims < 1 or (width is not None and dims > width):
        space = "" if width is None else f" in a space of width {width}"
        raise InterventionError(f"{what} was asked for {dims} directions{space}; write dims=1 to dims={width or '…'}.")


def _check_finite(tensor: Tensor, what: str) -> None:
    if not tensor.isfinite().all():
        raise InterventionError(
            f"{what} was given values that are not finite: {int((~tensor.isfinite()).sum())} of {tensor.numel()}; "
            "leave those vectors out, e.g. vectors[vectors.isfinite().all(1)]."
        )
