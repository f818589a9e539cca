"""The updates of the weights in a step: gradients, clipping, the step of the optimizer.

`accelerate` prepares each of these calls for several processes, mixed precision and other optimizers, and looks every
time whether it has to, which takes as long as the step of a small model. Without any of that they are those of torch.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from distill.errors import DistillError


def is_plain(accelerator: Accelerator) -> bool:
    """Return whether one process trains, without scaled gradients, so that torch needs no help."""
    return accelerator.distributed_type == DistributedType.NO and accelerator.scaler is None


@contextmanager
def preparing(accelerator: Accelerator) -> Iterator[None]:
    """Let an accelerator prepare models and optimizers in the block; after it, it knows those that it knew before.

    `accelerator.free_memory()` would forget those of the caller too, and collects garbage, which takes as long as many
    steps of a small model.
    """
    known: dict[str, list[Any]] = {name: list(getattr(accelerator, name)) for name in ("_models", "_optimizers")}
    try:
        yield
    finally:
        for name, before in known.items():
            getattr(accelerator, name)[:] = before


def backward(accelerator: Accelerator, loss: Tensor) -> None:
    """Add the gradients of a loss to those of the parameters."""
    if is_plain(accelerator):
        loss.backward()
    else:
        accelerator.backward(loss)


def clip(accelerator: Accelerator, parameters: Iterable[nn.Parameter], norm: float | None) -> None:
    """Scale gradients down to a norm if they have a larger one; None leaves them as they are."""
    if norm is None:
        return
    if is_plain(accelerator):
        clip_grad_norm_(parameters, norm, foreach=True if accelerator.device.type == "cpu" else None)
    else:
        accelerator.clip_grad_norm_(parameters, norm)


def make_step(accelerator: Accelerator, optimizer: Any) -> None:
    """Let the optimizer make a step, and let go of the gradients.

    Raises:
        DistillError: the learning rate or weight decay overflows the dtype of the weights.
    """
    used = optimizer.optimizer if is_plain(accelerator) else optimizer
    try:
        used.step()
    except (RuntimeError, OverflowError) as error:
        if "overflow" not in str(error).lower():
            raise
        group = max(optimizer.param_groups, key=lambda each: each["lr"])
        raise DistillError(
            f"lr={group['lr']:g} with weight_decay={group.get('weight_decay', 0):g} is more than weights can be "
            f"changed by ({error}); lower them, e.g. lr=5e-5, weight_decay=0.01."
        ) from error
    used.zero_grad()
