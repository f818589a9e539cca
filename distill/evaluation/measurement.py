"""A measurement of interchange accuracy, the same for every kind of teacher.

Pairs of a base and a source are drawn; every entry of a mapping is interchanged in the teacher and in the student; and
the answers of both are compared. Interchange intervention accuracy is the share of counterfactuals on which they agree,

    IIA = Σ 1[student(base ← source) = teacher(base ← source)] / Σ 1.

Subclasses of `Interchanges` run networks and causal models. The pairs, the sums, the controls and the figures are the
same for all.

Geiger et al. 2021 (arXiv:2106.02997), section 3.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from distill.data.rows import Rows, batches
from distill.data.seen_rows import SeenRows
from distill.errors import DistillError
from distill.evaluation.controls import ANOTHER, random_parts
from distill.evaluation.interchange_result import InterchangeAccuracy
from distill.evaluation.outcome import Outcome, outcome_of, outcomes_of
from distill.evaluation.progress import counting
from distill.interchange.mapping import Entry, names_of
from distill.models.inputs import device_of, evaluating, network_of, to_device
from distill.models.outputs import same_answers
from distill.models.reinitialized import reinitialized
from distill.processes import are_divided, gather_parts, own_part
from distill.statistics.sharing import Sharing
from distill.statistics.tally import Tally, joined
from interventions import Location, run

Batch = dict[str, Tensor]
NOTHING_SEEN = (
    "every write of this mapping replaces all that an output can see, or nothing that it can see, so there is nothing "
    "to measure; map a block below the last one, or dims=range(...) of it, or choose positions=Span(0.3)."
)
"""The error of a measurement in which every counterfactual is left out."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Pairs of a base and a source.

    Attributes:
        base: the base of each pair, a row each.
        source: the source of each pair, a row each.
        sharing: what pairs have in common: bases, sources, clusters of rows.
        numbers: of the pairs, by which their positions are drawn; by default from 0 on.
    """

    base: Rows
    source: Rows
    sharing: Sharing
    numbers: Int[Tensor, " pairs"] = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.numbers is None:
            object.__setattr__(self, "numbers", torch.arange(len(self.sharing)))

    def __len__(self) -> int:
        return len(self.sharing)

    def first(self, count: int, device: torch.device) -> tuple[Batch, Batch]:
        """Return the first bases and sources."""
        few = range(min(count, len(self)))
        return to_device(self.base.batch(few), device), to_device(self.source.batch(few), device)

    def take(self, places: Int[Tensor, " chosen"]) -> "Examples":
        """Return some of the pairs, by their places."""
        bases, sources = self.base.take(places), self.source.take(places)
        return Examples(bases, sources, self.sharing.take(places), self.numbers[places])


def paired(rows: int, pairs: int, generator: torch.Generator) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """Return the numbers of bases and sources: every row in turn, in a random order, each with another row."""
    rounds = -(-pairs // rows)
    base = torch.cat([torch.randperm(rows, generator=generator) for _ in range(rounds)])[:pairs]
    return base, (base + torch.randint(1, rows, (pairs,), generator=generator)) % rows


LEAST_PAIRS, MOST_PAIRS = 100, 2000
"""How many pairs a training is measured on at its end, at least and at most."""


def usual_pairs(trained: int, interchanges: int) -> int:
    """Return on how many pairs the student of a training is measured, so that this takes about a third of it at most.

    A row that is trained on takes the work of about four runs of a row without gradients, and a pair that of four runs
    on base and source and of about three for each interchange. The number is decided by the settings, not by a clock.

    Args:
        trained: the rows of all steps together.
        interchanges: in how many places each pair is interchanged.

    >>> usual_pairs(1000 * 32, 6), usual_pairs(38 * 8, 6), usual_pairs(10**6, 6)
    (1939, 100, 2000)
    """
    return min(MOST_PAIRS, max(LEAST_PAIRS, trained * 4 // (3 * (4 + 3 * interchanges))))


def check_pairs(pairs: Any) -> None:
    """Raise DistillError for a number of pairs that is no whole number above 0."""
    if not isinstance(pairs, int) or pairs < 1:
        raise DistillError(f"pairs={pairs!r} measures nothing; use e.g. pairs=2000.")


def refuse_seen(data: Mapping[str, Any], seen: SeenRows, others: str) -> None:
    """Raise DistillError where rows of data were trained on.

    Args:
        data: the columns.
        seen: the rows that were trained on.
        others: code that leaves these rows out, for the message.
    """
    found = seen.among(data)
    if bool(found.any()):
        raise DistillError(
            f"the data holds rows that were trained on, {int(found.sum())} of the {len(found)} (first: row "
            f"{int(found.nonzero()[0])}); measure on others: {others}."
        )


@dataclass(frozen=True, eq=False)
class Interchanges(ABC):
    """The entries of a mapping, each interchanged in a teacher and in a student.

    Attributes:
        teacher: a network, or a causal model.
        student: the network that is measured.
        entries: those of the mapping.
    """

    teacher: Any
    student: Any
    entries: tuple[Entry, ...]

    @property
    @abstractmethod
    def networks(self) -> tuple[Any, ...]:
        """The networks among teacher and student, which run in eval mode."""

    @abstractmethod
    def inputs(self, batch: Batch) -> Any:
        """Return the inputs that the student is called with."""

    @abstractmethod
    def count(self, base: Batch, source: Batch, teacher_source: Batch | None, pairs: Int[Tensor, " batch"]) -> Tally:
        """Return what these pairs add to the sums of each entry.

        Args:
            base, source: their columns.
            teacher_source: the columns of another source, which the teacher takes; None is the same source.
            pairs: the numbers of the pairs, by which their positions are drawn.
        """

    def tallies(
        self, examples: Examples, size: int, teacher_sources: Int[Tensor, " pairs"] | None = None
    ) -> Iterator[tuple[Int[Tensor, " batch"], Tally]]:
        """Yield the places of some pairs after the other, with what they add to the sums of each entry.

        Args:
            examples: the pairs.
            size: pairs of a forward.
            teacher_sources: for each pair, the number of the pair whose source the teacher takes; its own by default.
        """
        device = device_of(self.student)
        for places in batches(len(examples), size):
            base, source = (to_device(rows.batch(places), device) for rows in (examples.base, examples.source))
            other = None
            if teacher_sources is not None:
                other = to_device(examples.source.batch(teacher_sources[places]), device)
            yield places, self.count(base, source, other, examples.numbers[places])

    @property
    def subspaces(self) -> list[nn.Module]:
        """The subspaces of the locations of both sides."""
        places = (at for entry in self.entries for at in (*entry.teacher, *entry.student) if isinstance(at, Location))
        return [at.subspace for at in places if isinstance(at.subspace, nn.Module)]

    def random_parts(self, base: Batch, seed: int) -> "Interchanges | None":
        """Return the same with random parts of the same size in the student; None where a location is whole."""
        with torch.no_grad(), evaluating(self.student):
            places = [at.whole for entry in self.entries for at in entry.student]
            parts = random_parts(self.entries, run(self.student, self.inputs(base), places), seed)
        return None if parts is None else replace(self, entries=parts)


@dataclass(frozen=True, eq=False)
class Measurement:
    """A measurement: interchanges in pairs of examples.

    Attributes:
        interchanges: the entries of a mapping in a teacher and a student.
        examples: the pairs of a base and a source.
        seed: of the controls.
        batch_size: pairs of a forward; the draws do not depend on it.
    """

    interchanges: Interchanges
    examples: Examples
    seed: int
    batch_size: int

    def tally(self, teacher_sources: Int[Tensor, " pairs"] | None = None) -> Tally:
        """Return the sums of every pair and entry; the subspaces of the locations are in eval mode.

        Processes that divide measurements (`dividing`) each measure some of the pairs, but for other teacher sources.

        Args:
            teacher_sources: for each pair, the number of the pair whose source the teacher takes; its own by default.
        """
        if teacher_sources is not None or not are_divided():
            return self._tally(teacher_sources)
        own = own_part(torch.arange(len(self.examples)))
        parts = gather_parts(lambda: replace(self, examples=self.examples.take(own))._tally() if len(own) else None)
        return joined([each for each in parts if each is not None])

    def _tally(self, teacher_sources: Int[Tensor, " pairs"] | None = None) -> Tally:
        """Return the sums of every pair and entry, all of them measured by this process."""
        with measuring(self.interchanges):
            parts = []
            with counting("pairs", len(self.examples)) as count:
                for part in self.interchanges.tallies(self.examples, self.batch_size, teacher_sources):
                    parts.append(part)
                    count(len(part[0]))
        order = torch.cat([places for places, _ in parts]).argsort()
        return joined([tally for _, tally in parts]).at(order)

    def controls(self, names: Sequence[str]) -> dict[str, Outcome]:
        """Return the figures of the same measurement where nothing was learned, by the names of controls."""
        tallies = {name: each for name in names if (each := self.control(name)) is not None}
        return {name: outcome_of(each, self.examples.sharing) for name, each in tallies.items()}

    def control(self, name: str) -> Tally | None:
        """Return the sums of the same measurement where nothing was learned; None where the control is impossible."""
        student, sources = self.interchanges.student, None
        changed: Interchanges | None = self.interchanges
        if name == "labels":
            sources = torch.randperm(len(self.examples), generator=torch.Generator().manual_seed(self.seed))
        elif name == "network":
            changed = replace(self.interchanges, student=reinitialized(network_of(student), self.seed + ANOTHER))
        else:
            changed = self.interchanges.random_parts(self.examples.first(2, device_of(student))[0], self.seed)
        if changed is None:
            return None
        with same_answers(network_of(changed.student), student):
            return replace(self, interchanges=changed).tally(sources)


@contextmanager
def measuring(interchanges: Interchanges) -> Iterator[None]:
    """Put the networks and the subspaces into eval mode, without gradients, and back."""
    with ExitStack() as modes, torch.no_grad():
        for module in (*interchanges.networks, *interchanges.subspaces):
            modes.enter_context(evaluating(module))
        yield


def accuracy_of(
    tally: Tally,
    entries: tuple[Entry, ...],
    sharing: Sharing,
    settings: Mapping[str, Any],
    tried: Sequence[int] | None = None,
) -> InterchangeAccuracy:
    """Return the figures of a tally: of all entries together, and of each.

    Args:
        tally: the sums.
        entries: those of the mapping.
        sharing: what the pairs have in common.
        settings: of the measurement.
        tried: how many pairs were tried for each entry, where only effective ones were taken.
    """
    counts: Sequence[int | None] = [None] * len(entries) if tried is None else tried
    names, all_tried = names_of(entries), None if tried is None else sum(tried)
    tallies = [*(tally.of(i) for i in range(len(names))), tally]
    *each, overall = outcomes_of(tallies, sharing, [*counts, all_tried])
    return InterchangeAccuracy(overall, dict(zip(names, each, strict=True)), {**settings, "shared": counted(sharing)})


def counted(sharing: Sharing) -> dict[str, int]:
    """Return of how many different bases, sources and clusters pairs are made."""
    found = {"bases": sharing.base, "sources": sharing.source}
    if sharing.base_clusters is not None:
        found["clusters"] = sharing.base_clusters[sharing.base_clusters >= 0]
    return {name: int(each.unique().numel()) for name, each in found.items()}
