"""Which counterfactuals of a sweep share a forward pass: as many as fit in memory, if that saves more than it costs.

A pass resumes from the earliest block that one of its counterfactuals writes, so those that write later run blocks that
they would not need. A pass that resumes from call f of n of the blocks, for k counterfactuals, costs about

    pass + (n − f) · (call + k · c)

with c the operations of one block for the examples of one counterfactual. `pass` and `call` stand for what takes its
time whatever the batch, in operations that the device makes meanwhile. Two batches become one where that costs less.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interventions.errors import InterventionError
from interventions.execution.cells import Cell
from interventions.execution.examples import examples_in
from interventions.execution.run import Run
from interventions.execution.stacking import shapes_of
from interventions.hooks.states import hidden
from interventions.locations import Location
from interventions.models.wrappers import module_of
from interventions.operators import Add, Interpolate, Mean, Operator, Swap, Zero

CALL_ON_CPU, CALL_ELSEWHERE = 1e7, 1e10  # operations in the time that a call of a block takes for one number, about
CALLS_OF_A_PASS = 8  # how many such calls the rest of a pass takes as long as, about
BYTES_ON_CPU = 2**26  # of a pass, about: a larger one leaves the caches and takes longer for each of its rows
BYTES_ELSEWHERE = 2**33
LARGEST_KEPT = 2**25 - 2**16  # bytes of a tensor that glibc takes from its own heap at most, less what it adds itself
SHARE_OF_MEMORY = 4  # a pass takes at most one part in so many of the free memory of an accelerator
STATES_INSIDE = 16  # what a block keeps while it runs, in copies of its hidden state, about
TOKENS_OF_A_STATE = 16  # for each so many tokens, its attention scores are one more copy of it, about
_DRAW_NOTHING = (Swap, Zero, Mean, Add, Interpolate)


@dataclass(frozen=True, eq=False)
class Counterfactual:
    """One counterfactual of a sweep.

    Attributes:
        row: the number of its row in the grid.
        locations: the locations that it writes.
        cell: its column, and the tokens that it writes and takes.
    """

    row: int
    locations: tuple[Location, ...]
    cell: Cell


@dataclass(frozen=True, eq=False)
class Batches:
    """The rule by which counterfactuals share passes.

    Attributes:
        most: the most counterfactuals in one pass.
        first: from the locations of a row to the number of block calls that it does not run again.
        joins: whether the counterfactuals of a row may share a pass with those of other rows.
        shares: whether those of one row may share a pass.
        any_order: whether the rows may run in any order, as no operator draws.
        cost: of a pass, from the number of block calls that it skips and that of its counterfactuals.
    """

    most: int
    first: Callable[[tuple[Location, ...]], int]
    joins: Callable[[tuple[Location, ...]], bool]
    shares: Callable[[tuple[Location, ...]], bool]
    any_order: bool
    cost: Callable[[int, int], float]

    def of(self, rows: Sequence[tuple[Location, ...]], cells: Sequence[Sequence[Cell]]) -> list[list[Counterfactual]]:
        """Return the counterfactuals of each pass.

        A row takes as few passes as possible, of equal size. Those of several rows become one where that costs less.
        """
        order = sorted(range(len(rows)), key=lambda row: self.first(rows[row])) if self.any_order else range(len(rows))
        chunks = [chunk for row in order for chunk in self._chunks(row, rows[row], cells[row])]
        return self._cheapest(self._alike(chunks))

    def _chunks(self, row: int, locations: tuple[Location, ...], cells: Sequence[Cell]) -> list[list[Counterfactual]]:
        """Return the counterfactuals of one row in as few passes as possible."""
        mine = [Counterfactual(row, locations, cell) for cell in cells]
        count = math.ceil(len(mine) / (self.most if self.shares(locations) else 1))
        size = math.ceil(len(mine) / max(1, count))
        return [mine[number * size : (number + 1) * size] for number in range(count)]

    def _alike(self, chunks: list[list[Counterfactual]]) -> list[list[Counterfactual]]:
        """Return batches of neighbours that resume from the same block, as far as they fit in one pass."""
        found: list[list[Counterfactual]] = []
        for chunk in chunks:
            begins = self.first(chunk[0].locations)
            alike = found and self.first(found[-1][0].locations) == begins
            if alike and self._may_share(found[-1], chunk, len(found[-1]) + len(chunk)):
                found[-1] = found[-1] + chunk
            else:
                found.append(chunk)
        return found

    def _cheapest(self, batches: list[list[Counterfactual]]) -> list[list[Counterfactual]]:
        """Return the batches, neighbours joined so that all of them together cost the least."""
        best: list[tuple[float, int]] = [(0.0, 0)]  # of the first batches: the cost, and where their last pass begins
        for stop in range(1, len(batches) + 1):
            options, size, begins = [], 0, math.inf
            for start in range(stop - 1, -1, -1):
                size += len(batches[start])
                if start < stop - 1 and not self._may_share(batches[start], batches[start + 1], size):
                    break
                begins = min(begins, self.first(batches[start][0].locations))
                options.append((best[start][0] + self.cost(int(begins), size), start))
            best.append(min(options))
        found, stop = [], len(batches)
        while stop:
            start = best[stop][1]
            found.append([each for batch in batches[start:stop] for each in batch])
            stop = start
        return found[::-1]

    def _may_share(self, batch: list[Counterfactual], after: list[Counterfactual], size: int) -> bool:
        """Return whether two neighbouring batches may be in one pass of so many counterfactuals."""
        earlier, later = batch[-1].locations, after[0].locations
        if size > self.most or not (self.shares(earlier) and self.shares(later)):
            return False
        if earlier != later and not (self.joins(earlier) and self.joins(later)):
            return False
        # An operator may draw, and places run in another order than rows, unless they are one place.
        return self.any_order or _places(earlier) == _places(later)


def _places(locations: tuple[Location, ...]) -> set[Location]:
    return {location.whole for location in locations}


def draw_nothing(ops: Mapping[Location, Operator]) -> bool:
    """Return whether it is known of all operators that they draw no random numbers."""
    return all(type(op) in _DRAW_NOTHING for op in ops.values())


def cost_of(base: Run) -> Callable[[int, int], float]:
    """Return the cost of a pass as a function of the block calls that it skips and of its counterfactuals."""
    model, calls = module_of(base.model), [] if base.recording is None else base.recording.calls
    blocks = {call.block for call in calls} or {model}
    numbers = sum(parameter.numel() for block in blocks for parameter in block.parameters())
    state = hidden(calls[0].raw) if calls else None
    vectors = examples_in(base.inputs) if state is None else state.numel() // max(1, state.shape[-1])
    count, each = max(1, len(calls)), 2 * vectors * numbers / len(blocks)
    call = CALL_ON_CPU if _device(base) in ("cpu", "meta") else CALL_ELSEWHERE

    def cost(skipped: int, counterfactuals: int) -> float:
        return CALLS_OF_A_PASS * call + (count - skipped) * (call + counterfactuals * each)

    return cost


def cells_a_pass(base: Run, batch_size: int | None, kept: float = 1.0) -> int:
    """Return how many counterfactuals may share a pass.

    Without a `batch_size` these are as many as fit into a bounded share of the memory: of each, what the model returns
    and all of its blocks return, and what one block keeps while it runs.

    Args:
        base: the base run.
        batch_size: the largest number of rows.
        kept: the share of the output that is computed.

    Raises:
        InterventionError: `batch_size` is smaller than the number of examples.
    """
    examples = examples_in(base.inputs)
    if batch_size is not None and batch_size < examples:
        raise InterventionError(
            f"batch_size={batch_size} rows do not hold one counterfactual of {examples} examples; write "
            f"batch_size={examples} or more, or sweep fewer examples at a time."
        )
    given, returned = shapes_of(base.inputs), shapes_of(base.output)
    if {shape[:1] for shape in given if shape} != {(examples,)} or {shape[:1] for shape in returned} != {(examples,)}:
        return 1  # something cannot be repeated, or is one number for all of the pass
    if batch_size is not None:
        return batch_size // examples
    return max(1, int(_memory(base) // max(1.0, bytes_of_a_counterfactual(base, kept))))


def bytes_of_a_counterfactual(base: Run, kept: float = 1.0) -> float:
    """Return about how many bytes one counterfactual keeps in memory while it runs.

    Args:
        base: the base run.
        kept: the share of the output that is computed.
    """
    calls = [] if base.recording is None else base.recording.calls
    sizes = [_bytes(call.raw) for call in calls]
    widest = max((call for call in calls), key=lambda call: _bytes(hidden(call.raw)), default=None)
    state = None if widest is None else hidden(widest.raw)
    inside = 0.0
    if state is not None:
        tokens = state.shape[1] if state.ndim == 3 else 1
        inside = _bytes(state) * (STATES_INSIDE + tokens / TOKENS_OF_A_STATE)
    return kept * _bytes(base.output) + sum(sizes) + inside


def keep_freed_memory(base: Run) -> None:
    """Let the C library keep the memory that a pass frees for the next one, up to 64 MiB on a CPU.

    glibc gives what is free back to the system beyond twice the largest tensor that was freed so far, and to map it
    again, page by page, takes as long as a good part of a pass. So one tensor of the largest size is made and freed; as
    nothing is written into it, it takes no memory. Other libraries take no notice.
    """
    if _device(base) == "cpu":
        torch.empty(LARGEST_KEPT, dtype=torch.uint8)


def _bytes(value: Any) -> int:
    """Return how many bytes the tensors in a value take."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return sum(map(_bytes, entries))


def _device(base: Run) -> str:
    """Return the kind of device on which a run was made."""
    return _first_tensor(base.output).device.type


def _memory(base: Run) -> int:
    """Return how many bytes a pass may take, the same for about as much free memory."""
    device = _first_tensor(base.output).device
    if device.type == "cpu":
        return BYTES_ON_CPU
    if device.type != "cuda":
        return BYTES_ELSEWHERE // SHARE_OF_MEMORY
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(BYTES_ELSEWHERE, 1 << int(math.log2(max(1, free // SHARE_OF_MEMORY))))


def _first_tensor(value: Any) -> Tensor:
    """Return the first tensor in an output, or an empty one."""
    if isinstance(value, Tensor):
        return value
    entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return next((each for each in map(_first_tensor, entries) if each.ndim), torch.empty(0))
