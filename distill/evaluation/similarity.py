"""How alike two networks represent the same examples."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from distill.errors import DistillError, checked
from distill.precision import at_least_single

CHUNK = 1024  # rows of the similarity matrices held at a time


@checked
def representational_similarity(a: Float[Tensor, "n d1"], b: Float[Tensor, "others d2"]) -> Float[Tensor, ""]:
    """How alike two networks find the same pairs of examples, from −1 to 1.

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
    a, b = _checked(a, b)
    units = _unit(a, "first"), _unit(b, "second")
    rows = []
    for chunk in torch.arange(len(a), device=a.device).split(CHUNK):
        one, other = (vectors[chunk] @ vectors.T for vectors in units)
        rows.append(torch.cosine_similarity(one, other, dim=-1))
    return torch.cat(rows).mean()


@checked
def cka(a: Float[Tensor, "n d1"], b: Float[Tensor, "others d2"]) -> Float[Tensor, ""]:
    """Linear centred kernel alignment, from 0 to 1: ‖BᵀA‖² / (‖AᵀA‖ ‖BᵀB‖) of the centred activations.

    It does not change where either is rotated, scaled or moved. It is the biased estimate: with fewer examples than
    dims, unrelated activations come near 1. Computed from the d × d or the n × n products, whichever cost less; both
    are the same number.

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
    a, b = _checked(a, b)
    a, b = _centred(a, "first"), _centred(b, "second")
    (n, wide), narrow = a.shape, b.shape[1]
    by_features = wide * wide + narrow * narrow + wide * narrow <= n * (wide + narrow)
    return _of_features(a, b) if by_features else _of_examples(a, b)


def _of_features(a: Float[Tensor, "n d1"], b: Float[Tensor, "n d2"]) -> Float[Tensor, ""]:
    """CKA from products between dims, for centred activations."""
    return (b.T @ a).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm())


def _of_examples(a: Float[Tensor, "n d1"], b: Float[Tensor, "n d2"]) -> Float[Tensor, ""]:
    """CKA from products between examples, for centred activations."""
    one, other = a @ a.T, b @ b.T
    return (one * other).sum() / (one.norm() * other.norm())


def _checked(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both as matrices of one dtype, at least float32, and scaled so that no product overflows."""
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


def _unit(vectors: Float[Tensor, "n dims"], name: str) -> Float[Tensor, "n dims"]:
    """Every vector at length 1."""
    largest = vectors.abs().amax(1)
    if (largest == 0).any():
        raise DistillError(
            f"the {name} activations of example {int((largest == 0).nonzero()[0])} are all 0 and have no direction; "
            "leave the example out, or compare by cka."
        )
    scaled = vectors / rearrange(largest, "n -> n 1")
    return scaled / scaled.norm(dim=1, keepdim=True)


def _centred(vectors: Float[Tensor, "n dims"], name: str) -> Float[Tensor, "n dims"]:
    """The vectors without their mean, at most 1 in every dim."""
    if (vectors == vectors[:1]).all():
        raise DistillError(
            f"the {name} activations are the same for all {len(vectors)} examples, so there is nothing to compare; "
            "give several different examples."
        )
    scaled = vectors / vectors.abs().max()
    centred = scaled - scaled.mean(0, keepdim=True)
    return centred / centred.abs().max()
