"""What is written: operators are pure functions `(base, source, generator) -> value` on `[..., dims]` vectors.

A callable of one's own with that signature is an operator too: it is given a source where there is one, and always with
`needs_source = True` set on it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import ClassVar

import torch
from einops import reduce
from torch import Tensor

from interventions.arguments import checked
from interventions.errors import InterventionError
from interventions.names import shown
from interventions.renames import renamed

Operator = Callable[[Tensor, Tensor | None, torch.Generator | None], Tensor]


@dataclass(frozen=True)
class Swap:
    """The source's value: the interchange intervention (Geiger et al. 2021, arXiv:2106.02997, section 2)."""

    needs_source: ClassVar[bool] = True

    def __call__(self, base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
        return _given(self, source)


@checked
@dataclass(frozen=True)
class Interpolate:
    """`base + weight · (source − base)`: weight 0 is the base, 1 the source, both exactly."""

    weight: float | Tensor
    needs_source: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_number(self, "weight", self.weight)

    def __call__(self, base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
        return torch.lerp(base, _given(self, source), self.weight)


@dataclass(frozen=True)
class Zero:
    """Zeros: zero ablation."""

    needs_source: ClassVar[bool] = False

    def __call__(self, base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
        return torch.zeros_like(base)


@checked
@dataclass(frozen=True, eq=False)
class Mean:
    """A mean in place of every vector: mean ablation.

    Args:
        value: the mean to write, `[dims]` or a shape that expands to what is replaced, e.g. measured on a data set.
            None: the mean over the real tokens of all examples of the source.
    """

    value: Tensor | None = None
    pools_source: ClassVar[bool] = True  # its source is one bag of vectors `[n, …, dims]`, not aligned with the base

    def __post_init__(self) -> None:
        _check_values(self, self.value)

    @property
    def needs_source(self) -> bool:
        return self.value is None

    def __call__(self, base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
        mean = (
            reduce(_given(self, source), "n ... -> ...", "mean")
            if self.value is None
            else _fitted(self, self.value, base)
        )
        return mean.expand_as(base)


@renamed(renormalise="renormalize")
@checked
@dataclass(frozen=True, eq=False)
class Add:
    """`base + scale · value`: steering with a fixed vector.

    Turner et al. 2023 (arXiv:2308.10248), section 3.

    Args:
        value: `[dims]`, or any shape that expands to what is replaced.
        scale: how much of it; negative steers the other way.
        renormalize: give each vector its old length back, so that only its direction changes.
    """

    value: Tensor
    scale: float | Tensor = 1.0
    renormalize: bool = field(default=False, kw_only=True)
    needs_source: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_number(self, "scale", self.scale)
        _check_values(self, self.value)

    def __call__(self, base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
        steered = base + self.scale * _fitted(self, self.value, base)
        if not self.renormalize:
            return steered
        # In fp32: the squares of half precision overflow from 256 on.
        hidden = ~_counts(base)
        length, new = (x.masked_fill(hidden, 0).float().norm(dim=-1, keepdim=True) for x in (base, steered))
        return (steered * (length / new.clamp_min(torch.finfo(new.dtype).tiny))).to(base.dtype)


@checked
@dataclass(frozen=True, eq=False)
class Noise:
    """`base + z`, z ~ N(0, σ²): Gaussian noise, as in causal tracing (Meng et al. 2022, arXiv:2202.05262, section 2.1).

    Args:
        sigma: standard deviation in units of each vector's own root mean square over its dims (detached).
        relative: False for absolute units.
        normal: standard normal draws to use instead of new ones, of the shape of what is replaced.
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
    """`keep · base + (1 − keep) · z`, z ~ N(0, σ²): a mixture with a random vector, no source run needed.

    "Two Improvements to Causal Distillation", section on mixup. keep 1 is the identity.

    Args:
        sigma: standard deviation in units of each vector's own root mean square over its dims (detached).
        keep: the share of the base.
        relative: False for absolute units.
        normal: standard normal draws to use instead of new ones, of the shape of what is replaced.
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
    """Raise for a tensor that has nothing to write; −∞ is what a mask is made of."""
    if value is None:
        return
    if value.is_meta or value.is_complex() or value.layout != torch.strided:
        raise InterventionError(
            f"{type(op).__name__} was given {shown(value)} ({value.device}, {value.layout}), which has no values to "
            "write; give a real, dense tensor."
        )
    if value.isnan().any():
        raise InterventionError(
            f"{type(op).__name__} was given {shown(value)} of which {int(value.isnan().sum())} are NaN; see what they "
            "were made of."
        )


def _check_draws(op: "Noise | Mixup") -> None:
    name = type(op).__name__
    _check_number(op, "sigma", op.sigma)
    if not 0 <= op.sigma < inf:
        raise InterventionError(f"{name}(sigma={op.sigma}) is no standard deviation; write sigma=0.5.")
    _check_values(op, op.normal)
    if op.normal is not None and not op.normal.isfinite().all():
        raise InterventionError(f"{name}(normal={shown(op.normal)}) holds infinite draws; write torch.randn(…).")


def _given(op: object, source: Tensor | None) -> Tensor:
    if source is None:
        raise InterventionError(
            f"{type(op).__name__} takes from a source and none was given; pass source=inputs or a Run."
        )
    return source


def _gaussian(op: Noise | Mixup, base: Tensor, generator: torch.Generator | None) -> Tensor:
    if op.normal is None:
        device = base.device if generator is None else generator.device
        normal = torch.randn(base.shape, generator=generator, device=device, dtype=base.dtype).to(base.device)
    else:
        normal = _fitted(op, op.normal, base)
    if not op.relative:
        return op.sigma * normal
    return op.sigma * _rms(base.detach()).to(base.dtype) * normal


def _counts(base: Tensor) -> Tensor:
    """Which entries are numbers, and not the lowest one that a mask puts into attention scores."""
    return base > torch.finfo(base.dtype).min / 4


def _rms(base: Tensor) -> Tensor:
    """Of each vector. Masked attention scores, which are the lowest number there is, do not count."""
    real = _counts(base)
    # Squared in fp32: half precision overflows from 256 on.
    squares = base.masked_fill(~real, 0).float().square()
    return (squares.sum(-1, keepdim=True) / real.sum(-1, keepdim=True).clamp_min(1)).sqrt()


def _fitted(op: object, value: Tensor, base: Tensor) -> Tensor:
    """`value` on the device and in the dtype of `base`, if it expands to its shape."""
    try:
        value.expand(base.shape)
    except RuntimeError as error:
        raise InterventionError(
            f"{type(op).__name__} holds a tensor of shape {list(value.shape)}, and what it replaces has shape "
            f"{list(base.shape)}; give one vector of shape [{base.shape[-1]}], or select as many dims."
        ) from error
    return value.to(base)
