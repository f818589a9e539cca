"""Optimizers by name, or any callable that makes one of groups of parameters; and which parameters decay."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from distill.errors import DistillError
from distill.objectives.term_weights import describe_function

OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}
DECAYING = ("all", "matrices")
"""Choices of the parameters that weight decay is for: all, or all but biases, norms and other vectors."""
SMALL = 2**19
"""The number of weights up to which an optimizer on a CPU loops over them outside Python, with the same bits. It then
holds one more copy of them in each operation, which is slower where that does not fit into a cache."""


def check_optimizer(chosen: Any) -> None:
    """Raise DistillError for what is neither the name of an optimizer nor a callable that could make one."""
    if chosen not in OPTIMIZERS if isinstance(chosen, str) else not callable(chosen):
        raise DistillError(
            f"optimizer={chosen!r:.60} is none of {', '.join(OPTIMIZERS)}; choose one, or give a class or function of "
            "groups of parameters and lr: optimizer=torch.optim.NAdam."
        )


def check_decaying(chosen: Any) -> None:
    """Raise DistillError for what is no choice of the parameters that weight decay is for."""
    if chosen not in DECAYING:
        raise DistillError(
            f"weight_decay_on={chosen!r:.60} is none of {', '.join(map(repr, DECAYING))}; 'matrices' leaves out "
            "biases, norms and other vectors."
        )


def optimizer_of(
    chosen: Any, groups: Iterable[Mapping[str, Any]], *, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Return an optimizer for groups of parameters; named ones are fused on a GPU, without loops in Python elsewhere.

    The fused one of a CPU is faster too, and rounds otherwise, by which the results of seeds would change.

    Args:
        chosen: a name, or a callable that takes the groups and `lr`, and `weight_decay` if it has such a parameter.
        groups: the groups, with parameters under "params".
        lr: the learning rate.
        weight_decay: the weight decay.

    Raises:
        DistillError: the callable fails, or makes no optimizer that steps by itself.
    """
    given = [{**group, "params": list(group["params"])} for group in groups]
    if isinstance(chosen, str):
        return OPTIMIZERS[chosen](given, lr=lr, weight_decay=weight_decay, **_way(given))
    name = describe_function(chosen)
    decays = {"weight_decay": weight_decay} if _takes_decay(chosen) else {}
    try:
        made = chosen(given, lr=lr, **decays)
    except Exception as error:
        raise DistillError(
            f"optimizer={name} cannot be made ({type(error).__name__}: {' '.join(str(error).split())}); it is called "
            "as optimizer(groups, lr=…), groups as torch.optim takes them; bind other settings: "
            "functools.partial(torch.optim.SGD, momentum=0.9)."
        ) from error
    if not isinstance(made, torch.optim.Optimizer) or _needs_closure(made):
        what = "steps only with a closure" if isinstance(made, torch.optim.Optimizer) else f"made {type(made).__name__}"
        raise DistillError(
            f"optimizer={name} {what}, and an optimizer of torch whose step() needs nothing is needed; e.g. "
            "optimizer=torch.optim.NAdam."
        )
    return made


def decay_split(groups: Sequence[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
    """Return groups of parameters divided into those that decay and those that do not: biases, norms and vectors."""
    vectors = {id(each) for each in _vectors(model)}
    found = []
    for group in groups:
        kept = [each for each in group["params"] if id(each) not in vectors]
        left = [each for each in group["params"] if id(each) in vectors]
        found += [{**group, "params": kept}] if kept else []
        found += [{**group, "params": left, "weight_decay": 0.0}] if left else []
    return found


def _vectors(model: nn.Module) -> Iterable[nn.Parameter]:
    """Yield the parameters of biases and norms, and all others with fewer than two axes."""
    for module in model.modules():
        norm = "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            if norm or name.endswith("bias") or parameter.ndim < 2:
                yield parameter


def _way(groups: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """Return how an optimizer of torch goes over its parameters."""
    every = [each for group in groups for each in group["params"]]
    kinds = {each.device.type if each.is_floating_point() else "" for each in every}
    small = kinds == {"cpu"} and sum(each.numel() for each in every) <= SMALL
    return {"fused": True} if kinds == {"cuda"} else {"foreach": True} if small else {}


def _takes_decay(made_by: Callable[..., Any]) -> bool:
    """Return whether a callable has a parameter `weight_decay` that is not bound yet."""
    if isinstance(made_by, partial) and "weight_decay" in made_by.keywords:
        return False
    try:
        return "weight_decay" in inspect.signature(made_by).parameters
    except (TypeError, ValueError):
        return False


def _needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer computes the loss itself, several times in a step."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty
