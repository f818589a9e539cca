"""Right calls of the public names of `distill.losses`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distill import losses
from tests.faults.fuzz.attack import Recipe

COMPARED = "floats|nan tensor|inf tensor|half tensor"
"""Tensors of the right shape; a loss of what is no number is none, as torch's own, and `fit` refuses it."""
NETWORK = "linear|training network|identity|empty network"
MASK = "None|floats|whole tensor|bool tensor|bytes tensor|half tensor|nan tensor|inf tensor|huge whole tensor"
TEMPERATURE = "positive|scalar tensor"


def logits(seed: int = 0, *shape: int) -> Tensor:
    """Return some logits."""
    return torch.randn(shape or (2, 4), generator=torch.Generator().manual_seed(seed))


def logs(seed: int = 0) -> Tensor:
    """Return some log-probabilities."""
    return logits(seed).log_softmax(-1)


def maps(seed: int = 0) -> Tensor:
    """Return maps of features."""
    return logits(seed, 2, 3, 4, 4)


def labels() -> Tensor:
    """Return a class for each of two examples."""
    return torch.tensor([0, 3])


def two(**more: Any) -> Callable[[], dict[str, Any]]:
    """Return what makes logits of both sides."""
    return lambda: {"student_logits": logits(), "teacher_logits": logits(1)} | more


def compared(name: str, right: Callable[[], dict[str, Any]], *, own: tuple[str, ...] = (), **takes: str) -> Recipe:
    """Return the recipe of a loss of two tensors and settings."""
    one, other = list(right())[:2]
    return Recipe(f"losses.{name}", getattr(losses, name), right, {one: COMPARED, other: COMPARED, **takes}, own)


def perturbed(sigma: Any, share: Any, kind: Any, values: Any, generator: Any) -> Tensor:
    """Return logits with noise."""
    return losses.LogitNoise(sigma, share, kind)(values, generator)


def line(x: Tensor) -> Tensor:
    """Return two logits of inputs of one axis."""
    return torch.stack([x.sum(1), -x.sum(1)], 1)


