"""What all losses share: checks that tensors fit together, the positions that count, and softened logits."""

import math
from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from distill.errors import DistillError, checked
from distill.precision import widen
from interventions import keep_on_host, on_host

P = ParamSpec("P")
T = TypeVar("T")

WAYS_OUT = {
    "classes": "give both models the same label set, or keep the classes they share, as with logits[..., :2]",
    "width": "project one first, as with torch.nn.Linear(student.shape[-1], teacher.shape[-1])(student)",
}


def loss(function: Callable[P, T]) -> Callable[P, T]:
    """Make a loss raise DistillError for wrong types, and for tensors of several devices or of a kind it cannot take.

    Tensors are not searched for NaN and infinity, as that would wait for the device in every step. The loss is then
    NaN or infinite too, and `fit` stops there.
    """

    @wraps(function)
    def fitting(*args: P.args, **kwargs: P.kwargs) -> T:
        _refuse_unusable(function.__name__, [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)])
        return function(*args, **kwargs)

    return checked(fitting)


def _refuse_unusable(name: str, tensors: list[Tensor]) -> None:
    """Raise DistillError if a tensor is sparse or complex, or if the tensors are on several devices."""
    odd = next((each for each in tensors if each.layout != torch.strided or each.is_complex()), None)
    if odd is not None:
        kind = str(odd.layout if odd.layout != torch.strided else odd.dtype).removeprefix("torch.")
        raise DistillError(
            f"{name} takes dense tensors of real numbers: one {tuple(odd.shape)} is {kind}; give tensor.to_dense(), "
            "and tensor.real of complex ones."
        )
    if len({each.device for each in tensors if each.ndim}) > 1:
        devices = sorted({str(each.device) for each in tensors if each.ndim})
        raise DistillError(
            f"{name} was given tensors on several devices: {' and '.join(devices)}; move all to one, as with "
            f"tensor.to({devices[0]!r})."
        )


