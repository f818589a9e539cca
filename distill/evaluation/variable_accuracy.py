"""Interchange intervention accuracy of a network under a causal model.

The causal model answers with a variable set to the value that it has for the source. The network is right if it gives
the same answer with the vectors at the variable's locations taken from its run of the source:

    IIA = Σ 1[network(base; places ← source) = causal model(base; variable ← source)] / Σ 1.

Geiger et al. 2021 (arXiv:2106.02997), section 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from distill.causal.feed import Given, given
from distill.causal.model import CausalModel
from distill.causal.values import Values, as_answers
from distill.data.rows import Rows
from distill.data.seeds import seed_from
from distill.data.seen_rows import SeenRows, fingerprints
from distill.errors import DistillError
from distill.evaluation.controls import controls_of
from distill.evaluation.interchange_result import InterchangeAccuracy
from distill.evaluation.measurement import (
    Batch,
    Examples,
    Interchanges,
    Measurement,
    accuracy_of,
    check_pairs,
    paired,
    refuse_seen,
)
from distill.evaluation.shared_runs import fitting
from distill.interchange.mapping import Entry, Sides, entries_of
from distill.interchange.swap import Ran, encoded, places_of, swapped
from distill.interchange.whole_state import refuse_wholes
from distill.models.finite import check_answers
from distill.models.inputs import device_of, evaluating, refuse_valueless
from distill.statistics.sharing import Sharing
from distill.statistics.tally import Tally, compare_classes, stacked, sum_predictions
from interventions import Run, run

STREAM = 2**31 - 1  # seeds the pairs that are measured, apart from those that are trained on
FEW = 16
"""How many examples show whether a location is the whole state of a layer."""


def variables_accuracy(
    model: CausalModel,
    network: nn.Module,
    mapping: Sides | tuple[Entry, ...] | str,
    data: Any = None,
    *,
    positions: Any = None,
    pairs: int = 2000,
    seed: int = 0,
    batch_size: int | None = None,
    controls: str | Sequence[str] = (),
    exclude: SeenRows | None = None,
) -> InterchangeAccuracy:
    """Measure how often a network answers as the causal model does under the same interchange, entry by entry.

    Base and source are sampled by the causal model, or rows of `data`, with a seed apart from that of training. The
    draws depend on `seed` alone, not on the batch size. `do nothing` and `replace all` are the network's answers to
    base and source. The arguments are those of `interchange_accuracy`.

    Raises:
        DistillError: no pairs, a mapping that does not fit, data that contradicts the causal model or was trained on,
            no interchange that changes the answer, or a location that is the whole state of a layer at every position:
            later layers would compute the same as for the source in any network.

    Geiger et al. 2021 (arXiv:2106.02997), section 3.
    """
    entries, names = entries_of(mapping, model, network, positions), controls_of(controls)
    refuse_valueless(network, "interchange_accuracy")
    rows = None if data is None else given(model, data)
    examples = examples_of_model(model, pairs, seed, rows)
    overlap = None if exclude is None else _overlap(examples, rows, exclude)
    refuse_wholes(model, network, entries, *examples.first(FEW, device_of(network)))
    size = pairs_at_once(model, network, examples) if batch_size is None else batch_size
    measurement = Measurement(VariableInterchanges(model, network, entries), examples, seed, size)
    tally = measurement.tally()
    refuse_ineffective(tally, entries, has_rows=data is not None)
    settings = {"pairs": pairs, "seed": seed, "sources": "sampled" if data is None else "rows of the data"}
    found = accuracy_of(tally, entries, examples.sharing, settings)
    return replace(found, controls=measurement.controls(names), overlap=overlap)


def pairs_at_once(model: CausalModel, network: nn.Module, examples: Examples) -> int:
    """Return how many pairs a forward takes by default: as many as a share of the free memory holds."""
    few, _ = examples.first(FEW, device_of(network))
    with evaluating(network), torch.no_grad():
        return fitting([network], [encoded(model, network, few)], device_of(network))


def _overlap(examples: Examples, rows: Given | None, seen: SeenRows) -> float:
    """Return the share of sampled bases that were trained on; raise DistillError for rows of data that were."""
    if rows is None:
        return float(seen.among(examples.base.table).double().mean())
    keep = "keep = ~result.seen.among(data), then {name: column[keep] for name, column in data.items()}"
    refuse_seen(rows.values, seen, keep)
    return 0.0


def refuse_ineffective(tally: Tally, entries: tuple[Entry, ...], *, has_rows: bool) -> None:
    """Raise DistillError for a variable whose interchange never changes the answer: any network would be right.

    Answers that are numbers all count.
    """
    if tally.regression:
        return
    for entry, effect in zip(entries, tally["effect"].sum(0).tolist(), strict=True):
        if not effect:
            more = "give rows" if has_rows else "give the causal model a sample=…"
            raise DistillError(
                f"none of {len(tally.kept)} interchanges of {'+'.join(entry.teacher)} changes the answer of the causal "
                f"model, so they say nothing about {entry}; {more} in which more of them do, raise pairs=…, or leave "
                "it out of the mapping."
            )


def examples_of_model(model: CausalModel, pairs: int, seed: int, rows: Given | None = None) -> Examples:
    """Return pairs that are sampled by the causal model, or of rows of data, seeded apart from those of training."""
    check_pairs(pairs)
    generator = torch.Generator().manual_seed(seed_from(seed, STREAM))
    if rows is not None:
        base, other = paired(len(rows), pairs, generator)
        return Examples(Rows(rows.batch(base)), Rows(rows.batch(other)), Sharing(base, other))
    bases, sources = model.sample(pairs, generator), model.sample(pairs, generator)
    marks = [fingerprints(each) for each in (bases, sources)]
    numbers = {mark: number for number, mark in enumerate(dict.fromkeys([*marks[0], *marks[1]]))}
    rows_of = [torch.tensor([numbers[mark] for mark in each]) for each in marks]
    return Examples(Rows(bases), Rows(sources), Sharing(*rows_of))


@dataclass(frozen=True, eq=False)
class VariableInterchanges(Interchanges):
    """Variables of a causal model, interchanged in it and at their locations in a network."""

    teacher: CausalModel
    student: nn.Module

    @property
    def networks(self) -> tuple[Any, ...]:
        """The student alone, as the teacher is a causal model."""
        return (self.student,)

    def inputs(self, batch: Batch) -> Any:
        """Return the inputs that the student is called with."""
        return encoded(self.teacher, self.student, batch)

    def count(self, base: Batch, source: Batch, teacher_source: Batch | None, pairs: Int[Tensor, " batch"]) -> Tally:
        """Return what these pairs add to the sums of each entry."""
        model, high = self.teacher, [self.teacher.run(values) for values in (base, source)]
        other = high[1] if teacher_source is None else model.run(teacher_source)
        runs = [run(self.student, self.inputs(values), places_of(self.entries)) for values in high]
        here, there = (Ran(values, ran) for values, ran in zip(high, runs, strict=True))
        on_base, on_source = (self._answers(ran, values) for ran, values in zip(runs, high, strict=True))
        unchanged = model.answers(high[0])
        wanted = {
            variables: model.answers(model.interchange(high[0], {variables: other}))
            for variables in dict.fromkeys(entry.teacher for entry in self.entries)
        }
        before = Before(unchanged, on_base, on_source)
        sums: dict[int, dict[str, Tensor]] = {}
        for numbers in self._alike():  # what the student answers after an interchange does not depend on the variables
            after = self._answers(swapped(model, self.student, self.entries[numbers[0]], here, there), high[0])
            compared = before.compared(after, [wanted[self.entries[i].teacher] for i in numbers])
            sums |= dict(zip(numbers, compared, strict=True))
        return stacked([sums[i] for i in range(len(self.entries))])

    def _alike(self) -> list[list[int]]:
        """Return the numbers of the entries of each place and its positions, which have one counterfactual run."""
        found: dict[Any, list[int]] = {}
        for i, entry in enumerate(self.entries):
            found.setdefault((entry.student, tuple(map(id, entry.positions))), []).append(i)
        return list(found.values())

    def _answers(self, ran: Run, values: Values) -> Tensor:
        """Return the logits of the student's answers to these values."""
        answers = self.teacher.decode(ran.logits, values)
        check_answers(answers, "interchange accuracy")
        return answers


