"""Orthonormal frames as products of Householder reflections.

A frame of k directions is the first k columns of H₁ ⋯ Hₖ with Hⱼ = I − 2 vⱼvⱼᵀ / vⱼᵀvⱼ, and the vectors vⱼ are what is
learned. A product of reflections is orthogonal for any vectors, because their lengths cancel. The exponential and the
Cayley map of a skew matrix lose that in fp32 once the matrix is large, and the gradient of a QR or polar factor is
infinite where columns depend on each other. k reflections reach every frame of k directions, at the cost of two
products of [width, k] with [k, k] (Mhammedi et al. 2017, arXiv:1612.00188).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interventions.endings import setting

_shared: ContextVar[dict[tuple, tuple[Tensor, Tensor, Tensor]] | None] = ContextVar("shared frames", default=None)


def frame(
    reflections: Float[Tensor, "width k"], signs: Float[Tensor, " k"], dtype: torch.dtype
) -> Float[Tensor, "width k"]:
    """Return the first k columns of H₁ ⋯ Hₖ, each times its sign: an orthonormal frame.

    Hⱼ = I − 2 vvᵀ / vᵀv for v = column j of `reflections`, and I for v = 0. The product is computed in its compact form
    I − V T Vᵀ, where T⁻¹ is the upper triangle of VᵀV with its diagonal halved (Schreiber, Van Loan 1989).

    >>> frame(torch.tensor([[1.0], [1.0]]), torch.ones(1), torch.float32).tolist()  # the first axis becomes −(second)
    [[0.0], [-1.0]]
    """
    known = _shared.get()
    key = (id(reflections), reflections._version, id(signs), signs._version, dtype, torch.is_grad_enabled())
    if known is not None and key in known:
        return known[key][0]
    with full_precision(reflections):
        vectors = reflections.to(torch.promote_types(reflections.dtype, dtype))
        largest = vectors.detach().abs().amax(0)
        vectors = vectors / torch.where(largest > 0, largest, 1)  # squares of 1e30 or 1e-30 are not fp32 numbers
        products = vectors.T @ vectors
        halves = torch.where(largest > 0, products.diagonal() / 2, 1)
        mixed = torch.linalg.solve_triangular(products.triu(1) + halves.diag(), vectors[: len(halves)].T, upper=True)
        start = torch.eye(*vectors.shape, dtype=vectors.dtype, device=vectors.device)
        result = ((start - vectors @ mixed) * signs).to(dtype)
    if known is not None:
        known[key] = (result, reflections, signs)  # they are kept so that no other tensor gets their id
    return result


@contextmanager
def shared_frames() -> Iterator[None]:
    """Compute each frame only once inside the block, which is for evaluation: nothing may be trained in it."""
    with setting(_shared, {}):
        yield


def reflections_of(matrix: Float[Tensor, "width k"]) -> tuple[Float[Tensor, "width k"], Float[Tensor, " k"]]:
    """Return `(reflections, signs)` whose frame is Q in matrix = Q R, where the diagonal of R is positive."""
    packed, tau = torch.geqrf(matrix.detach().cpu().double())
    vectors = packed.tril(-1) + torch.eye(*packed.shape, dtype=packed.dtype)
    # LAPACK skips a reflection where τ = 0. The one along that axis, which flips a sign, is kept: it can be learned.
    signs = torch.where(packed.diagonal() < 0, -1.0, 1.0) * torch.where(tau == 0, -1.0, 1.0)
    return vectors.float(), signs.float()


def random_reflections(width: int, k: int, seed: int) -> tuple[Float[Tensor, "width k"], Float[Tensor, " k"]]:
    """Return `(reflections, signs)` of a frame drawn uniformly (by the Haar measure) on the CPU."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return reflections_of(torch.randn(width, k, generator=generator, device="cpu"))


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which autocast is off on the device of `x`."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