def same_shapes(loss: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Make a loss raise DistillError if student, teacher and mask do not fit together, before types are checked."""
    parameters = signature(loss).parameters
    names, axis = list(parameters), next(iter(parameters.values())).annotation.dim_str.split()[-1]

    @wraps(loss)
    def fitting(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        given: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
        if given.keys() >= {*names[:2]}:  # else the call itself says what is missing
            _refuse_mismatch(loss.__name__, {name: given[name] for name in names if name in given}, axis)
        return loss(*args, **kwargs)

    return fitting


def _refuse_mismatch(name: str, arguments: dict[str, Any], axis: str) -> None:
    """Raise DistillError if the first two arguments differ in shape, or the mask is not of their positions."""
    (student_name, student), (teacher_name, teacher) = list(arguments.items())[:2]
    mask = arguments.get("mask")
    if student.shape == teacher.shape and (mask is None or mask.shape == student.shape[:-1]):
        return
    found = f"{student_name} {tuple(student.shape)}, {teacher_name} {tuple(teacher.shape)}"
    if student.shape[:-1] != teacher.shape[:-1]:
        raise DistillError(
            f"{name} compares position by position, but the batches differ: {found}; run both on the same inputs."
        )
    if student.shape[-1] != teacher.shape[-1]:
        raise DistillError(f"{name} needs the same {axis} on both sides: {found}; {WAYS_OUT[axis]}.")
    raise DistillError(
        f"{name} needs one mask entry a position, but mask is {tuple(arguments['mask'].shape)}: {found}; "
        f"pass one of shape {tuple(student.shape[:-1])}, as inputs['attention_mask'] of the same inputs."
    )


def keep(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the positions that the mask keeps, `[N, width]`, in at least single precision; all where it is None.

    Padding never enters the graph.

    Raises:
        DistillError: no position is kept.
    """
    rows = rearrange(values, "... width -> (...) width") if mask is None else take_kept(values, mask)
    if len(rows) == 0:
        raise DistillError(
            f"No position is left to average over: 0 of {values.shape[:-1].numel()} are kept of {tuple(values.shape)}; "
            "skip this batch, or check that the mask is 1 (a label not -100) where a position counts."
        )
    return widen(rows)


def take_kept(values: Tensor, mask: Tensor) -> Tensor:
    """Return the positions that a mask keeps, `[N, width]`, without waiting for a device if the host has the mask."""
    here = on_host(mask).bool()
    if bool(here.all()):
        return rearrange(values, "... width -> (...) width")
    if values.is_cpu and here.shape == mask.shape and on_host(mask) is mask:
        return values[here]
    left = here.flatten().nonzero()[:, 0].to(values.device, non_blocking=True)
    return rearrange(values, "... width -> (...) width").index_select(0, left)


def kept_numbers(values: Tensor, mask: Tensor) -> Tensor:
    """Return the numbers that a mask of their shape keeps, `[N]`, as `take_kept`."""
    return take_kept(values[..., None], mask)[:, 0]


def is_readable(values: Tensor) -> bool:
    """Return whether values can be read at once: they are on the CPU, and outside of transforms of torch."""
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return values.is_cpu and type(values) is Tensor and not transformed


def is_labelled(labels: Tensor) -> Tensor:
    """Return where labels are not −100, with the copy of the mask on the host kept beside it."""
    here = on_host(labels)
    return labels != -100 if here is labels else keep_on_host(labels != -100, here != -100)


def spread(values: Tensor, mask: Tensor | None, shape: torch.Size) -> Tensor:
    """Return kept values, `[N]`, in the places that they came from, with 0 where the mask leaves a position out."""
    if mask is None:
        return values.reshape(shape)
    return values.new_zeros(shape).masked_scatter(mask.bool(), values)


HOT = 50.0
"""Above this temperature logits are softened in double precision: in single, their differences are mostly rounding."""


def soften(name: str, logits: Tensor, temperature: float | Float[Tensor, ""]) -> Tensor:
    """Return logits divided by a temperature, in at least single precision.

    Args:
        name: of the loss, for the error.
        logits: of any shape.
        temperature: τ.

    Raises:
        DistillError: the temperature is not above 0 and finite.
    """
    if not 0 < temperature < math.inf:
        wanted = "above 0" if temperature <= 0 else "that is finite"
        raise DistillError(
            f"{name} needs a temperature {wanted}: temperature={temperature}; temperature=1 softens nothing."
        )
    if isinstance(temperature, int | float) and temperature == 1:
        return widen(logits)
    exact = temperature > HOT and logits.device.type != "mps"
    return (logits.double() if exact else widen(logits)) / temperature


def _are_within(labels: Tensor, classes: int) -> bool:
    """Return whether the least and the greatest of some labels show that each is the number of a class."""
    if labels.dtype != torch.int64 or not labels.numel():
        return False
    least, greatest = torch.aminmax(labels)
    return int(least) >= 0 and int(greatest) < classes


def find_labelled(name: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Return where the labels are not −100, `[*batch]`.

    Raises:
        DistillError: labels that are not numbers of classes of these logits, or of another shape.
    """
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise DistillError(
            f"{name} needs the numbers of classes as labels, but they are {labels.dtype}; give labels.long(), or use "
            "binary_cross_entropy for several labels an example and mean_squared_error for real values."
        )
    if logits.shape[:-1] != labels.shape:
        raise DistillError(
            f"{name} needs one label a position: logits {tuple(logits.shape)}, labels {tuple(labels.shape)}; "
            f"give labels of shape {tuple(logits.shape[:-1])}, -100 where a position does not count."
        )
    here = on_host(labels)
    if _are_within(here, logits.shape[-1]):
        return is_labelled(labels)
    outside = here[(here != -100) & ((here < 0) | (here >= logits.shape[-1]))]
    if len(outside):
        raise DistillError(
            f"{name} met label {outside[0].item()}, but the logits have {logits.shape[-1]} classes "
            f"(0 to {logits.shape[-1] - 1}); map the labels to them, or set -100 where a position does not count."
        )
    return is_labelled(labels)
