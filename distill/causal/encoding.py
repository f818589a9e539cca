"""The checks of what a network is called with under a causal model, and of the logits of its answers."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distill.causal.values import describe
from distill.errors import DistillError


def check_encoded(encoded: Any, rows: int) -> None:
    """Raise DistillError for what `encode=` returned, if it is no tensor, or dict of them, with a row an example."""
    parts = encoded if isinstance(encoded, Mapping) else {"": encoded}
    for name, part in parts.items():
        if not isinstance(part, Tensor) or not part.ndim or len(part) != rows:
            raise DistillError(
                f"encode returned {describe(part)}{name and f' as {name!r}'} for {rows} examples; return a tensor "
                f"[{rows}, ...] or a dict of them."
            )


def check_decoded(logits: Any, rows: int, classes: int | None) -> None:
    """Raise DistillError for logits of another shape than `[rows, classes]`, or `[rows, …]` of real-valued answers."""
    if not isinstance(logits, Tensor) or not logits.ndim or len(logits) != rows:
        raise DistillError(
            f"decode returned {describe(logits)} for {rows} examples; return a tensor [{rows}, classes]."
        )
    if classes is not None and logits.shape != (rows, classes):
        raise DistillError(
            f"the causal model has {classes} answers and the network {logits.shape[-1]} logits ({describe(logits)}); "
            f"give its last layer {classes}, or say which of them are the answers: CausalModel(…, decode=lambda "
            "logits, values: logits[:, -1, ids])."
        )