RECIPES = [
    *(
        compared(name, lambda: {"student": logs(), "teacher": logs(1)})
        for name in ("forward_kl", "reverse_kl")
    ),
    compared("jensen_shannon", lambda: {"student": logs(), "teacher": logs(1), "beta": 0.5},
             beta="0.5|numpy float"),
    compared("kd", lambda: two(temperature=2.0, reduction="batchmean", scale_t2=True, mask=None,
                               divergence=losses.forward_kl)(),
             temperature=TEMPERATURE, reduction="choice", scale_t2="flag", mask="None", divergence="choice",
             own=("divergence",)),
    compared("multi_label_kd", two(temperature=2.0, reduction="batchmean", scale_t2=True, mask=None),
             temperature=TEMPERATURE, reduction="choice", scale_t2="flag", mask="None"),
    compared("soft_cross_entropy", lambda: {"student": logits(), "teacher": logits(1), "temperature": 2.0,
                                            "mask": None},
             temperature=TEMPERATURE, mask="None"),
    compared("squared_error", two(mask=None), mask="None"),
    compared("cosine", lambda: {"student": logits(), "teacher": logits(1), "mask": None}, mask="None"),
    Recipe("losses.cosine of tokens", losses.cosine,
           lambda: {"student": logits(0, 2, 4, 3), "teacher": logits(1, 2, 4, 3), "mask": torch.ones(2, 4)},
           {"mask": MASK}),
    compared("patient", lambda: {"student_cls": logits(), "teacher_cls": logits(1)}),
    compared("hint", lambda: {"student": logits(), "teacher": logits(1), "mask": None}, mask="None"),
    Recipe("losses.attention_transfer", losses.attention_transfer,
           lambda: {"student_map": maps(), "teacher_map": maps(1), "mask": None},
           {"student_map": "choice", "teacher_map": "choice", "mask": "None"}),
    *(
        compared(name, lambda: {"student_logits": logits(), "teacher_logits": logits(1), "labels": labels(),
                                "temperature": 2.0, "reduction": "mean"},
                 labels="choice", temperature=TEMPERATURE, reduction="choice")
        for name in ("tckd", "nckd")
    ),
    compared("dkd", lambda: {"student_logits": logits(), "teacher_logits": logits(1), "labels": labels(),
                             "alpha": 1.0, "beta": 8.0, "temperature": 4.0},
             labels="choice", alpha="number", beta="number", temperature=TEMPERATURE),
    *(
        compared(name, lambda: {"student": logits(), "teacher": logits(1), "scale": 2.0, "bias": 0.0},
                 scale="number|scalar tensor", bias="number|scalar tensor")
        for name in ("contrast", "invariance")
    ),
    Recipe("losses.invariance by a divergence", losses.invariance,
           lambda: {"student": logits(), "teacher": logits(1), "scale": 2.0, "divergence": losses.reverse_kl},
           {"divergence": "choice"}, own=("divergence",)),
    Recipe("losses.nce", losses.nce,
           lambda: {"positive": torch.full((2, 1), 0.3), "negative": torch.full((2, 4), 0.02), "n_data": 100},
           {"positive": "choice", "negative": COMPARED, "n_data": "count|huge"}),
    Recipe("losses.cross_entropy", losses.cross_entropy,
           lambda: {"logits": logits(), "labels": labels(), "smoothing": 0.1},
           {"logits": COMPARED, "labels": "choice", "smoothing": "share"}),
    Recipe("losses.binary_cross_entropy", losses.binary_cross_entropy,
           lambda: {"logits": logits(), "labels": torch.ones(2, 4)},
           {"logits": COMPARED, "labels": "whole tensor|bool tensor|bytes tensor|half tensor"}),
    Recipe("losses.mean_squared_error", losses.mean_squared_error,
           lambda: {"values": logits(), "labels": torch.ones(2, 4)},
           {"values": COMPARED, "labels": COMPARED + "|whole tensor|huge whole tensor|bool tensor|bytes tensor"}),
    Recipe("losses.most_different", losses.most_different,
           lambda: {"student_probs": logits().softmax(-1), "teacher_probs": logits(1).softmax(-1),
                    "labels": labels(), "n": 1},
           {"student_probs": COMPARED, "teacher_probs": COMPARED, "labels": "choice", "n": "count|huge"}),
    Recipe("losses.boundary_samples", losses.boundary_samples,
           lambda: {"teacher": line, "inputs": logits(), "labels": torch.tensor([0, 1]), "student": line, "lr": 0.3,
                    "eps": 1e-4, "steps": 2, "clamp": None, "probabilities": False, "stop": "label",
                    "generator": torch.Generator().manual_seed(0)},
           {"teacher": NETWORK, "inputs": "floats|half tensor", "labels": "choice",
            "student": f"None|{NETWORK}|nan network",
            "lr": "positive", "eps": "not negative", "steps": "counter", "clamp": "None",
            "probabilities": "flag", "stop": "choice", "generator": "None|draws"},
           own=("teacher", "student", "inputs")),
    Recipe("losses.LogitNoise", perturbed,
           lambda: {"sigma": 0.5, "share": 1.0, "kind": "additive", "values": logits(),
                    "generator": torch.Generator().manual_seed(0)},
           {"sigma": "not negative", "share": "share", "kind": "choice",
            "values": COMPARED + "|odd shape|empty rows|empty tensor|meta tensor", "generator": "None|draws"}),
    Recipe("losses.BoundarySamples", losses.BoundarySamples,
           lambda: {"inputs": logits(), "attacked": torch.ones(2).bool(), "crossed": torch.ones(2).bool()},
           {"inputs": COMPARED + "|meta tensor|sparse tensor|empty tensor|empty rows|odd shape",
            "attacked": "choice", "crossed": "choice"}),
    *(
        Recipe(f"losses.{name}", getattr(losses, name),
               lambda: {"student": torch.nn.Linear(4, 4), "teacher": lambda x: x**2, "inputs": logits(), "order": 1,
                        "projections": None, "generator": None},
               {"student": f"{NETWORK}|nan network", "teacher":
                f"{NETWORK}|nan network",
                "inputs": COMPARED, "order": "1|numpy int", "projections": "None|count",
                "generator": "None|draws"}, own=("student", "teacher", "inputs"))
        for name in ("sobolev", "sobolev_terms")
    ),
    Recipe("losses.sobolev_terms of tokens", losses.sobolev_terms,
           lambda: {"student": torch.nn.Linear(4, 4), "teacher": lambda x: x**2, "inputs": logits(), "order": 2,
                    "projections": 1, "mask": torch.ones(2, 4)},
           {"mask": MASK}),
]  # fmt: skip
