"""Pure losses between what a student and a teacher computed: tensors in, one scalar out.

Every loss averages over positions: over the batch for `[B, C]`, over the tokens that `mask` keeps for `[B, T, V]`, so
that padding changes nothing. Half precision is converted to float32 before anything is computed, and the value is in
float32 too.
"""

from distill.losses.boundary import BoundarySamples, boundary_samples, most_different
from distill.losses.contrastive import contrast, invariance, nce
from distill.losses.decoupled import dkd, nckd, tckd
from distill.losses.derivatives import sobolev, sobolev_terms
from distill.losses.features import attention_transfer, cosine, hint, patient
from distill.losses.labels import binary_cross_entropy, cross_entropy, mean_squared_error
from distill.losses.noise import LogitNoise
from distill.losses.response import (
    Divergence,
    forward_kl,
    jensen_shannon,
    kd,
    multi_label_kd,
    reverse_kl,
    soft_cross_entropy,
    squared_error,
)

__all__ = [
    "BoundarySamples",
    "Divergence",
    "LogitNoise",
    "attention_transfer",
    "binary_cross_entropy",
    "boundary_samples",
    "contrast",
    "cosine",
    "cross_entropy",
    "dkd",
    "forward_kl",
    "hint",
    "invariance",
    "jensen_shannon",
    "kd",
    "mean_squared_error",
    "most_different",
    "multi_label_kd",
    "nce",
    "nckd",
    "patient",
    "reverse_kl",
    "sobolev",
    "sobolev_terms",
    "soft_cross_entropy",
    "squared_error",
    "tckd",
]
