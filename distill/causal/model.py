"""Causal models: variables, their domains, and mechanisms that compute each variable from its parents.

A causal model is a hypothesis about what a network computes, and in which steps. An interchange fixes a variable V of
the run on a base b to its value in the run on a source s, and computes everything that depends on V anew:
answer(b; V ← V(s)). A network agrees if the same interchange of the aligned activations gives the same answer.

Geiger, Lu, Icard, Potts 2021 (arXiv:2106.02997), section 3.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from distill.causal.counterfactuals import Counterfactuals, collect
from distill.causal.domains import Domain, domain_of, number_classes
from distill.causal.encoding import check_decoded, check_encoded
from distill.causal.graph import in_order, parents_of, picture
from distill.causal.mechanisms import Mechanisms
from distill.causal.positions import Finder, select_positions
from distill.causal.values import Computed, call, describe_rows, on_device
from distill.errors import DistillError, checked, did_you_mean
from interventions import Picture, label, printed


@checked
class CausalModel:
    """A hypothesis about what a network computes: variables, their domains, and mechanisms that compute them.

    It is immutable, compares by identity, and computes whole batches on the device of their values.

    >>> both = CausalModel(
    ...     inputs={"a": range(3), "b": range(3), "c": (False, True)},
    ...     mechanisms={"same": lambda a, b: a == b, "answer": lambda same, c: same & c},
    ...     output="answer",
    ...     encode=lambda values: torch.stack([values[name] for name in "abc"], 1).float(),
    ... )
    >>> both
    CausalModel(a, b, c, same(a, b), answer(same, c))
    >>> base = {"a": torch.tensor([0]), "b": torch.tensor([1]), "c": torch.tensor([True])}
    >>> source = {"a": torch.tensor([2]), "b": torch.tensor([2]), "c": torch.tensor([False])}
    >>> both.answers(base), both.answers(source), both.answers(both.interchange(base, {"same": source}))
    (tensor([0]), tensor([0]), tensor([1]))

    Geiger et al. 2021 (arXiv:2106.02997), section 3.
    """

    inputs: tuple[str, ...]
    inner: tuple[str, ...]
    """The variables that are neither inputs nor the output."""
    output: str
    variables: tuple[str, ...]
    """All variables, each after its parents."""
    parents: Mapping[str, tuple[str, ...]]
    mechanisms: Mapping[str, Callable[..., Tensor]]
    domains: Mapping[str, Domain]
    """The domains of the inputs, and of the other variables that have one."""
    positions: Mapping[str, Finder]
    """The functions that find the named tokens of an encoded example."""
    _computation: Mechanisms
    _by_row: list[Tensor]
    """The output of one example, after the check that every row is computed on its own."""
    _encode: Callable[[dict[str, Tensor]], Any]
    _decode: Callable[[Tensor, dict[str, Tensor]], Any] | None
    _sample: Callable[[int, torch.Generator], Any] | None

    def __init__(
        self,
        inputs: Mapping[str, Any],
        mechanisms: Mapping[str, Callable[..., Any]],
        output: str,
        *,
        encode: Callable[[dict[str, Tensor]], Any],
        decode: Callable[[Tensor, dict[str, Tensor]], Any] | None = None,
        sample: Callable[[int, torch.Generator], Any] | None = None,
        domains: Mapping[str, Any] | None = None,
        positions: Mapping[str, Finder] | None = None,
    ) -> None:
        """Define the variables, by name.

        Args:
            inputs: the domain of each input: a range, a sequence or a 1-D tensor of numbers or bools, or None for an
                input that only `sample` draws (a real number, a vector).
            mechanisms: for each other variable a function of its parents, which are the names of its parameters (one
                with a default is a setting, unless a variable has its name). It takes batched tensors and returns one
                with as many rows, on the same device.
            output: the variable that is the answer.
            encode: turns the inputs into what a network is called with: a tensor or a dict of tensors, with as many
                rows.
            decode: reads a network's answer: `decode(logits, values)` gives `[batch, classes]`, from everything that
                the network returns (for a language model `[batch, token, vocabulary]`) and the inputs of its run.
                Without it the logits must have that shape already.
            sample: draws n values of each input, `sample(n, generator)`; without it, uniformly over the domains.
            domains: the domains of other variables. Values are checked against them, and the domain of the output
                numbers the classes.
            positions: names for tokens of an encoded example, each with a function of the inputs that returns where
                they are: `[batch]` or `[batch, k]`, counted over real tokens, −1 the last. Alignments use these names.

        Raises:
            DistillError: a name given twice, a parent that is no variable, a cycle, an output that no mechanism
                computes, or a domain that is none.
        """
        parents = parents_of(inputs, mechanisms)
        order = in_order(parents)
        if output not in mechanisms:
            raise DistillError(
                f"output={output!r} is no variable with a mechanism{did_you_mean(output, mechanisms)}; name one of "
                f"{', '.join(mechanisms)}."
            )
        for name in domains or {}:
            if name not in mechanisms:
                raise DistillError(
                    f"domains has {name!r}, which is no variable with a mechanism{did_you_mean(name, mechanisms)}; "
                    f"inputs take their domain in inputs={{...}}, and others are {', '.join(mechanisms)}."
                )
        given = {name: domain for name, domain in {**inputs, **(domains or {})}.items() if domain is not None}
        computation = Mechanisms(
            variables=order,
            parents={name: parents[name] for name in order},
            functions=dict(mechanisms),
            domains={name: domain_of(name, domain) for name, domain in given.items()},
        )
        vars(self).update(
            inputs=tuple(inputs),
            inner=tuple(name for name in order if name not in inputs and name != output),
            output=output,
            variables=order,
            parents=computation.parents,
            mechanisms=computation.functions,
            domains=computation.domains,
            positions=dict(positions or {}),
            _computation=computation,
            _by_row=[],
            _encode=encode,
            _decode=decode,
            _sample=sample,
        )

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a CausalModel is immutable; build another one instead of setting {name!r}")

    @property
    def classes(self) -> int | None:
        """The number of classes of the answer; None for a real-valued output."""
        if self.output in self.domains:
            return len(self.domains[self.output])
        if not self._by_row:  # has not run yet
            self.run(self.sample(2, torch.Generator().manual_seed(0)))
        return None if self._answers(self._by_row[0]).is_floating_point() else 2

    @checked
    def run(self, values: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the values of all variables, computed from those of the inputs.

        Raises:
            DistillError: inputs that are missing, unknown or outside their domain, or a mechanism that does not compute
                a batch row by row.
        """
        inputs = self._computation.check(values, self.inputs)
        run = self._computation.run(inputs)
        if not self._by_row and len(run[self.output]) > 1:
            self._computation.check_rows(inputs, run)
            self._by_row.append(run[self.output][:1])
        return run

    @checked
    def interchange(self, base: Mapping[str, Any], sources: Mapping[Any, Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the run on `base` with variables fixed to their values in runs on sources.

        Everything that depends on these variables is computed anew.

        Args:
            base: inputs, or a run.
            sources: for a variable, or a tuple of variables, the source of its value: inputs, or a run.

        Raises:
            DistillError: an unknown variable, or one twice, or batches of different sizes.
        """
        run, fixed = self._as_run(base), dict[str, Tensor]()
        for names, source in sources.items():
            there = self._as_run(source)
            for name in self._check_names(names):
                if name in fixed:
                    raise DistillError(f"interchange takes {name!r} from two sources; name each variable once.")
                if len(there[name]) != len(run[name]) or there[name].device != run[name].device:
                    raise DistillError(
                        f"the source of {name!r} has {describe_rows(there[name])} and the base "
                        f"{describe_rows(run[name])}; give one source a base row, on its device, as with "
                        "values['a'][rows].to(device)."
                    )
                fixed[name] = there[name]
        return self._computation.interchange(run, fixed)

    @checked
    def answers(self, values: Mapping[str, Any]) -> Tensor:
        """Return the class of each example `[batch]`: the place of its output in the domain of the output.

        A bool output has the classes 0 (False) and 1 (True). A real-valued output needs no domain: its values are
        returned. Any other output needs one.

        Args:
            values: inputs, or a run.
        """
        return self._answers(self._as_run(values)[self.output])

    @checked
    def encode(self, values: Mapping[str, Any]) -> Tensor | dict[str, Tensor]:
        """Return what a network is called with for these inputs (or the inputs of this run).

        Raises:
            DistillError: `encode=` fails, or returns another number of rows.
        """
        given = self._inputs_of(values)
        encoded = call("encode", self._encode, given)
        check_encoded(encoded, len(given[self.inputs[0]]))
        return dict(encoded) if isinstance(encoded, Mapping) else encoded

    @checked
    def decode(self, logits: Tensor, values: Mapping[str, Any]) -> Tensor:
        """Return the logits of the answers, `[batch, classes]` (a real-valued answer: `[batch]` or `[batch, ...]`).

        Args:
            logits: those of a network's run on these values, encoded.
            values: inputs, or a run.

        Raises:
            DistillError: another shape.
        """
        given = self._inputs_of(values)
        logits = logits if self._decode is None else call("decode", self._decode, logits, dict(given))
        if not self._by_row:
            self.run(given)
        check_decoded(logits, len(given[self.inputs[0]]), self.classes)
        return logits

    @checked
    def select(self, positions: Any, values: Mapping[str, Any]) -> Any:
        """Return positions in the encoded values, in a form that `interventions` takes.

        Args:
            positions: the name of tokens of this model, or several names; a function like those in `positions`; or
                anything that `interventions.select` takes, which is returned unchanged.
            values: inputs, or a run.

        Raises:
            DistillError: an unknown name, or a function that returns no whole numbers `[batch]` or `[batch, k]`.
        """
        return select_positions(positions, self.positions, lambda: self._inputs_of(values))

    @checked
    def sample(self, n: int, generator: torch.Generator, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """Draw `n` values of each input on the device of `generator`, then move them to `device`.

        So a generator of the CPU draws the same numbers for every device.

        Raises:
            DistillError: n below 1, an input without a domain (and no `sample=`), or a `sample=` that fails.
        """
        if n < 1:
            raise DistillError(f"sample(n={n}) draws nothing; draw at least one example.")
        home = on_device(device) or generator.device
        if self._sample is not None:
            drawn = call("sample", self._sample, n, generator)
        else:
            drawn = {name: self._input_domain(name, "sample").draw(n, generator) for name in self.inputs}
        values = self._computation.check(drawn, self.inputs, "sample returned")
        rows = len(values[self.inputs[0]])
        if rows != n:
            raise DistillError(f"sample returned {rows} examples instead of {n}; return tensors [n, ...].")
        return Computed({name: value.to(home) for name, value in values.items()}, self._computation)

    @checked
    def pairs(
        self,
        n: int,
        variables: str | Sequence[str],
        generator: torch.Generator,
        *,
        effective: float | None = 0.5,
        device: torch.device | str | None = None,
    ) -> Counterfactuals:
        """Draw `n` pairs of base and source for an interchange of `variables` from one source.

        Args:
            n: the number of pairs.
            variables: one name, or several that are interchanged together.
            generator: the generator of the draws.
            effective: the share of pairs whose answer the interchange changes, reached by leaving out others; None
                takes pairs as they are drawn.
            device: where the pairs are computed and returned, that of `generator` if None.

        Raises:
            DistillError: too few pairs of a kind among a million.
        """
        names = self._check_names(variables)
        if n < 1:
            raise DistillError(f"pairs(n={n}) draws nothing; draw at least one pair.")
        if effective is None:
            return self._draw_pairs(n, names, generator, device)
        return collect(lambda size: self._draw_pairs(size, names, generator, device), n, effective, generator)

    @checked
    def enumerate(self, limit: int = 1_000_000, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """Return every combination of input values once, the last input changing fastest.

        Raises:
            DistillError: more than `limit` combinations, or an input without a domain.
        """
        sizes = [len(self._input_domain(name, "enumerate")) for name in self.inputs]
        count = prod(sizes)
        if count > limit:
            raise DistillError(
                f"there are {count:,} combinations of inputs ({' · '.join(map(str, sizes))}), more than "
                f"limit={limit:,}; draw some with sample(n, generator), or raise the limit."
            )
        places = torch.unravel_index(torch.arange(count, device=on_device(device)), tuple(sizes))
        return {
            name: self.domains[name].values.to(place.device)[place]
            for name, place in zip(self.inputs, places, strict=True)
        }

    def draw(self) -> Picture:
        """Draw the graph of the variables, with the names of their functions where they have one.

        Inputs are on the left (blue), the output on the right (green).
        """
        labels = {name: name for name in self.variables}
        for name, mechanism in self.mechanisms.items():
            function = getattr(mechanism, "__name__", name)
            if function not in (name, "<lambda>"):
                labels[name] = f"{name}: {function}"
        return picture(self.parents, self.output, {name: label(text) for name, text in labels.items()})

    @printed
    def __repr__(self) -> str:
        computed = (f"{name}({', '.join(self.parents[name])})" for name in self.variables if self.parents[name])
        return f"CausalModel({', '.join([*self.inputs, *computed])})"

    def _repr_png_(self) -> bytes:
        return self.draw()._repr_png_()

    def _check_names(self, variables: Any) -> tuple[str, ...]:
        names = (variables,) if isinstance(variables, str) else tuple(variables)
        if not names:
            raise DistillError(f"no variable was named; name one or several of {', '.join(self.variables)}.")
        for name in names:
            if name not in self.variables:
                raise DistillError(
                    f"the causal model has no variable {name!r}{did_you_mean(str(name), self.variables)}; it has "
                    f"{', '.join(self.variables)}."
                )
        return names

    def _inputs_of(self, values: Mapping[str, Any]) -> dict[str, Tensor]:
        return self._computation.check_some(values, self.inputs)

    def _as_run(self, values: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run the model on inputs; return a run, the values of all variables, as it is."""
        if isinstance(values, Mapping) and len(values) > len(self.inputs):
            return self._computation.check(values, self.variables)
        return self.run(values)

    def _answers(self, output: Tensor) -> Tensor:
        return number_classes(self.output, output, self.domains.get(self.output))

    def _input_domain(self, name: str, method: str) -> Domain:
        if name not in self.domains:
            raise DistillError(
                f"{method} needs the domain of the input {name!r}, which is None; give one, as inputs={{{name!r}: "
                "range(10)}, or give sample=... to the causal model and call its sample(n, generator)."
            )
        return self.domains[name]

    def _draw_pairs(
        self, n: int, names: tuple[str, ...], generator: torch.Generator, device: torch.device | str | None
    ) -> Counterfactuals:
        base, source = (self._computation.run(self.sample(n, generator, device)) for _ in range(2))
        after = self._computation.interchange(base, {name: source[name] for name in names})
        answers, base_answers = self._answers(after[self.output]), self._answers(base[self.output])
        effective = (answers != base_answers).flatten(1).any(1) if answers.ndim > 1 else answers != base_answers
        inputs = [{name: run[name] for name in self.inputs} for run in (base, source)]
        return Counterfactuals(names, inputs[0], inputs[1], base_answers, answers, effective)
