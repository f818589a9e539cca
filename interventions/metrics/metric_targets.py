"""Targets of metrics: what each example is measured against, from which that of some examples can be taken."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor

from interventions.errors import InterventionError

Ids = int | Sequence[int] | Sequence[Sequence[int]] | Tensor


def take(value: Any, rows: Sequence[int], what: str) -> Any:
    """Return what holds an entry for each example for some of them; what is the same for all of them as it is.

    Args:
        value: a number or None, which are the same for all; a tensor, an array or a sequence with an entry for each
            example; or anything with a method `take(rows)`. Any other value is the same for all.
        rows: the numbers of the examples.
        what: the name of the value in errors.

    Raises:
        InterventionError: an example beyond those that there is an entry for.

    >>> take([3, 4, 5], [2, 0], "answers"), take(7, [2, 0], "answers")
    ([5, 3], 7)
    """
    count = examples_of(value)
    if count is None:
        return value.take(rows) if hasattr(value, "take") and not hasattr(value, "dtype") else value
    if len(rows) and max(rows) >= count:
        raise InterventionError(
            f"{what} has entries for {count} examples, and example {max(rows)} of the data is measured; give one for "
            "each example of the data, or one for all."
        )
    if hasattr(value, "take") and not hasattr(value, "dtype"):
        return value.take(rows)
    return [value[row] for row in rows] if not hasattr(value, "dtype") else value[torch.as_tensor(rows)]


def examples_of(value: Any) -> int | None:
    """Return how many examples a value holds entries for; None where it is the same for all."""
    if hasattr(value, "take") and not hasattr(value, "dtype"):
        found: int | None = getattr(value, "examples", None)
        return found
    if hasattr(value, "dtype"):
        return len(value) if getattr(value, "ndim", 0) else None
    return len(value) if isinstance(value, Sequence) and not isinstance(value, str) else None


@dataclass(frozen=True, eq=False)
class PerExample:
    """A function of logits and of targets of the same examples.

    Attributes:
        function: logits `[batch, classes]`, and the targets by name → `[batch]`.
        targets: what each example is measured against.
    """

    function: Callable[..., Tensor]
    targets: Mapping[str, Any]

    def __call__(self, logits: Tensor) -> Tensor:
        return self.function(logits, **self.targets)

    def take(self, rows: Sequence[int]) -> "PerExample":
        """Return the function with the targets of some examples."""
        targets = {name: take(value, rows, f"the {name} of the metric") for name, value in self.targets.items()}
        return PerExample(self.function, targets)

    @property
    def examples(self) -> int | None:
        """The number of examples that there are targets for; None where they are the same for all."""
        return next((count for count in map(examples_of, self.targets.values()) if count is not None), None)


@dataclass(eq=False)
class ClassIds:
    """Ids of classes as a user gives them, which are checked once for each device and each number of them.

    Attributes:
        given: the ids.
        what: their name in errors.
    """

    given: Ids
    what: str
    _known: dict[tuple[object, ...], Tensor] = field(default_factory=dict)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of the values at the ids, `[batch]`."""
        found = values.gather(-1, self.of(values))
        return found[:, 0] if found.shape[1] == 1 else reduce(found, "batch k -> batch", "mean")

    def of(self, values: Tensor) -> Tensor:
        """Return the ids as `[batch, k]`.

        Raises:
            InterventionError: ids of another shape than the values, or outside of the classes.
        """
        key = values.shape, values.device, getattr(self.given, "_version", None)
        if key not in self._known:
            self._known = {key: _ids(self.given, values, self.what)}
        return self._known[key]

    @property
    def examples(self) -> int | None:
        """The number of examples that there are ids for; None where they are the same for all."""
        return examples_of(self.given)

    def take(self, rows: Sequence[int]) -> "ClassIds":
        """Return the ids of some examples."""
        return ClassIds(take(self.given, rows, self.what), self.what)


def _ids(ids: Ids, values: Tensor, what: str) -> Tensor:
    """Return `ids` as `[batch, k]`, or raise InterventionError, in which `what` names them."""
    batch, classes = values.shape
    try:
        found = torch.as_tensor(ids, device=values.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InterventionError(f"{what}={ids!r} are no ids; give an int, [batch] or [batch, k] ints.") from error
    if found.ndim > 0 and (found.ndim > 2 or len(found) != batch):
        raise InterventionError(
            f"{what} has shape {list(found.shape)} for {batch} examples; give one int for all, [{batch}] or "
            f"[{batch}, k]."
        )
    is_whole = found.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    if not is_whole or found.is_meta or not ((found >= 0) & (found < classes)).all():
        raise InterventionError(f"{what}={ids!r} are not all classes of the output; give ints from 0 to {classes - 1}.")
    each = found.long().expand(batch) if found.ndim == 0 else found.long()
    return each if each.ndim == 2 else rearrange(each, "batch -> batch 1")
