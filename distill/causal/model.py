"""Causal models: variables with domains and mechanisms that say what a network should compute, and how."""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from distill.causal.counterfactuals import Counterfactuals, collected
from distill.causal.domains import Domain, domain_of, first_outside
from distill.causal.graph import descendants, in_order, parents_of, picture
from distill.causal.values import Values, called, described, on_device, one_batch, rows_in
from distill.errors import DistillError, checked, did_you_mean
from interventions import Picture, label, printed


@checked
class CausalModel:
    """What a network should compute: variables, their domains, and the mechanisms that compute one from others.

    It is immutable, compares by identity, and computes whole batches where the values are.

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
    """Neither inputs nor the output."""
    output: str
    variables: tuple[str, ...]
    """All of them, each after its parents."""
    parents: Mapping[str, tuple[str, ...]]
    mechanisms: Mapping[str, Callable[..., Tensor]]
    domains: Mapping[str, Domain]
    """Of the inputs, and of the other variables that were given one."""
    positions: Mapping[str, Callable[[dict[str, Tensor]], Any]]
    """Tokens of what is encoded that have a name."""
    _by_row: list[Tensor]
    """The output of one example, once it has been seen that every row is computed on its own."""
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
        positions: Mapping[str, Callable[[dict[str, Tensor]], Any]] | None = None,
    ) -> None:
        """Define the variables, by name.

        Args:
            inputs: the domain of each input: a range, a sequence or a 1-D tensor of numbers or bools, or None for an
                input that only `sample` draws (a real number, a vector).
            mechanisms: for each other variable a function of its parents, which are the names of its parameters (one
                with a default is a setting, unless a variable has its name): batched tensors in, one of as many rows
                out, on the same device.
            output: the variable that is the answer.
            encode: what a network is fed, from the inputs: a tensor or a dict of tensors, of as many rows.
            decode: how its answer is read: `decode(logits, values)` gives `[batch, classes]`, from all that it returns
                (for a language model `[batch, token, vocabulary]`) and the inputs of its run. Without it the logits are
                that already.
            sample: draws n values of each input, `sample(n, generator)`; without it, uniform over the domains.
            domains: those of other variables. They are checked, and that of the output numbers its classes.
            positions: names of tokens of what is encoded, each with a function of the inputs that says where they are:
                `[batch]` or `[batch, k]`, counted over real tokens, −1 the last. Alignments name them.

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
        vars(self).update(
            inputs=tuple(inputs),
            inner=tuple(name for name in order if name not in inputs and name != output),
            output=output,
            variables=order,
            parents={name: parents[name] for name in order},
            mechanisms=dict(mechanisms),
            domains={name: domain_of(name, domain) for name, domain in given.items()},
            positions=dict(positions or {}),
            _by_row=[],
            _encode=encode,
            _decode=decode,
            _sample=sample,
        )

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a CausalModel is immutable; build another one instead of setting {name!r}")

    @property
    def classes(self) -> int | None:
        """How many answers there are; None for a real-valued output."""
        if self.output in self.domains:
            return len(self.domains[self.output])
        if not self._by_row:  # has not run yet
            self.run(self.sample(2, torch.Generator().manual_seed(0)))
        return None if self._answers(self._by_row[0]).is_floating_point() else 2

    @checked
    def run(self, values: Mapping[str, Any]) -> dict[str, Tensor]:
        """The values of all variables, from those of the inputs."""
        given = self._checked(values, self.inputs)
        run = self._computed(given)
        if not self._by_row and len(run[self.output]) > 1:
            self._check_rows(given, run)
        return run

    @checked
    def interchange(self, base: Mapping[str, Any], sources: Mapping[Any, Mapping[str, Any]]) -> dict[str, Tensor]:
        """The run on `base` with variables fixed to what they are in runs on sources, and all that depends on them.

        Args:
            base: inputs, or a run.
            sources: by variable, or tuple of variables, where its value comes from: inputs, or a run.

        Raises:
            DistillError: an unknown variable, or one twice, or batches of different sizes.
        """
        run, fixed = self._as_run(base), dict[str, Tensor]()
        for names, source in sources.items():
            there = self._as_run(source)
            for name in self._named(names):
                if name in fixed:
                    raise DistillError(f"interchange takes {name!r} from two sources; name each variable once.")
                if len(there[name]) != len(run[name]) or there[name].device != run[name].device:
                    raise DistillError(
                        f"the source of {name!r} has {rows_in(there[name])} and the base {rows_in(run[name])}; give "
                        "one source a base row, on its device, as with values['a'][rows].to(device)."
                    )
                fixed[name] = there[name]
        return self._interchanged(run, fixed)

    @checked
    def answers(self, values: Mapping[str, Any]) -> Tensor:
        """The class of each example `[batch]`: the output's place in its domain, or the value of a real-valued output.

        A bool output has the classes 0 (False) and 1 (True), any other one needs a domain.

        Args:
            values: inputs, or a run.
        """
        return self._answers(self._as_run(values)[self.output])

    @checked
    def encode(self, values: Mapping[str, Any]) -> Tensor | dict[str, Tensor]:
        """What a network is fed for these inputs (or the inputs of this run)."""
        given = self._inputs_of(values)
        rows = len(given[self.inputs[0]])
        encoded = called("encode", self._encode, given)
        parts = encoded if isinstance(encoded, Mapping) else {"": encoded}
        for name, part in parts.items():
            if not isinstance(part, Tensor) or not part.ndim or len(part) != rows:
                raise DistillError(
                    f"encode returned {described(part)}{name and f' as {name!r}'} for {rows} examples; return a "
                    f"tensor [{rows}, ...] or a dict of them."
                )
        return dict(parts) if isinstance(encoded, Mapping) else encoded

    @checked
    def decode(self, logits: Tensor, values: Mapping[str, Any]) -> Tensor:
        """The logits of the answers, `[batch, classes]` (a real-valued answer: `[batch]` or `[batch, ...]`).

        Args:
            logits: of a network's run on what these values encode.
            values: inputs, or a run.

        Raises:
            DistillError: another shape.
        """
        if self._decode is not None:
            logits = called("decode", self._decode, logits, self._inputs_of(values))
        if not self._by_row:
            self.run(self._inputs_of(values))
        rows = len(self._inputs_of(values)[self.inputs[0]])
        if not isinstance(logits, Tensor) or not logits.ndim or len(logits) != rows:
            raise DistillError(
                f"decode returned {described(logits)} for {rows} examples; return a tensor [{rows}, classes]."
            )
        if self.classes is not None and logits.shape != (rows, self.classes):
            raise DistillError(
                f"the causal model has {self.classes} answers and the network {logits.shape[-1]} logits "
                f"({described(logits)}); give its last layer {self.classes}, or say which of them are the answers: "
                "CausalModel(…, decode=lambda logits, values: logits[:, -1, ids])."
            )
        return logits

    @checked
    def select(self, positions: Any, values: Mapping[str, Any]) -> Any:
        """Positions as `interventions` takes them, of what these values encode.

        Args:
            positions: the name of tokens of this model, or several names; a function like those in `positions`; or
                anything that `interventions.select` takes, which is returned as it is.
            values: inputs, or a run.

        Raises:
            DistillError: an unknown name, or a function that returns no whole numbers `[batch]` or `[batch, k]`.
        """
        if isinstance(positions, str):
            if positions not in self.positions:
                known = ", ".join(self.positions) or "none"
                raise DistillError(
                    f"the causal model has no position {positions!r}{did_you_mean(positions, self.positions)}; it has "
                    f"{known}. "
                    "Name it, as CausalModel(…, positions={'end': lambda values: …}), or give numbers of tokens."
                )
            return self._found(f"the position {positions!r}", self.positions[positions], values)
        if isinstance(positions, Sequence) and any(isinstance(each, str) for each in positions):
            return torch.cat([self._column(each, values) for each in positions], 1)
        return self._found("positions", positions, values) if callable(positions) else positions

    @checked
    def sample(self, n: int, generator: torch.Generator, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """`n` values of each input, drawn where `generator` is and then moved to `device`.

        So a generator of the CPU draws the same for every device.
        """
        if n < 1:
            raise DistillError(f"sample(n={n}) draws nothing; ask for at least one example.")
        home = on_device(device) or generator.device
        if self._sample is not None:
            drawn = called("sample", self._sample, n, generator)
        else:
            drawn = {name: self._uniform(name, n, generator) for name in self.inputs}
        values = self._checked(drawn, self.inputs, "sample returned")
        rows = len(values[self.inputs[0]])
        if rows != n:
            raise DistillError(f"sample returned {rows} examples and {n} were asked for; return tensors [n, ...].")
        return {name: value.to(home) for name, value in values.items()}

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
        """`n` pairs of base and source for an interchange of `variables` from one source.

        Args:
            n: how many.
            variables: one name, or several that are interchanged together.
            generator: what draws.
            effective: the share of pairs whose answer the interchange changes, reached by leaving out others; None
                takes pairs as they come.
            device: where the pairs are computed and returned, that of `generator` if None.

        Raises:
            DistillError: too few pairs of a kind among a million.
        """
        names = self._named(variables)
        if n < 1:
            raise DistillError(f"pairs(n={n}) draws nothing; ask for at least one pair.")
        if effective is None:
            return self._drawn(n, names, generator, device)
        return collected(lambda size: self._drawn(size, names, generator, device), n, effective, generator)

    @checked
    def enumerate(self, limit: int = 1_000_000, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """Every combination of input values once, the last input changing fastest.

        Raises:
            DistillError: more than `limit` combinations, or an input without a domain.
        """
        sizes = {name: len(self._input_domain(name, "enumerate")) for name in self.inputs}
        count = prod(sizes.values())
        if count > limit:
            raise DistillError(
                f"there are {count:,} combinations of inputs ({' · '.join(map(str, sizes.values()))}), more than "
                f"limit={limit:,}; draw some with sample(n, generator), or raise the limit."
            )
        places = torch.unravel_index(torch.arange(count, device=on_device(device)), tuple(sizes.values()))
        return {
            name: self.domains[name].values.to(place.device)[place]
            for name, place in zip(self.inputs, places, strict=True)
        }

    def draw(self) -> Picture:
        """The graph, inputs on the left (blue), the output on the right (green), with the names of named functions."""
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

    def _named(self, variables: Any) -> tuple[str, ...]:
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
        return self._checked({name: values[name] for name in self.inputs if name in values}, self.inputs)

    def _found(self, what: str, function: Callable[[dict[str, Tensor]], Any], values: Mapping[str, Any]) -> Tensor:
        given = self._inputs_of(values)
        rows = len(given[self.inputs[0]])
        found = called(what, function, given)
        if not isinstance(found, Tensor) or found.ndim not in (1, 2) or len(found) != rows or found.is_floating_point():
            raise DistillError(
                f"{what} gave {described(found)} for {rows} examples; return whole numbers [{rows}] or [{rows}, k]."
            )
        return found if found.ndim == 2 else found[:, None]

    def _column(self, position: Any, values: Mapping[str, Any]) -> Tensor:
        """One of several positions, `[batch, k]`."""
        found = self.select(position, values)
        first = values[self.inputs[0]]
        return found if isinstance(found, Tensor) else torch.full((len(first), 1), found, device=first.device)

    def _as_run(self, values: Mapping[str, Any]) -> dict[str, Tensor]:
        """Inputs are run; values of all variables are a run already."""
        if isinstance(values, Mapping) and len(values) > len(self.inputs):
            return self._checked(values, self.variables)
        return self.run(values)

    def _checked(self, values: Any, names: tuple[str, ...], what: str = "the values hold") -> dict[str, Tensor]:
        """Values of exactly these variables, one batch on one device, each in its domain."""
        batch = one_batch(values, names, self.variables, what)
        self._refuse_outside(batch, names, what)
        return batch

    def _computed(self, known: Values) -> dict[str, Tensor]:
        """All variables, in order: those that are known, and the others by their mechanisms."""
        run: dict[str, Tensor] = {}
        for name in self.variables:
            run[name] = known[name] if name in known else self._mechanism(name, run)
        return run

    def _check_rows(self, given: Values, run: Values) -> None:
        """Raise where a mechanism computes another value for the first row alone than in its batch."""
        alone = self._computed({name: value[:1] for name, value in given.items()})
        for name in self.variables:
            if alone[name].shape != run[name][:1].shape or not torch.allclose(
                alone[name].double(), run[name][:1].double(), equal_nan=True
            ):
                raise DistillError(
                    f"the mechanism of {name!r} gives {described(alone[name])} for row 0 alone and "
                    f"{described(run[name])} for {len(run[name])} rows; compute each row on its own, from parents of "
                    "the same row."
                )
        self._by_row.append(run[self.output][:1])

    def _mechanism(self, name: str, run: Values) -> Tensor:
        given = {parent: run[parent] for parent in self.parents[name]}
        first = run[self.parents[name][0]]
        value = called(f"the mechanism of {name!r}", self.mechanisms[name], **given)
        if not isinstance(value, Tensor) or not value.ndim or len(value) != len(first) or value.device != first.device:
            raise DistillError(
                f"the mechanism of {name!r} returned {described(value)} for {rows_in(first)}; return a tensor "
                f"[{len(first)}, ...] on the device of {self.parents[name][0]!r}."
            )
        # At once: a table that is indexed outside its rows by the next mechanism would end a process on CUDA.
        self._refuse_outside({name: value}, [name], "the mechanisms computed")
        return value

    def _interchanged(self, run: Values, fixed: Values) -> dict[str, Tensor]:
        stale = descendants(self.parents, fixed)
        return self._computed({name: run[name] for name in self.variables if name not in stale} | dict(fixed))

    def _refuse_outside(self, values: Values, names: Sequence[str], what: str) -> None:
        given = {name: self.domains[name] for name in names if name in self.domains}
        outside = first_outside(values, given, what)
        if outside is not None:
            name, row = outside
            place = "inputs" if name in self.inputs else "domains"
            raise DistillError(
                f"{what} {values[name][row].item()} as {name!r} in row {row}, outside its domain {given[name]}; "
                f"change it, or widen the domain: {place}={{{name!r}: [...]}}."
            )

    def _answers(self, output: Tensor) -> Tensor:
        if self.output in self.domains:
            return self.domains[self.output].index(output)
        if output.dtype == torch.bool and output.ndim == 1:
            return output.long()
        if output.is_floating_point():
            return output
        highest = int(output.max()) if output.numel() else 1
        raise DistillError(
            f"the output {self.output!r} is {described(output)} without a domain, so its classes are not known; give "
            f"one number an example and domains={{{self.output!r}: range({highest + 1})}}."
        )

    def _input_domain(self, name: str, what: str) -> Domain:
        if name not in self.domains:
            raise DistillError(
                f"{what} needs the domain of the input {name!r}, which is None; give one, as inputs={{{name!r}: "
                "range(10)}, or give sample=... to the causal model and call its sample(n, generator)."
            )
        return self.domains[name]

    def _uniform(self, name: str, n: int, generator: torch.Generator) -> Tensor:
        values = self._input_domain(name, "sample").values.to(generator.device)
        return values[torch.randint(len(values), (n,), generator=generator, device=generator.device)]

    def _drawn(
        self, n: int, names: tuple[str, ...], generator: torch.Generator, device: torch.device | str | None
    ) -> Counterfactuals:
        base, source = (self._computed(self.sample(n, generator, device)) for _ in range(2))
        after = self._interchanged(base, {name: source[name] for name in names})
        answers, base_answers = self._answers(after[self.output]), self._answers(base[self.output])
        effective = (answers != base_answers).flatten(1).any(1) if answers.ndim > 1 else answers != base_answers
        inputs = [{name: run[name] for name in self.inputs} for run in (base, source)]
        return Counterfactuals(names, inputs[0], inputs[1], base_answers, answers, effective)
