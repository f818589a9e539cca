"""The modes of a network: training and evaluation, with and without its adapters."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn


def as_itself(network: nn.Module) -> AbstractContextManager[None]:
    """Return a block in which what is inside of a model may be called for it, as `generate` of the innermost one.

    A model that answers for another one while a part of that is off, as adapters, has a method `switched` for it.
    """
    switched: Any = getattr(network, "switched", None)
    return switched() if callable(switched) else nullcontext()


@contextmanager
def in_eval_mode(network: nn.Module) -> Iterator[None]:
    """Put a network in eval mode for a block; every module gets its own mode back after it."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
