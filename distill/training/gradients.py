"""The gradients of one step, computed by a computation that accelerate has wrapped, and the checks of its loss."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

from distill.errors import DistillError
from distill.objectives import Moment
from distill.teachers.passing import passing
from distill.training.checkpoints import Checkpoints
from distill.training.computation import alter_batch, parts_of
from distill.training.optimization.updates import backward
from distill.training.parallel.agreement import Agreement
from distill.training.parallel.sharded import gathered
from distill.training.pending import not_finite, steps_between_looks
from distill.training.resolve import Training
from distill.training.schedule import drawing, shared_generator
from interventions import InterventionError, on_host

ONE_ROW = "more than 1 value per channel"
"""A part of the error of torch where batch norm is given one row."""


@dataclass(frozen=True, eq=False)
class Wrapped:
    """A training whose computation accelerate has wrapped.

    Attributes:
        training: the training.
        wrapped: its computation, wrapped.
        loss: the loss as a function of the terms.
        agreement: what the processes agree on, by the accelerator that wrapped it.
    """

    training: Training
    wrapped: Any
    loss: Callable[..., Tensor]
    agreement: Agreement

    def backward(
        self, batch: Mapping[str, Tensor], moment: Moment, number: int, *, empty: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the gradients of one step, part by part, and return its loss and terms, means over all processes."""
        accelerator, computation = self.agreement.accelerator, self.training.computation
        schedule, alone = self.training.schedule, accelerator.num_processes == 1
        together: dict[str, Tensor] = {}
        drawn = drawing(schedule.seed, number, accelerator.device, accelerator.process_index)
        if not alone:
            moment = replace(moment, agreed=shared_generator(schedule.seed, number, accelerator.device))
        writing = self.training.writing
        fresh = writing is not None and writing.is_fresh(number, moment.progress)
        with torch.enable_grad(), drawn as generator:  # also inside torch.no_grad() of the caller
            batch = alter_batch(computation.objectives, self._written(batch, moment, number, empty), generator)
            cut = parts_of(
                batch, moment, computation.objectives, computation.learning[0], accelerator,
                parts=schedule.accumulate, empty=empty, place=computation.label_place,
            )  # fmt: skip
            parts = list(cut)
            for place, (part, when) in enumerate(parts, 1):
                with (
                    passing(samples=fresh),
                    nullcontext() if place == len(parts) else accelerator.no_sync(self.wrapped),
                ):
                    terms = self.terms(part, generator, when, number)
                    loss = self.loss(terms, progress=moment.progress)
                    if alone and steps_between_looks(accelerator.device) == 1:
                        _check_finite(loss, terms, number + 1, self.training.checkpoints)
                    _check_attached(loss, terms)
                    backward(accelerator, loss / len(parts) if len(parts) > 1 else loss)
                for name, term in terms.items():
                    own = term.detach() / len(parts) if len(parts) > 1 else term.detach()
                    together[name] = together[name] + own if name in together else own
        if alone and len(parts) == 1:
            return loss, together
        together = self.agreement.mean(together)
        loss = self.loss(together, progress=moment.progress)
        if not alone and steps_between_looks(accelerator.device) == 1:  # one that is not finite ends all processes
            _check_finite(loss, together, number + 1, self.training.checkpoints)
        return loss, together

    def _written(self, batch: Mapping[str, Tensor], moment: Moment, number: int, empty: bool) -> Mapping[str, Tensor]:
        """Return the batch of a step, with completions that a model writes where it is its turn."""
        writing, accelerator = self.training.writing, self.agreement.accelerator
        if writing is None:
            return batch
        assert moment.rows is not None
        with accelerator.autocast():
            return writing.write(
                batch, on_host(moment.rows), number, moment.progress, counts=not empty, gathering=self._gathered
            )

    def _gathered(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a block in which a model can be called in one process alone; all processes enter it."""
        return gathered(self.wrapped if model in self.training.computation.learning else model)

    def terms(
        self, batch: Mapping[str, Tensor], generator: torch.Generator, moment: Moment, number: int
    ) -> dict[str, Tensor]:
        """Return the terms of a part.

        Raises:
            DistillError: activations that are not finite, reported as a loss that is not; or batch norm with one row.
        """
        try:
            return self.wrapped(batch, generator, moment)
        except InterventionError as error:
            for logits in self._logits(batch):
                if not logits.isfinite().all():
                    _check_finite(logits.sum() * float("nan"), {}, number + 1, self.training.checkpoints)
            raise DistillError(" ".join(str(error).split())) from error
        except ValueError as error:
            if ONE_ROW not in str(error):
                raise
            rows = len(next(iter(batch.values())))
            raise DistillError(
                f"step {number + 1} has {rows} row, and batch norm needs two ({error}); choose a batch_size= that "
                "leaves no step with one."
            ) from error

    def _logits(self, batch: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the logits of the networks on a batch; an empty list if they have none, or if they are sharded."""
        if self.agreement.accelerator.distributed_type == DistributedType.FSDP:
            return []  # a run needs all processes, and this one alone has an error
        try:
            return list(self.training.computation.answers(batch))
        except InterventionError:
            return []


def _check_attached(loss: Tensor, terms: Mapping[str, Tensor]) -> None:
    """Raise DistillError for a loss without a graph, from which nothing would be learned."""
    if not loss.requires_grad:
        raise DistillError(
            f"the loss ({', '.join(terms)}) depends on nothing that is trained, as somewhere its graph is cut; leave "
            "out detach(), torch.no_grad() and what turns tensors into numbers, in the student and in its objectives."
        )


def _check_finite(loss: Tensor, terms: Mapping[str, Tensor], step: int, checkpoints: Checkpoints | None) -> None:
    """Raise DistillError if the loss is not finite, and discard the checkpoint that gave it."""
    if not isfinite(value := loss.item()):
        raise not_finite(step, value, {name: term.item() for name, term in terms.items()}, checkpoints)
