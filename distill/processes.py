"""The processes of one training, and what they gather from each other."""

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from jaxtyping import Shaped
from torch import Tensor, distributed


def process_state() -> PartialState:
    """Return the state of this process among those of the run, as an `Accelerator` that is made now would have it."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def processes() -> int:
    """Return how many processes train together; 1 without `torch.distributed`."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def gather(rows: Shaped[Tensor, "own ..."]) -> Shaped[Tensor, "all ..."]:
    """Return the rows of all processes, in the order of the processes, on each of them; without a graph.

    The processes may have different numbers of rows, or none. All of them must call it equally often.
    """
    rows = rows.detach().contiguous()
    if processes() == 1:
        return rows
    own_count = torch.tensor([len(rows)], device=rows.device)
    counts = [int(count) for count in torch.cat(_gather_equal(own_count))]
    padded = torch.cat([rows, rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])])
    return torch.cat([part[:count] for part, count in zip(_gather_equal(padded), counts, strict=True)])


def _gather_equal(value: Tensor) -> list[Tensor]:
    """Return a tensor of each process, all of one shape."""
    parts = [torch.empty_like(value) for _ in range(processes())]
    distributed.all_gather(parts, value)
    return parts
