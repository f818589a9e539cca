"""Runs that pairs share: a row that is the base or the source of several pairs runs once in each network.

Of P pairs over R rows, 2 P runs of each network would be R different ones. Pairs are put together so that the bases of
a batch are the rows of one run, whatever their sources: a counterfactual then resumes from that run as it is. What is
read of sources is kept for all rows, where a bounded share of the free memory holds it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from distill.data.rows import Rows
from distill.models.inputs import inputs_of, students, teachers, to_device
from distill.teachers.verbs import run_of
from interventions import InterventionError, Location, Run

Runs = tuple[Run, ...]
Columns = dict[str, Tensor]
SHARE = 8
"""What is kept of all rows takes at most one part in this many of the free memory."""
MOST = {"cpu": 512}
"""The most pairs of a forward by default, by the type of the device: a processor gains nothing from more."""
MOST_ELSEWHERE = 4096
AROUND = 24
"""How many times what a run keeps of a row all runs of a pair need for it, with what is inside blocks."""
WORTH = 0.9
"""Sources are kept where so large a share of the runs is left, at most."""
FEW, AGAIN = 64, 8
"""Few bases are several times in the rows of one run, so that many pairs are interchanged together: that run is of few
rows, or of at most one for this many pairs."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Pairs that are interchanged together.

    Attributes:
        places: of the pairs, among all.
        chunk: the number of the chunk whose rows are the bases of these pairs, in order; None where they are not.
    """

    places: Int[Tensor, " _"]
    chunk: int | None


@dataclass(frozen=True, eq=False)
class Plan:
    """The order in which pairs are interchanged.

    Attributes:
        chunks: for each chunk of bases, the place of a pair for each row that has it as base; the places of several
            pairs for each, where the rows are few.
        batches: the pairs, those of one chunk one after the other.
    """

    chunks: tuple[Int[Tensor, " _"], ...]
    batches: tuple[Batch, ...]


def planned(bases: Int[Tensor, " pairs"], size: int) -> Plan:
    """Return the pairs in batches of up to `size`, as many of them as possible with the same bases in the same order.

    Args:
        bases: the number of the base of each pair.
        size: pairs of a batch.

    >>> plan = planned(torch.tensor([3, 5, 3, 5, 7, 3]), 2)
    >>> [(batch.places.tolist(), batch.chunk) for batch in plan.batches]
    [([0, 1], 0), ([2, 3], 0), ([4], 1), ([5], None)]
    >>> [batch.places.tolist() for batch in planned(torch.tensor([3, 5, 3, 5]), 4).batches]
    [[0, 1, 2, 3]]
    """
    _, number, counts = bases.unique(return_inverse=True, return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    by_base = number.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    turn = torch.empty_like(number)
    turn[by_base] = torch.arange(len(bases)) - starts[number[by_base]]  # the how-manieth pair of its base
    chunk = rank[number] // size
    least = torch.stack([counts[rows].min() for rows in order.split(size)])  # rounds with every row of the chunk
    whole = turn < least[chunk]
    sorted_places = ((chunk * (counts.max() + 1) + turn) * len(order) + rank[number]).argsort()
    places = sorted_places[whole[sorted_places]]
    batches, chunks, first = [], [], 0
    for i, rows in enumerate(order.split(size)):
        rounds = int(least[i])
        together = max(1, min(min(size, max(FEW, rounds * len(rows) // AGAIN)) // len(rows), rounds))
        parts = places[first : first + rounds * len(rows)].split(together * len(rows))
        chunks.append(parts[0])
        batches += [Batch(each, i if len(each) == len(parts[0]) else None) for each in parts]
        first += rounds * len(rows)
    others = (~whole).nonzero()[:, 0]
    batches += [Batch(each, None) for each in others.split(size) if len(each)]
    return Plan(tuple(chunks), tuple(batches))


@dataclass(eq=False)
class Kept:
    """The answers of one network to all rows, and its activations where sources are read.

    Attributes:
        model: the network.
        run: one of its runs, of the first rows.
        logits: `[rows, …]`.
        states: location → activation, `[rows, …]`.
    """

    model: nn.Module
    run: Run
    logits: Tensor
    states: dict[Location, Tensor]

    @classmethod
    def begin(cls, run: Run, places: Sequence[Location], rows: int) -> "Kept":
        """Return the store of all rows, with room for as many, from a run of the first ones."""
        states = {at: run.activations[at] for at in places}
        room = {at: state.new_empty(rows, *state.shape[1:]) for at, state in states.items()}
        logits = run.logits.new_empty(rows, *run.logits.shape[1:])
        return cls(run.model, replace(run, activations={}, recording=None), logits, room)

    def put(self, first: int, run: Run) -> None:
        """Keep a run of the rows from `first` on."""
        rows = slice(first, first + len(run.logits))
        self.logits[rows] = run.logits
        for at, state in self.states.items():
            state[rows] = run.activations[at]

    def take(self, rows: Int[Tensor, " batch"], columns: Mapping[str, Tensor]) -> Run:
        """Return the run of some rows, as a source.

        Args:
            rows: their numbers.
            columns: what the network is called with on them.
        """
        rows = rows.to(self.logits.device)
        return replace(
            self.run,
            inputs=inputs_of(self.model, columns),
            output=self.logits[rows],
            activations=_Taken(self.states, rows),
            answers=_itself,
        )


def _itself(output: Any) -> Any:
    return output


@dataclass(eq=False)
class _Taken(Mapping):
    """The activations of some rows, each taken when it is first read."""

    states: Mapping[Location, Tensor]
    rows: Tensor
    found: dict[Location, Tensor] = field(default_factory=dict)

    def __getitem__(self, at: Location) -> Tensor:
        if at not in self.found:
            self.found[at] = self.states[at][self.rows]
        return self.found[at]

    def __iter__(self) -> Iterator[Location]:
        return iter(self.states)

    def __len__(self) -> int:
        return len(self.states)


def are_first(run: Run, places: Sequence[Location]) -> bool:
    """Return whether the first axis of the logits and of these activations is that of the examples, in every model."""
    rows = len(run.logits)
    if rows < 2:
        return False
    try:
        one = run.take([0])
        states = [(run.activations[at], one.activations[at]) for at in places]
        return len(one.logits) == 1 and all(len(all_) == rows and len(first) == 1 for all_, first in states)
    except InterventionError:
        return False


def size_of(runs: Sequence[Run], places: Sequence[Sequence[Location]]) -> int:
    """Return how many bytes a store of these runs takes for a row."""
    tensors = [ran.logits for ran in runs]
    tensors += [ran.activations[at] for ran, each in zip(runs, places, strict=True) for at in each]
    return sum(each.nbytes for each in tensors) // max(1, len(runs[0].logits))


def size_whole(run: Run) -> int:
    """Return how many bytes a run takes for a row with all that it can be resumed from."""
    calls = [] if run.recording is None else run.recording.calls
    kept = [call.state for call in calls if call.state is not None]
    return (sum(each.nbytes for each in kept) + run.logits.nbytes) // max(1, len(run.logits))


def free_memory(device: torch.device) -> int:
    """Return how many bytes of a device's memory are free, 2 GiB where that is unknown."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    try:
        with open("/proc/meminfo") as lines:
            found = dict(line.split(":", 1) for line in lines)
        return int(found["MemAvailable"].split()[0]) * 1024 if device.type == "cpu" else 2**31
    except (OSError, KeyError, ValueError):
        return 2**31


