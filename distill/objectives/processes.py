"""What the processes of one training hold, together."""

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from jaxtyping import Shaped
from torch import Tensor, distributed


def process_state() -> PartialState:
    """Which of the processes of a run this is, as an `Accelerator` made now would find it."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def processes() -> int:
    """How many processes train together; 1 where nobody started more."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def gathered(rows: Shaped[Tensor, "mine ..."]) -> Shaped[Tensor, "all ..."]:
    """The rows of all processes, in their order, the same on each of them; without a graph.

    Each may have another number of rows, or none. All processes must call it equally often.
    """
    rows = rows.detach().contiguous()
    if processes() == 1:
        return rows
    mine = torch.tensor([len(rows)], device=rows.device)
    counts = [int(count) for count in torch.cat(_from_all(mine))]
    padded = torch.cat([rows, rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])])
    return torch.cat([part[:count] for part, count in zip(_from_all(padded), counts, strict=True)])


def _from_all(value: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(value) for _ in range(processes())]
    distributed.all_gather(parts, value)
    return parts
