"""The engines that train a student in several processes: which are refused, and what torch's DDP has to know."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import Tensor, nn

from distill.errors import DistillError
from distill.models.inputs import network_of
from distill.processes import started
from interventions import architecture

_OTHERS = {DistributedType.DEEPSPEED: "DeepSpeed", DistributedType.MEGATRON_LM: "Megatron-LM"}
_WITH_DDP = {each for each in DistributedType if each.name.startswith("MULTI_")}


def refuse_unfit(accelerator: Accelerator, computation: Any) -> None:
    """Raise DistillError, in every process, where a training would not compute what one process computes.

    Args:
        accelerator: names the engine.
        computation: all runs of a step, by which its models are known.

    Raises:
        DistillError: inside inference mode; an accelerator that does not know of all processes, or accumulates
            gradients itself; an engine with steps of its own; or a model that is split over processes, each of which
            reads rows of its own.
    """
    if torch.is_inference_mode_enabled():
        raise DistillError(
            "training needs gradients and was called inside torch.inference_mode(), where none are kept; call it "
            "outside of that block: result = distill.fit(…)."
        )
    if accelerator.num_processes != started():
        raise DistillError(
            f"the accelerator knows of {accelerator.num_processes} of {started()} processes, so each would train "
            "alone and write into one folder; start them by torchrun, and on CPUs pass "
            "accelerator=Accelerator(cpu=True), or none."
        )
    if accelerator.gradient_accumulation_steps > 1:
        raise DistillError(
            f"Accelerator(gradient_accumulation_steps={accelerator.gradient_accumulation_steps}) is not used here: "
            "batch_size is what one step sees; leave it out, and say in how many parts a step is computed: "
            f"schedule=Schedule(accumulate={accelerator.gradient_accumulation_steps})."
        )
    if accelerator.distributed_type in _OTHERS:
        raise DistillError(
            f"{_OTHERS[accelerator.distributed_type]} is not used here: its engine makes and clips the steps itself, "
            "past Schedule(accumulate=, clip=), and keeps the weights to itself; shard by FSDP2 instead: "
            "Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))."
        )
    for model in (*computation.still, *computation.learning):
        network = network_of(model)
        over = architecture(network).split_over
        if over > 1:
            role = "model that is trained" if model in computation.learning else "teacher"
            raise DistillError(
                f"the {role} ({type(network).__name__}) is tensor-parallel over {over} processes, and each process of "
                "a training reads rows of its own, of which the parts would be added up; load it whole, "
                "from_pretrained(name) without tp_plan, and shard it where it is too large: "
                "torch.distributed.fsdp.fully_shard(block) for each of its blocks."
            )


def with_ddp(accelerator: Accelerator) -> bool:
    """Return whether torch's DDP averages the gradients of several processes."""
    return accelerator.num_processes > 1 and accelerator.distributed_type in _WITH_DDP


def leaves_some(trained: nn.Module, loss: Tensor) -> bool:
    """Return whether some of the trained parameters get no gradient from a loss; no gradient is left behind."""
    parameters = [each for each in trained.parameters() if each.requires_grad]
    for each in parameters:
        each.grad = None
    if loss.requires_grad:
        with torch.backends.cudnn.flags(enabled=False):  # which computes no gradients of LSTMs in eval mode
            loss.backward()
    found = any(each.grad is None for each in parameters)
    for each in parameters:
        each.grad = None
    return found


@contextmanager
def unused_found(accelerator: Accelerator, *, some: bool) -> Iterator[None]:
    """Let DDP, where it wraps a model in the block, look in each step for parameters that get no gradient.

    Objectives that compare features alone leave out the layers after these, and DDP would wait for their gradients.

    Args:
        accelerator: wraps the model.
        some: whether there are such parameters; without any, the look would cost time for nothing.
    """
    before = accelerator.ddp_handler
    if some and not (before is not None and before.static_graph):
        accelerator.ddp_handler = replace(before or DistributedDataParallelKwargs(), find_unused_parameters=True)
    try:
        yield
    finally:
        accelerator.ddp_handler = before
