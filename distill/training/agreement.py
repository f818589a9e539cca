"""What the processes of one training agree on in a step, by one reduction: its terms, and whether to stop after it.

What one of them decided alone, others would not know: they would wait for it in their next step, for ever.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from distill.training.interruption import Interrupt


@dataclass(eq=False)
class Agreement:
    """The terms and wishes of a step that the processes of one training share.

    Args:
        accelerator: knows the processes.
        interrupt: the signals that this process was sent; `look` tells it of those of all.
        overdue: says whether it is time for a checkpoint; that of the first process counts.

    Attributes:
        saves: whether the processes save after the next step.
    """

    accelerator: Accelerator
    interrupt: Interrupt = field(default_factory=Interrupt)
    overdue: Callable[[], bool] = bool
    saves: bool = False
    _wishes: Tensor | None = None

    def __post_init__(self) -> None:
        if self.accelerator.num_processes > 1:
            self.interrupt.agreed = False

    def mean(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the means of the terms of a step over the processes, all of which call this once in each step."""
        if self.accelerator.num_processes == 1:
            return dict(terms)
        device = self.accelerator.device
        wide = torch.float32 if device.type == "mps" else torch.float64
        own_wishes = [self.interrupt.is_set(), self.accelerator.is_main_process and self.overdue()]
        wishes = torch.tensor(own_wishes, dtype=wide).to(device, non_blocking=True)
        own = torch.cat([torch.stack([term.detach().to(wide) for term in terms.values()]), wishes])
        summed = cast(Tensor, cast(Any, self.accelerator).reduce(own, "sum"))
        self._wishes = summed[len(terms) :]
        means = summed[: len(terms)] / self.accelerator.num_processes
        return {name: mean.to(term.dtype) for (name, term), mean in zip(terms.items(), means, strict=True)}

    def look(self) -> None:
        """Read what the processes agreed on in the last step; on an accelerator this waits for it."""
        if self._wishes is not None:
            stop, save = self._wishes.tolist()
            self.interrupt.agreed, self.saves = stop > 0, save > 0
