"""In which floating-point type weights are trained: half precision rounds away most of what an optimizer adds."""

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
    """Put half-precision weights that are to be trained into float32, and say so; an error in the block undoes it.

    A bfloat16 number keeps 8 bits: a step of an optimizer that is below 1/256 of a weight leaves it as it is. Buffers
    and frozen weights of the same networks go along, so that all of a network is of one type. Adapters alone are put
    into float32 where the weights below them are frozen or quantised; what else is trained there stays, and is named.
    A network that shares weights with one that is not trained stays as it is, and that is said.

    Args:
        trained: what is trained, in place: networks, projections, subspaces.
        still: models that keep their types.
    """
    undo: list[Callable[[], None]] = []
    before = sorted({str(p.dtype).removeprefix("torch.") for p in trained.parameters() if _learns_in_half(p)})
    if before:
        theirs = {id(p) for model in still for p in network_of(model).parameters()}
        adapters = [module for module in trained.modules() if _is_adapter(module)]
        if adapters:
            undo += [_raised(p) for each in adapters for p in each.parameters() if _learns_in_half(p)]
        elif not any(id(p) in theirs for p in trained.parameters()) and not _is_quantised(trained):
            undo += [_raised(p) for p in trained.parameters() if p.dtype in HALVES and not p.is_meta]
            undo += [way_back for module in trained.modules() for way_back in _raised_buffers(module)]
        _say(trained, " and ".join(before), changed=bool(undo))
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


def _is_quantised(trained: nn.Module) -> bool:
    return any(getattr(module, "is_quantized", False) for module in trained.modules())


def _raised(parameter: Tensor) -> Callable[[], None]:
    """Put a parameter into float32, the same object; the way back."""
    before = parameter.dtype
    _convert(parameter, torch.float32)
    return partial(_convert, parameter, before)


def _raised_buffers(module: nn.Module) -> Iterator[Callable[[], None]]:
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.dtype in HALVES:
            module._buffers[name] = buffer.float()
            yield partial(module._buffers.__setitem__, name, buffer)


def _convert(parameter: Any, dtype: torch.dtype) -> None:
    gradient, parameter.grad = parameter.grad, None
    parameter.data = parameter.data.to(dtype)
    parameter.grad = None if gradient is None else gradient.to(dtype)


def _say(trained: nn.Module, before: str, *, changed: bool) -> None:
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
            "rounded away, as the network has adapters, is quantised or shares weights with its teacher; load it in "
            "float32: from_pretrained(…, dtype=torch.float32).",
            stacklevel=1,
        )