@dataclass(frozen=True, eq=False)
class Before:
    """The answers to the bases and the sources of a batch, with which those after interchanges are compared.

    Attributes:
        unchanged: the causal model's answers to the bases.
        base, source: the student's logits on the bases and on the sources.
    """

    unchanged: Tensor
    base: Tensor
    source: Tensor

    @cached_property
    def surprise(self) -> Tensor:
        """The surprise of the student at the causal model's answers to the bases, −log p [nats]."""
        return _surprises(self.base, [self.unchanged])[0]

    @cached_property
    def classes(self) -> tuple[Tensor, Tensor]:
        """The classes that the student answers on the bases and on the sources."""
        return self.base.argmax(-1), self.source.argmax(-1)

    def compared(self, after: Tensor, wanted: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Return what each pair adds to the sums of the entries of one counterfactual run, by the names of a tally.

        Args:
            after: the student's logits after the interchange.
            wanted: the causal model's answers, for each entry.
        """
        ones = torch.ones(len(after), dtype=torch.float64, device=after.device)
        if self.unchanged.is_floating_point():
            errors = [
                (as_answers(after, each) - each.to(after)).abs().reshape(len(after), -1).mean(1) for each in wanted
            ]
            return [sum_predictions({"error": error}, ones) for error in errors]
        same, classes = torch.isclose(after, self.source, rtol=1e-4, atol=1e-5).all(1), after.argmax(-1)
        found = []
        for each, surprise in zip(wanted, _surprises(after, wanted), strict=True):
            compared = compare_classes(each, self.unchanged, classes, *self.classes)
            more = {"divergence": surprise, "divergence_on_base": self.surprise, "as_source": same}
            found.append(sum_predictions(compared | more, ones))
        return found


def _surprises(logits: Tensor, classes: Sequence[Tensor]) -> list[Tensor]:
    """Return −log p of several classes for each row under the softmax of logits [nats], `[batch]` each."""
    known = logits.double().log_softmax(-1)
    return [-known.gather(-1, each[:, None])[:, 0] for each in classes]
