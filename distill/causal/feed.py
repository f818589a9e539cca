"""The examples that a network is trained and measured on under a causal model: drawn inputs, or rows of data."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from distill.causal.model import CausalModel
from distill.causal.values import Values
from distill.errors import DistillError

SAMPLED_STEPS = 2000  # of training on drawn inputs, where neither steps= nor epochs= is given


@runtime_checkable
class Feed(Protocol):
    """Numbered rows of base inputs, and a supply of source inputs for them."""

    @property
    def model(self) -> CausalModel:
        """The causal model that computes the answers."""

    def __len__(self) -> int: ...

    def batch(self, rows: Iterable[int] | Tensor) -> dict[str, Tensor]:
        """Return the values of the inputs of these rows."""

    def sources(self, n: int, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
        """Draw the values of the inputs of n sources."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Rows that a causal model draws: the seed and the numbers of the rows of a batch decide the batch.

    Attributes:
        model: the causal model that draws.
        seed: an integer.
        count: the number of rows to train on; `batch` takes larger numbers too.
    """

    model: CausalModel
    seed: int
    count: int

    def __len__(self) -> int:
        return self.count

    def batch(self, rows: Iterable[int] | Tensor) -> dict[str, Tensor]:
        """Draw the values of the inputs of as many examples as there are rows."""
        numbers = rows.tolist() if isinstance(rows, Tensor) else list(rows)
        generator = torch.Generator().manual_seed(hash((self.seed, *numbers)) % 2**63)
        return self.model.sample(len(numbers), generator)

    def sources(self, n: int, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
        """Draw the values of the inputs of n more examples."""
        return self.model.sample(n, generator, device)


@dataclass(frozen=True, eq=False)
class Given:
    """Rows of data with the inputs of a causal model; sources are drawn from the same rows."""

    model: CausalModel
    values: Values

    def __len__(self) -> int:
        return len(self.values[self.model.inputs[0]])

    def batch(self, rows: Iterable[int] | Tensor) -> dict[str, Tensor]:
        """Return the values of the inputs of these rows."""
        chosen = rows if isinstance(rows, Tensor) else torch.tensor(list(rows))
        return {name: self.values[name][chosen] for name in self.model.inputs}

    def sources(self, n: int, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
        """Draw n rows with replacement, and return the values of their inputs."""
        rows = torch.randint(len(self), (n,), generator=generator)
        return {name: value.to(device) for name, value in self.batch(rows).items()}


def given(model: CausalModel, data: Any) -> Given:
    """Return rows of data as examples of a causal model, after a check that the model agrees with them.

    Args:
        model: the causal model.
        data: {name: tensor `[rows, ...]`} of each input. Columns of other variables, and `labels`, the class of the
            answer, are compared with what the model computes. A `Given` of this model is returned as it is.

    Raises:
        DistillError: a column that is missing, unknown or outside its domain; or a value that the causal model
            contradicts, with its variable and row.
    """
    if isinstance(data, Given) and data.model is model:
        return data
    if not isinstance(data, Mapping):
        raise DistillError(
            f"data is an object of type {type(data).__name__} and the teacher is a causal model; give a dict "
            f"{{name: tensor}} of {', '.join(model.inputs)}, or leave data out: the causal model samples its own."
        )
    unknown = [name for name in data if name not in (*model.variables, "labels")]
    if unknown:
        raise DistillError(
            f"data has {unknown[0]!r}, which is no variable of the causal model; leave it out, or name it: the "
            f"variables are {', '.join(model.variables)}, and 'labels' are the classes of {model.output!r}."
        )
    values = {name: torch.as_tensor(data[name]).cpu() for name in model.inputs if name in data}
    computed = model.run(values)
    rows = len(computed[model.output])
    for name in data:
        if name not in model.inputs:
            wanted = model.answers(computed) if name == "labels" and name not in model.variables else computed[name]
            _check_agrees(name, torch.as_tensor(data[name]).cpu(), wanted)
    if rows < 2:
        raise DistillError(f"data has {rows} row, and a source must be another one; give at least 2 rows.")
    return Given(model, values)


def chunks(values: Values, size: int) -> Iterator[dict[str, Tensor]]:
    """Yield the values, `size` rows at a time.

    Raises:
        DistillError: no variables, or a size below 1.
    """
    if not values or size < 1:
        raise DistillError(
            f"batch_size={size} of the variables {', '.join(values) or 'none'} measures nothing; give {{variable: "
            "values}, and e.g. batch_size=256."
        )
    rows = len(next(iter(values.values())))
    for first in range(0, rows, size):
        yield {name: value[first : first + size] for name, value in values.items()}


def _check_agrees(name: str, stated: Tensor, computed: Tensor) -> None:
    if stated.shape != computed.shape:
        raise DistillError(
            f"data has {name!r} of shape {list(stated.shape)} and the causal model computes {list(computed.shape)}; "
            "give one value a row."
        )
    different = (
        stated != computed if not computed.is_floating_point() else ~torch.isclose(stated.to(computed), computed)
    )
    different = different.flatten(1).any(1) if different.ndim > 1 else different
    if bool(different.any()):
        row = int(different.nonzero()[0])
        raise DistillError(
            f"the data contradicts the causal model in {int(different.sum())} of {len(stated)} rows: {name!r} of row "
            f"{row} is {stated[row].tolist()} and its mechanism gives {computed[row].tolist()}; correct the row or the "
            f"mechanism, or leave the column {name!r} out."
        )
