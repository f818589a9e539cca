"""The abstract classes of subspaces: all of them, and those with learned parameters.

A subspace has two functions, `coordinates(x)` [..., k] and `replace(x, z)` [..., width], with two laws:
`replace(x, coordinates(x)) = x`, and what the subspace does not span is the same in `x` and in `replace(x, z)`.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from interventions.errors import InterventionError
from interventions.precision import at_least_single, widen
from interventions.subspaces.frames import full_precision


class Subspace(nn.Module, ABC):
    """Directions of the last axis of an activation, whose coordinates can be read and replaced.

    A subclass defines `_coordinates`, `_replaced` and `settings`. Half-precision activations are converted to fp32,
    also under autocast: their coordinates are fp32, as rounded ones would leave a residue of what they replace, and
    `replace` returns the dtype of its `x`. Subspaces are compared by identity, as all modules are.

    Attributes:
        width: length of the last axis; None while it is not known, or where any will do.
    """

    width: int | None = None

    def coordinates(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... k"]:
        """Return the coordinates of `x` in the subspace, `[..., k]`, in fp32 where `x` is of half precision.

        Raises:
            InterventionError: `x` has another width than the subspace.
        """
        self._check_fit(x)
        with full_precision(x):
            return self._coordinates(widen(x))

    def replace(self, x: Float[Tensor, "... d"], coordinates: Float[Tensor, "... k"]) -> Float[Tensor, "... d"]:
        """Return `x` with new coordinates in the subspace, and unchanged outside of it.

        `replace(x, coordinates(x))` is `x`.

        Raises:
            InterventionError: as `coordinates`; or there are more or fewer coordinates than `x` has.
        """
        self._check_fit(x)
        with full_precision(x):
            return self._replaced(widen(x), coordinates.to(at_least_single(x.dtype))).to(x.dtype)

    def learned(self) -> list[nn.Parameter]:
        """Return the parameters that alignment trains while the network is frozen; some may have no shape yet."""
        return list(self.parameters())

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The arguments that build this module again, once its state dict is loaded into the result."""

    @abstractmethod
    def _coordinates(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _replaced(self, x: Tensor, coordinates: Tensor) -> Tensor: ...

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings.items())

    def _check_fit(self, x: Tensor) -> None:
        if self.width is not None and x.shape[-1] != self.width:
            raise InterventionError(
                f"{type(self).__name__} spans directions of width {self.width} and was given a tensor of shape "
                f"{list(x.shape)}; build it with width={x.shape[-1]}, or name a location of width {self.width}."
            )


class Learned(Subspace):
    """A subspace with learned parameters, which take their shape from the first `x` where no `width` was given.

    Until then the parameters exist, so that an optimizer can hold them, but have no shape.
    """

    @abstractmethod
    def _initial(self, width: int) -> dict[str, Tensor]:
        """Return the first value of each parameter and buffer whose shape depends on the width, by name."""

    @property
    def _unbuilt(self) -> list[str]:
        """The parameters that have no shape yet."""
        return [name for name, p in self._parameters.items() if isinstance(p, UninitializedParameter)]

    def _build(self, width: int | None, device: torch.device | None = None) -> None:
        """Fill the parameters for this width and move them to `device`; do nothing if the width is None."""
        if width is None:
            return
        if width < 1:
            raise InterventionError(
                f"{type(self).__name__}(width={width}): a space has a width of 1 or more; write that of its vectors, "
                "as width=64."
            )
        # A parameter made under inference_mode could never be trained.
        with torch.inference_mode(False), torch.no_grad():
            for name, value in self._initial(width).items():
                tensor = getattr(self, name)
                if isinstance(tensor, UninitializedParameter):
                    tensor.materialize(tuple(value.shape))
                    tensor.copy_(value)
                else:
                    setattr(self, name, value.to(tensor))
            self.to(device)
        self.width = width

    def _check_fit(self, x: Tensor) -> None:
        if self._unbuilt:
            self._build(x.shape[-1], x.device)
        super()._check_fit(x)

    def _check_built(self) -> None:
        if self._unbuilt:
            raise InterventionError(
                f"{type(self).__name__} was built without a width and has not run yet, so it holds no directions; "
                "write width=…, or run it once."
            )

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._check_built()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        unbuilt = self._unbuilt
        if unbuilt and prefix + unbuilt[0] in state_dict:
            self._build(len(state_dict[prefix + unbuilt[0]]))
        super()._load_from_state_dict(state_dict, prefix, *args)


def unbuilt() -> nn.Parameter:
    """Return a parameter that has no shape yet."""
    return UninitializedParameter(dtype=torch.float32)  # type: ignore[call-arg, return-value]


def difference(new: Float[Tensor, "..."], old: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return `new − old`, both coordinates of one shape.

    Raises:
        InterventionError: their shapes differ.
    """
    if new.shape != old.shape:
        raise InterventionError(
            f"replace was given coordinates of shape {list(new.shape)} and those of x have {list(old.shape)}; give as "
            "many as subspace.coordinates(x)."
        )
    return new - old


def check_dims(dims: int, width: int | None, what: str) -> None:
    """Raise InterventionError if `width` is below 1, or `dims` directions do not fit into a space of that width."""
    if width is not None and width < 1:
        raise InterventionError(f"{what} needs a space of width 1 or more, not {width}; write the size of its vectors.")
    if dims < 1 or (width is not None and dims > width):
        space = "" if width is None else f" in a space of width {width}"
        raise InterventionError(f"{what} cannot have {dims} directions{space}; write dims=1 to dims={width or '…'}.")
