"""Interchange intervention accuracy of a network under a causal model.

The causal model answers with a variable set to the value that it has for the source. The network is right if it gives
the same answer with the vectors at the variable's locations taken from its run of the source:

    IIA = Σ 1[network(base; places ← source) = causal model(base; variable ← source)] / Σ 1.

Geiger et al. 2021 (arXiv:2106.02997), section 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from distill.interchange.mapping import Entry, Sides, entries_of
from distill.interchange.swap import Ran, encoded, places_of, swapped
from distill.interchange.whole_state import refuse_wholes
from distill.models.finite import check_answers
from distill.models.inputs import device_of, refuse_valueless
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
    batch_size: int = 256,
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
    measurement = Measurement(VariableInterchanges(model, network, entries), examples, seed, batch_size)
    tally = measurement.tally()
    refuse_ineffective(tally, entries, has_rows=data is not None)
    settings = {"pairs": pairs, "seed": seed, "sources": "sampled" if data is None else "rows of the data"}
    found = accuracy_of(tally, entries, examples.sharing, settings)
    return replace(found, controls=measurement.controls(names), overlap=overlap)


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
        unchanged, sums = model.answers(high[0]), []
        wanted = {
            variables: model.answers(model.interchange(high[0], {variables: other}))
            for variables in dict.fromkeys(entry.teacher for entry in self.entries)
        }
        before = None if unchanged.is_floating_point() else _surprise(on_base, unchanged)
        found: dict[Any, Tensor] = {}  # what the student answers after an interchange does not depend on the variables
        for entry in self.entries:
            key = entry.student, tuple(map(id, entry.positions))
            if key not in found:
                found[key] = self._answers(swapped(model, self.student, entry, here, there), high[0])
            after = found[key]
            compared = _compare(wanted[entry.teacher], unchanged, (after, on_base, on_source), before)
            sums.append(sum_predictions(compared, torch.ones(len(after), dtype=torch.float64, device=after.device)))
        return stacked(sums)

    def _answers(self, ran: Run, values: Values) -> Tensor:
        """Return the logits of the student's answers to these values."""
        answers = self.teacher.decode(ran.logits, values)
        check_answers(answers, "interchange accuracy")
        return answers


def _compare(wanted: Tensor, unchanged: Tensor, logits: Sequence[Tensor], before: Tensor | None) -> Batch:
    """Compare the answers of causal model and student, and return what each pair adds, by the names of a tally.

    Args:
        wanted, unchanged: the causal model's answers after the interchange, and to the base.
        logits: those of the student after the interchange, on the base and on the source.
        before: how little the student expects the causal model's answer to the base [nats].
    """
    after, _, source = logits
    if wanted.is_floating_point() or before is None:
        return {"error": (as_answers(after, wanted) - wanted.to(after)).abs().reshape(len(after), -1).mean(1)}
    same = torch.isclose(after, source, rtol=1e-4, atol=1e-5).all(1)
    answers = (each.argmax(-1) for each in logits)
    divergences = {"divergence": _surprise(after, wanted), "divergence_on_base": before}
    return compare_classes(wanted, unchanged, *answers) | divergences | {"as_source": same}


def _surprise(logits: Tensor, classes: Tensor) -> Tensor:
    """Return −log p of classes under the softmax of logits [nats], `[batch]`."""
    return -logits.double().log_softmax(-1).gather(-1, classes[:, None])[:, 0]