def fitting(models: Sequence[Any], inputs: Sequence[Any], device: torch.device) -> int:
    """Return how many pairs a forward takes by default, a power of 2, by what a run on a few rows keeps.

    Args:
        models: the networks that run here.
        inputs: a few rows for each.
        device: where they run.
    """
    size = sum(size_whole(run_of(model, each)) for model, each in zip(models, inputs, strict=True))
    fits = free_memory(device) // SHARE // max(1, size * AROUND)
    return 2 ** (max(1, min(fits, MOST.get(device.type, MOST_ELSEWHERE))).bit_length() - 1)


def is_even(rows: Rows) -> bool:
    """Return whether all rows have one length, so that they can be batched in any order without padding."""
    return all(isinstance(column, Tensor) for column in rows.table.values())


@dataclass(eq=False)
class SharedRuns:
    """The runs on the bases and the sources of pairs, each made once where memory holds it.

    Attributes:
        examples: the pairs.
        plan: the order in which they are interchanged.
        size: rows of a forward.
        device: where the student runs.
        on_bases: runs both networks on bases, and finds what their interchanges are compared with.
        run: runs both networks on sources.
        places: for each network the locations that are read in sources, whole ones.
    """

    examples: Any
    plan: Plan
    size: int
    device: torch.device
    on_bases: Callable[[Columns], Any]
    run: Callable[[Columns], Runs]
    places: Sequence[Sequence[Location]]
    _made: dict[int, Any] = field(default_factory=dict)
    _kept: tuple[Kept, ...] = ()
    _numbers: Tensor | None = None
    _keeps_bases: bool = False

    def bases(self, batch: Batch) -> Any:
        """Return the runs of both networks on the bases of some pairs; those of the last chunk are kept."""
        if batch.chunk is None:
            return self._on_bases(batch.places)
        if batch.chunk not in self._made:
            if not self._keeps_bases:
                self._made.clear()
            self._made[batch.chunk] = self._on_bases(self.plan.chunks[batch.chunk])
        return self._made[batch.chunk]

    def sources(self, places: Int[Tensor, " pairs"]) -> tuple[Runs, dict[str, Tensor]]:
        """Return the runs of both networks on the sources of some pairs, and their columns."""
        columns = to_device(self.examples.source.batch(places), self.device)
        if not self._kept:
            return self.run(columns), columns
        assert self._numbers is not None
        rows = self._numbers[self.examples.sharing.source[places]]
        sides = (teachers(columns), students(columns))
        return tuple(kept.take(rows, side) for kept, side in zip(self._kept, sides, strict=True)), columns

    def keep(self, *, twice: bool) -> None:
        """Run every row once and keep what sources are read at, if pairs share enough rows and memory holds them.

        Args:
            twice: whether the pairs are interchanged with two sources each.
        """
        sharing, chunks = self.examples.sharing, self.plan.chunks
        base = torch.cat([sharing.base[places] for places in chunks])
        others = sharing.source.unique()
        others = others[~torch.isin(others, base)]
        rows, runs = len(base) + len(others), len(base) + len(sharing) * (1 + twice)
        if rows > WORTH * runs or not is_even(self.examples.base) or not is_even(self.examples.source):
            return
        first = self.bases(Batch(chunks[0], 0))
        if not all(isinstance(ran.model, nn.Module) and type(ran) is Run for ran in first.runs):
            return
        if not all(are_first(ran, each) for ran, each in zip(first.runs, self.places, strict=True)):
            return
        room = free_memory(self.device) // SHARE
        room -= rows * size_of(first.runs, self.places)
        if room < 0:
            return
        self._keeps_bases = len(base) * sum(map(size_whole, first.runs)) <= room
        if not self._keeps_bases and rows + len(base) > WORTH * runs:
            return
        self._fill(base, others, rows)

    def _fill(self, base: Tensor, others: Tensor, rows: int) -> None:
        """Run all rows and keep what sources are read at.

        Args:
            base: the numbers of the bases, in the order of the chunks.
            others: those of the rows that are sources alone.
            rows: how many there are of both.
        """
        sharing, done = self.examples.sharing, 0
        kept: tuple[Kept, ...] = ()
        for runs in self._all_runs(others):
            kept = kept or tuple(Kept.begin(ran, each, rows) for ran, each in zip(runs, self.places, strict=True))
            for store, ran in zip(kept, runs, strict=True):
                store.put(done, ran)
            done += len(runs[0].logits)
        numbers = torch.cat([base, others])
        found = torch.zeros(int(max(sharing.base.max(), sharing.source.max())) + 1, dtype=torch.long)
        found[numbers] = torch.arange(rows)
        self._kept, self._numbers = kept, found

    def _all_runs(self, others: Tensor) -> Iterator[Runs]:
        """Yield the runs of both networks on all bases, then on the rows that are sources alone."""
        for number, places in enumerate(self.plan.chunks):
            yield self.bases(Batch(places, number)).runs
        place = torch.zeros(int(self.examples.sharing.source.max()) + 1, dtype=torch.long)
        place[self.examples.sharing.source] = torch.arange(len(self.examples))
        for places in place[others].split(self.size) if len(others) else ():
            yield self.run(to_device(self.examples.source.batch(places), self.device))

    def _on_bases(self, places: Tensor) -> Any:
        return self.on_bases(to_device(self.examples.base.batch(places), self.device))
