"""Training in float32 of weights that were loaded in half precision, which rounds most steps of an optimizer away."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distill.models.inputs import network_of

HALVES = (torch.bfloat16, torch.float16)
PARAM_DTYPES = ("float32", "as loaded")


@contextmanager
def upcast(trained: nn.Module, still: Iterable[Any] = ()) -> Iterator[None]:
    """Put trained half-precision weights into float32 for a block, with a warning; an error in the block undoes it.

    A bfloat16 number has 8 bits: a step of an optimizer below 1/256 of a weight does not change it. Buffers and frozen
    weights of the same networks are converted too, so that each network has one dtype. In a network with adapters only
    these are converted; other trained weights there keep their dtype, with a warning. A network that shares weights
    with one that is not trained keeps its dtype, with a warning.

    Args:
        trained: the modules to train, in place: networks, projections, subspaces.
        still: models that keep their dtypes.
    """
    undo: list[Callable[[], None]] = []
    before = sorted({str(p.dtype).removeprefix("torch.") for p in trained.parameters() if _learns_in_half(p)})
    if before:
        shared = {id(p) for model in still for p in network_of(model).parameters()}
        adapters = [module for module in trained.modules() if _is_adapter(module)]
        if adapters:
            undo += [_upcast(p) for each in adapters for p in each.parameters() if _learns_in_half(p)]
        elif not any(id(p) in shared for p in trained.parameters()) and not _is_quantized(trained):
            undo += [_upcast(p) for p in trained.parameters() if p.dtype in HALVES and not p.is_meta]
            undo += [way_back for module in trained.modules() for way_back in _upcast_buffers(module)]
        _warn(trained, " and ".join(before), changed=bool(undo))
    try:
        yield
    except BaseException:
        for each in undo:
            each()
        raise


def _learns_in_half(parameter: Tensor) -> bool:
    return parameter.requires_grad and parameter.dtype in HALVES


def _is_adapter(module: nn.Module) -> bool:
    return any(kind.__name__ == "BaseTunerLayer" for kind in type(module).__mro__)


def _is_quantized(trained: nn.Module) -> bool:
    return any(getattr(module, "is_quantized", False) for module in trained.modules())


def _upcast(parameter: Tensor) -> Callable[[], None]:
    """Put a parameter into float32, as the same object; return the function that undoes it."""
    before = parameter.dtype
    _convert(parameter, torch.float32)
    return partial(_convert, parameter, before)


def _upcast_buffers(module: nn.Module) -> Iterator[Callable[[], None]]:
    """Yield, for each buffer that is put into float32, the function that undoes it."""
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.dtype in HALVES:
            module._buffers[name] = buffer.float()
            yield partial(module._buffers.__setitem__, name, buffer)


def _convert(parameter: Any, dtype: torch.dtype) -> None:
    gradient, parameter.grad = parameter.grad, None
    parameter.data = parameter.data.to(dtype)
    parameter.grad = None if gradient is None else gradient.to(dtype)


def _warn(trained: nn.Module, before: str, *, changed: bool) -> None:
    left = [name for name, p in trained.named_parameters() if _learns_in_half(p)]
    if changed:
        warnings.warn(
            f"weights that were loaded in {before} are trained in float32, and handed back and saved so: in {before} "
            "most steps of an optimizer are rounded away; round them afterwards with "
            f"student.to(torch.{before.split()[0]}), or "
            "train them as they are: schedule=Schedule(param_dtype='as loaded').",
            stacklevel=1,
        )
    if left:
        warnings.warn(
            f"{len(left)} weights ({left[0]!r}, …) are trained in {before}, where most steps of an optimizer are "
            "rounded away, as the network has adapters, is quantized or shares weights with its teacher; load it in "
            "float32: from_pretrained(…, dtype=torch.float32).",
            stacklevel=1,
        )
