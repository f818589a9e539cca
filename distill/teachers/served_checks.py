"""The checks of a served teacher: its settings, its answers, and whether a cache holds answers of the same teacher."""

from collections.abc import Mapping
from math import inf
from typing import Any

from torch import Tensor, nn

from distill.errors import DistillError
from distill.models.inputs import network_of
from distill.teachers.top_k import Kept, dense


def check_settings(model: Any, remote: bool | str, counts: Mapping[str, int | None], temperature: float) -> None:
    """Raise DistillError for settings of `Served` that cannot be.

    Args:
        model: a model of nnsight or a torch model.
        remote: where it runs.
        counts: the settings by name that must be 1 or more, or None.
        temperature: must be above 0 and finite.
    """
    network_of(model)
    if remote and isinstance(model, nn.Module):
        raise DistillError(
            f"remote={remote!r} asks another machine for the model, and this {type(model).__name__} is here; pass a "
            "model of nnsight: Served(TransformersModel(name), remote=True)."
        )
    if remote == "":
        raise DistillError("Served(remote='') names no host; use its address, True, or False for one of this process.")
    for name, count in counts.items():
        if count is not None and count < 1:
            raise DistillError(f"Served({name}={count}) keeps nothing; use 1 or more, or None for no limit.")
    if not 0 < temperature < inf:
        raise DistillError(f"Served(temperature={temperature}) softens nothing; use one above 0, as KD has.")


def check_answer(kept: Kept, rows: int, network: nn.Module, top_k: int | None) -> None:
    """Raise DistillError for an answer that cannot be kept.

    Args:
        kept: the logits of the answer, or their largest.
        rows: the number of samples in the request.
        network: the teacher; its configuration names its kind of problem.
        top_k: how many of the largest logits are kept; None is all.
    """
    problem = getattr(getattr(network, "config", None), "problem_type", None)
    if "values" in kept and problem in ("multi_label_classification", "regression"):
        raise DistillError(
            f"top_k={top_k} keeps the most probable of classes that exclude each other, and this teacher is one of "
            f"{problem}; leave top_k out."
        )
    answers = kept.get("logits", kept.get("values"))
    if answers is None or not answers.ndim or len(answers) != rows:
        raise DistillError(
            f"the teacher answers {rows} samples with logits of shape "
            f"{None if answers is None else list(answers.shape)}; it must return one row for each."
        )
    wrong = int(answers.isnan().flatten(1).any(1).sum())
    if wrong:
        raise DistillError(
            f"the teacher answers NaN to {wrong} of {rows} samples, and no such answer is kept; see whether its "
            "inputs are: data[name].isfinite().all(), and its weights."
        )


def agree(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> bool:
    """Return whether two answers to one sample are those of one teacher, up to rounding on another machine.

    That is, whether their mean squared difference is at most 1 % of the variance of the earlier logits (of their mean
    square, if there is one logit).
    """
    old, new = dense(dict(before)).float(), dense({name: value.cpu() for name, value in now.items()}).float()
    scale = old.square().mean() if old.shape[-1] == 1 else old.var(correction=0)
    return old.shape == new.shape and bool((old - new).square().mean() <= 0.01 * scale + 1e-6)
