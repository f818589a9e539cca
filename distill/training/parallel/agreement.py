"""What the processes of one training share: what they were given, and in a step its terms and whether to stop after it.

What one of them decided alone, others would not know: they would wait for it in their next step, for ever. And of what
differs between them the result would be a mixture: halves of two students, or rows in two orders.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from distill.errors import DistillError
from distill.processes import gather_results
from distill.training.fingerprints import of_data, of_value, some_of
from distill.training.interruption import Interrupt
from distill.training.resolve import Training


@dataclass(eq=False)
class Agreement:
    """The terms and wishes of a step that the processes of one training share.

    Args:
        accelerator: knows the processes.
        interrupt: the signals that this process was sent; `look` tells it of those of all.
        overdue: says whether it is time for a checkpoint; that of the first process counts.
        late: says whether it is time for an evaluation, likewise.

    Attributes:
        saves: whether the processes save after the next step.
        evaluates: whether they evaluate after the next step.
    """

    accelerator: Accelerator
    interrupt: Interrupt = field(default_factory=Interrupt)
    overdue: Callable[[], bool] = bool
    late: Callable[[], bool] = bool
    saves: bool = False
    evaluates: bool = False
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
        first = self.accelerator.is_main_process
        own_wishes = [self.interrupt.is_set(), first and self.overdue(), first and self.late()]
        wishes = torch.tensor(own_wishes, dtype=wide).to(device, non_blocking=True)
        own = torch.cat([torch.stack([term.detach().to(wide) for term in terms.values()]), wishes])
        summed = cast(Tensor, cast(Any, self.accelerator).reduce(own, "sum"))
        self._wishes = summed[len(terms) :]
        means = summed[: len(terms)] / self.accelerator.num_processes
        return {name: mean.to(term.dtype) for (name, term), mean in zip(terms.items(), means, strict=True)}

    def look(self) -> None:
        """Read what the processes agreed on in the last step; on an accelerator this waits for it."""
        if self._wishes is not None:
            stop, save, evaluate = self._wishes.tolist()
            self.interrupt.agreed, self.saves, self.evaluates = stop > 0, save > 0, evaluate > 0


def refuse_different(accelerator: Accelerator, training: Training) -> None:
    """Raise DistillError, in every process, where the processes of a training were given different things.

    Students alone may differ under DDP, which gives all processes that of the first one.
    """
    if accelerator.num_processes == 1:
        return
    first, *others = gather_results(lambda: _given(accelerator, training))
    for rank, other in enumerate(others, 1):
        for name in dict.fromkeys([*first, *other]):
            if other.get(name) != first.get(name):
                raise DistillError(
                    f"all processes of a training need the same, and process {rank} has another {name} than process 0 "
                    f"({other.get(name)} instead of {first.get(name)}); call torch.manual_seed(0) before anything is "
                    "drawn, give all of them the same arguments, and a folder that all of them see."
                )


def _given(accelerator: Accelerator, training: Training) -> dict[str, str]:
    """Return what this process was given, in words and fingerprints by name."""
    computation, schedule, kept = training.computation, training.schedule, training.checkpoints
    values = {each.name: getattr(schedule, each.name) for each in fields(schedule)}
    given = {f"Schedule({name}=)": repr(value) for name, value in values.items() if not callable(value)}
    given |= {name: str(value) for name, value in of_data(training.rows).items()}
    given["Written"] = repr(training.written_as_text)
    if kept is not None:
        given["every"], given["keep"] = repr(kept.every), repr(kept.keep)
        last = kept.last() if kept.resume else None
        given["checkpoint to go on from"] = "none" if last is None else last.name
    teachers = [each for each in computation.still if each not in computation.learning]
    for teacher in teachers:
        if isinstance(teacher, nn.Module):
            given["teacher"] = given.get("teacher", "") + _of_weights(teacher, trained=False)
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if accelerator.distributed_type == DistributedType.FSDP and not getattr(plugin, "cpu_ram_efficient_loading", False):
        given["student"] = _of_weights(computation, trained=True)  # else accelerate gives all that of the first process
    return given


def _of_weights(model: nn.Module, *, trained: bool) -> str:
    """Return the fingerprint of a sample of the weights of a model; those that are no plain tensors are left out."""
    weights = {name: each for name, each in model.named_parameters() if type(each) is nn.Parameter}
    return of_value({name: some_of(each) for name, each in weights.items() if each.requires_grad or not trained})
