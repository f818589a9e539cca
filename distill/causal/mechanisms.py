"""The computation of a causal model: every variable from its parents, in order, with a check of each value."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.causal.domains import Domain, first_outside
from distill.causal.graph import descendants
from distill.causal.values import Computed, Values, call, describe, describe_rows, one_batch
from distill.errors import DistillError


@dataclass(frozen=True, eq=False)
class Mechanisms:
    """The functions that compute the variables of a causal model, with the domains of their values.

    Attributes:
        variables: all of them, each after its parents.
        parents: of each variable; inputs have none.
        functions: the mechanism of each variable that is no input.
        domains: of the variables that have one.
    """

    variables: tuple[str, ...]
    parents: Mapping[str, tuple[str, ...]]
    functions: Mapping[str, Callable[..., Any]]
    domains: Mapping[str, Domain]

    def check(self, values: Any, names: tuple[str, ...], what: str = "the values hold") -> dict[str, Tensor]:
        """Return the values of exactly these variables, one batch on one device, each in its domain.

        Args:
            values: the values to check.
            names: the variables that they must have.
            what: the beginning of an error, as "the values hold".

        Raises:
            DistillError: a variable too many or missing, batches of different sizes or devices, or a value outside its
                domain.
        """
        if isinstance(values, Computed) and values.is_of(self):
            return {name: values[name] for name in names}
        batch = one_batch(values, names, self.variables, what)
        self._refuse_outside(batch, names, what)
        return batch

    def check_some(self, values: Any, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Return the values of these variables, of which there may be more, checked as by `check`."""
        if isinstance(values, Computed) and values.is_of(self):
            return {name: values[name] for name in names}
        return self.check({name: values[name] for name in names if name in values}, names)

    def run(self, known: Values) -> dict[str, Tensor]:
        """Return the values of all variables, in order: the known ones, and the others by their mechanisms.

        Raises:
            DistillError: a mechanism that fails, returns no batch, or leaves its domain.
        """
        values: dict[str, Tensor] = {}
        for name in self.variables:
            values[name] = known[name] if name in known else self._compute(name, values)
        return Computed(values, self)

    def interchange(self, run: Values, fixed: Values) -> dict[str, Tensor]:
        """Return a run with some variables fixed, and everything that depends on them computed anew."""
        stale = descendants(self.parents, fixed)
        return self.run({name: run[name] for name in self.variables if name not in stale} | dict(fixed))

    def check_rows(self, inputs: Values, run: Values) -> None:
        """Raise DistillError if a mechanism computes another value for the first row alone than in its batch."""
        alone = self.run({name: value[:1] for name, value in inputs.items()})
        for name in self.variables:
            if alone[name].shape != run[name][:1].shape or not torch.allclose(
                alone[name].double(), run[name][:1].double(), equal_nan=True
            ):
                raise DistillError(
                    f"the mechanism of {name!r} gives {describe(alone[name])} for row 0 alone and "
                    f"{describe(run[name])} for {len(run[name])} rows; compute each row on its own, from parents of "
                    "the same row."
                )

    def _compute(self, name: str, run: Values) -> Tensor:
        parents = {parent: run[parent] for parent in self.parents[name]}
        first = run[self.parents[name][0]]
        value = call(f"the mechanism of {name!r}", self.functions[name], **parents)
        if not isinstance(value, Tensor) or not value.ndim or len(value) != len(first) or value.device != first.device:
            raise DistillError(
                f"the mechanism of {name!r} returned {describe(value)} for {describe_rows(first)}; return a tensor "
                f"[{len(first)}, ...] on the device of {self.parents[name][0]!r}."
            )
        # At once: a table that is indexed outside its rows by the next mechanism would end a process on CUDA.
        self._refuse_outside({name: value}, [name], "the mechanisms computed")
        return value

    def _refuse_outside(self, values: Values, names: Sequence[str], what: str) -> None:
        known = {name: self.domains[name] for name in names if name in self.domains}
        outside = first_outside(values, known, what)
        if outside is not None:
            name, row = outside
            place = "domains" if name in self.functions else "inputs"
            raise DistillError(
                f"{what} {values[name][row].item()} as {name!r} in row {row}, outside its domain {known[name]}; "
                f"change it, or widen the domain: {place}={{{name!r}: [...]}}."
            )
