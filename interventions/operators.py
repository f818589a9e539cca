"""Operators: pure functions `(base, source, generator) -> value` that say what is written at a location.

`base` is the activation there, `[..., dims]`, and the value has its shape. Any callable with that signature is an
operator: it receives the source if the caller passes one, and None otherwise; with the attribute `needs_source = True`
a call without a source is refused.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import ClassVar

import torch
from torch import Tensor

from interventions.arguments import checked
from interventions.devices import moved
from interventions.errors import InterventionError
from interventions.names import shown
from interventions.renames import renamed

Operator = Callable[[Tensor, Tensor | None, torch.Generator | None], Tensor]


@dataclass(frozen=True)
class Swap:
    """Write the source's activation: the interchange intervention (Geiger et al. 2021, arXiv:2106.02997, section 2).

    >>> Swap()(torch.zeros(2), torch.ones(2), None)
    tensor([1., 1.])
    """

    needs_source: ClassVar[bool] = True

    def __call__(self, base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
        return _require_source(self, source)


@checked
@dataclass(frozen=True)
class Interpolate:
    """Write `base + weight · (source − base)`, which is exactly the base for weight 0 and the source for weight 1.

    Args:
        weight: the share of the source; a number or a tensor without axes, e.g. a parameter.

    Raises:
        InterventionError: a weight that is not one finite number.

    >>> Interpolate(0.25)(torch.zeros(2), torch.ones(2), None)
    tensor([0.2500, 0.2500])
    """

    weight: float | Tensor
    needs_source: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_number(self, "weight", self.weight)

    def __call__(self, base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
        return torch.lerp(base, _require_source(self, source), self.weight)


@dataclass(frozen=True)
class Zero:
    """Write zeros: zero ablation.

    >>> Zero()(torch.ones(2), None, None)
    tensor([0., 0.])
    """

    needs_source: ClassVar[bool] = False

    def __call__(self, base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
        return torch.zeros_like(base)


@checked
@dataclass(frozen=True, eq=False)
class Mean:
    """Write a mean in place of every vector: mean ablation.

    Args:
        value: the mean to write, `[dims]` or any shape that expands to the activation; `mean_of` measures it on a data
            set. None takes the mean over the real tokens of all examples of the source.

    Raises:
        InterventionError: a value with NaN, or without values; when called, one that does not fit the activation.

    >>> Mean(torch.tensor([2.0, 4.0]))(torch.zeros(3, 2), None, None).tolist()
    [[2.0, 4.0], [2.0, 4.0], [2.0, 4.0]]
    """

    value: Tensor | None = None
    pools_source: ClassVar[bool] = True  # its source is a set of vectors `[n, …, dims]`, not aligned with the base

    def __post_init__(self) -> None:
        _check_values(self, self.value)

    @property
    def needs_source(self) -> bool:
        """True where the mean is that of the source."""
        return self.value is None

    def __call__(self, base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
        mean = _require_source(self, source).mean(0) if self.value is None else _fit(self, self.value, base)
        return mean.expand_as(base)


@renamed(renormalise="renormalize")
@checked
@dataclass(frozen=True, eq=False)
class Add:
    """Write `base + scale · value`: activation addition, i.e. steering with a fixed vector.

    Turner et al. 2023 (arXiv:2308.10248), section 3.

    Args:
        value: `[dims]`, or any shape that expands to the activation.
        scale: the factor of the value; a negative one steers the other way.
        renormalize: rescale each vector to its old length, so that only its direction changes.

    Raises:
        InterventionError: a value with NaN, a scale that is not finite; when called, a value that does not fit.

    >>> Add(torch.tensor([1.0, 0.0]), scale=2.0)(torch.zeros(2), None, None)
    tensor([2., 0.])
    """

    value: Tensor
    scale: float | Tensor = 1.0
    renormalize: bool = field(default=False, kw_only=True)
    needs_source: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_number(self, "scale", self.scale)
        _check_values(self, self.value)

    def __call__(self, base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
        steered = base + self.scale * _fit(self, self.value, base)
        if not self.renormalize:
            return steered
        # In fp32: the squares of half precision overflow from 256 on.
        masked = ~_is_unmasked(base)
        length, new = (x.masked_fill(masked, 0).float().norm(dim=-1, keepdim=True) for x in (base, steered))
        return (steered * (length / new.clamp_min(torch.finfo(new.dtype).tiny))).to(base.dtype)


@checked
@dataclass(frozen=True, eq=False)
class Noise:
    """Write `base + z` with z ~ N(0, σ²): the corruption of causal tracing (Meng et al. 2022, arXiv:2202.05262, 2.1).

    Args:
        sigma: the standard deviation, in units of each vector's own root mean square over its dims (detached).
        relative: False takes sigma in the units of the activation instead.
        normal: standard normal numbers to use instead of new draws, of a shape that expands to the activation.

    Raises:
        InterventionError: a sigma that is negative or not finite; normal numbers that are not finite.

    >>> Noise(0.5, normal=torch.tensor([1.0, -1.0]))(torch.tensor([3.0, 3.0]), None, None)
    tensor([4.5000, 1.5000])
    """

    sigma: float | Tensor
    relative: bool = True
    normal: Tensor | None = None
    needs_source: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_draws(self)

    def __call__(self, base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
        return base + _gaussian(self, base, generator)


@checked
@dataclass(frozen=True, eq=False)
class Mixup:
    """Write `keep · base + (1 − keep) · z` with z ~ N(0, σ²): a mixture with a random vector, without a source run.

    "Two Improvements to Causal Distillation", section on mixup. With keep 1 the activation does not change.

    Args:
        sigma: the standard deviation, in units of each vector's own root mean square over its dims (detached).
        keep: the share of the base, between 0 and 1.
        relative: False takes sigma in the units of the activation instead.
        normal: standard normal numbers to use instead of new draws, of a shape that expands to the activation.

    Raises:
        InterventionError: as `Noise`; or a keep outside of 0 to 1.

    >>> Mixup(1.0, keep=0.75, normal=torch.tensor([1.0, -1.0]))(torch.tensor([4.0, 4.0]), None, None)
    tensor([4., 2.])
    """

    sigma: float | Tensor
    keep: float | Tensor = 0.5
    relative: bool = True
    normal: Tensor | None = None
    needs_source: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_draws(self)
        _check_number(self, "keep", self.keep)
        if not 0 <= self.keep <= 1:
            raise InterventionError(f"Mixup(keep={self.keep}) is no share of the base; write keep=0.0 to keep=1.0.")

    def __call__(self, base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
        return self.keep * base + (1 - self.keep) * _gaussian(self, base, generator)


def _check_number(op: object, name: str, value: float | Tensor) -> None:
    if isinstance(value, Tensor) and (value.ndim or value.is_complex() or value.is_meta):
        raise InterventionError(
            f"{type(op).__name__}({name}={shown(value)}) is not one number; write {name}=1.0, or a "
            "parameter without axes."
        )
    if not isfinite(value.detach() if isinstance(value, Tensor) else value):
        raise InterventionError(f"{type(op).__name__}({name}={value}) is not finite; write e.g. {name}=1.0.")


def _check_values(op: object, value: Tensor | None) -> None:
    """Raise InterventionError for a tensor without values or with NaN; −∞ is allowed, as masks hold it."""
    if value is None:
        return
    if value.is_meta or value.is_complex() or value.layout != torch.strided:
        raise InterventionError(
            f"{type(op).__name__} was given {shown(value)} ({value.device}, {value.layout}), which has no values to "
            "write; give a real, dense tensor."
        )
    if value.isnan().any():
        raise InterventionError(
            f"{type(op).__name__} was given {shown(value)} with {int(value.isnan().sum())} entries that are NaN; check "
            "how it was computed."
        )


def _check_draws(op: "Noise | Mixup") -> None:
    """Raise InterventionError for a standard deviation or normal numbers that cannot be used."""
    name = type(op).__name__
    _check_number(op, "sigma", op.sigma)
    if not 0 <= op.sigma < inf:
        raise InterventionError(f"{name}(sigma={op.sigma}) is no standard deviation; write sigma=0.5.")
    _check_values(op, op.normal)
    if op.normal is not None and not op.normal.isfinite().all():
        raise InterventionError(f"{name}(normal={shown(op.normal)}) holds infinite draws; write torch.randn(…).")


def _require_source(op: object, source: Tensor | None) -> Tensor:
    """Return the source, or raise InterventionError if it is None."""
    if source is None:
        raise InterventionError(
            f"{type(op).__name__} takes from a source and none was given; pass source=inputs or a Run."
        )
    return source


def _gaussian(op: Noise | Mixup, base: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw z ~ N(0, σ²) of the shape of `base`, or scale the normal numbers that the operator holds."""
    if op.normal is None:
        device = base.device if generator is None else generator.device
        normal = torch.randn(base.shape, generator=generator, device=device, dtype=base.dtype)
        normal = moved(normal, base.device)
    else:
        normal = _fit(op, op.normal, base)
    if not op.relative:
        return op.sigma * normal
    return op.sigma * _rms(base.detach()).to(base.dtype) * normal


def _is_unmasked(base: Tensor) -> Tensor:
    """Return True for each entry that is not masked, i.e. not near the lowest number of its dtype."""
    return base > torch.finfo(base.dtype).min / 4


def _rms(base: Tensor) -> Tensor:
    """Return the root mean square of each vector, `[..., 1]`, without its masked entries (of attention scores)."""
    real = _is_unmasked(base)
    # Squared in fp32: half precision overflows from 256 on.
    squares = base.masked_fill(~real, 0).float().square()
    return (squares.sum(-1, keepdim=True) / real.sum(-1, keepdim=True).clamp_min(1)).sqrt()


def _fit(op: object, value: Tensor, base: Tensor) -> Tensor:
    """Return `value` on the device and in the dtype of `base`, or raise if it does not expand to its shape."""
    try:
        value.expand(base.shape)
    except RuntimeError as error:
        raise InterventionError(
            f"{type(op).__name__} holds a tensor of shape {list(value.shape)}, and what it replaces has shape "
            f"{list(base.shape)}; give one vector of shape [{base.shape[-1]}], or select as many dims."
        ) from error
    return moved(value, base.device).to(base.dtype)
