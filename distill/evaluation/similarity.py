"""Similarities of two networks' representations of the same examples.

Representational similarity compares the n × n matrices of cosines C between the vectors of each network, row by row,

    1/n Σ_i cos(C_a[i], C_b[i]),

and linear centered kernel alignment (CKA) the centered activations A and B,

    ‖BᵀA‖² / (‖AᵀA‖ ‖BᵀB‖).

Abnar, Dehghani, Zuidema 2020 (arXiv:2006.00555); Kornblith, Norouzi, Lee, Hinton 2019 (arXiv:1905.00414).
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from distill.errors import DistillError, checked
from distill.precision import at_least_single

CHUNK = 1024  # rows of the similarity matrices held at a time


@checked
def representational_similarity(a: Float[Tensor, "n d1"], b: Float[Tensor, "others d2"]) -> Float[Tensor, ""]:
    """Similarity, from −1 to 1, of the cosines that two networks give to the same pairs of examples.

    Each network gives an n × n matrix of the cosines between its vectors. The result is the mean over the examples of
    the cosine between the row of the one matrix and the row of the other. It is 1 for a network with itself, and does
    not change where either is rotated or scaled, or the length of single vectors changes; it does where vectors move.

    Abnar, Dehghani, Zuidema 2020 (arXiv:2006.00555), section 4; after Kriegeskorte, Mur, Bandettini 2008
    (doi:10.3389/neuro.06.004.2008).

    Args:
        a: a vector for each of n examples.
        b: those of the other network for the same examples; the width may differ.

    Raises:
        DistillError: another number of examples, a vector that is 0, or one that is not finite.

    >>> a, b = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0], [3.0]])
    >>> representational_similarity(a, b)  # rows (1, 0) and (0, 1) with (1, 1) and (1, 1): ½ √2
    tensor(0.7071)
    """
    a, b = _check_and_widen(a, b)
    units = _normalize(a, "first"), _normalize(b, "second")
    rows = []
    for chunk in torch.arange(len(a), device=a.device).split(CHUNK):
        one, other = (vectors[chunk] @ vectors.T for vectors in units)
        rows.append(torch.cosine_similarity(one, other, dim=-1))
    return torch.cat(rows).mean()


@checked
def cka(a: Float[Tensor, "n d1"], b: Float[Tensor, "others d2"]) -> Float[Tensor, ""]:
    """Linear centered kernel alignment, from 0 to 1: ‖BᵀA‖² / (‖AᵀA‖ ‖BᵀB‖) of the centered activations.

    It does not change where either is rotated, scaled or moved. It is the biased estimate: with fewer examples than
    dims, unrelated activations come near 1. It is computed from the d × d or the n × n products, whichever cost less;
    both are the same number.

    Kornblith, Norouzi, Lee, Hinton 2019 (arXiv:1905.00414), section 3.

    Args:
        a: a vector for each of n examples.
        b: those of the other network for the same examples; the width may differ.

    Raises:
        DistillError: another number of examples, the same vector for all of them, or one that is not finite.

    >>> a, b = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]), torch.tensor([[2.0], [-2.0], [0.0]])
    >>> cka(a, b)
    tensor(1.)
    """
    a, b = _check_and_widen(a, b)
    a, b = _center(a, "first"), _center(b, "second")
    (n, wide), narrow = a.shape, b.shape[1]
    by_features = wide * wide + narrow * narrow + wide * narrow <= n * (wide + narrow)
    return _cka_by_dims(a, b) if by_features else _cka_by_examples(a, b)


def _cka_by_dims(a: Float[Tensor, "n d1"], b: Float[Tensor, "n d2"]) -> Float[Tensor, ""]:
    """CKA from products between dims, for centered activations."""
    return (b.T @ a).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm())


def _cka_by_examples(a: Float[Tensor, "n d1"], b: Float[Tensor, "n d2"]) -> Float[Tensor, ""]:
    """CKA from products between examples, for centered activations."""
    one, other = a @ a.T, b @ b.T
    return (one * other).sum() / (one.norm() * other.norm())


def _check_and_widen(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in one dtype of at least float32.

    Raises:
        DistillError: other numbers of examples, other devices, or values that are not finite.
    """
    if a.shape[0] != b.shape[0] or not len(a):
        raise DistillError(
            f"the activations are of {a.shape[0]} and of {b.shape[0]} examples; run both networks on the same, in the "
            "same order."
        )
    if a.is_meta or a.device != b.device:
        raise DistillError(
            f"the activations lie on {a.device} and on {b.device}; compare values on one device, as with a.cpu(), "
            "b.cpu()."
        )
    dtype = at_least_single(torch.promote_types(a.dtype, b.dtype))
    for name, given in (("first", a), ("second", b)):
        if not given.isfinite().all():
            row = int((~given.isfinite()).any(1).nonzero()[0])
            raise DistillError(
                f"the {name} activations of example {row} are not finite; look at what the network gave."
            )
    return a.to(dtype), b.to(dtype)


def _normalize(vectors: Float[Tensor, "n dims"], name: str) -> Float[Tensor, "n dims"]:
    """Return every vector at length 1.

    Raises:
        DistillError: a vector is 0.
    """
    largest = vectors.abs().amax(1)
    if (largest == 0).any():
        raise DistillError(
            f"the {name} activations of example {int((largest == 0).nonzero()[0])} are all 0 and have no direction; "
            "leave the example out, or compare by cka."
        )
    scaled = vectors / rearrange(largest, "n -> n 1")
    return scaled / scaled.norm(dim=1, keepdim=True)


def _center(vectors: Float[Tensor, "n dims"], name: str) -> Float[Tensor, "n dims"]:
    """Return the vectors without their mean, scaled to at most 1 so that no product overflows.

    Raises:
        DistillError: all vectors are the same.
    """
    if (vectors == vectors[:1]).all():
        raise DistillError(
            f"the {name} activations are the same for all {len(vectors)} examples, so there is nothing to compare; "
            "give several different examples."
        )
    scaled = vectors / vectors.abs().max()
    centered = scaled - scaled.mean(0, keepdim=True)
    return centered / centered.abs().max()
