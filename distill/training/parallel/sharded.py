"""Networks whose weights are divided over the processes while they are trained, and whole again afterwards (FSDP2).

A sharded network has other weights, another class and hooks of torch. What it was before is noted, without its memory,
and at the end each weight is gathered into the parameter that the caller knows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from distill.errors import DistillError
from distill.models.inputs import network_of
from distill.teachers.without_adapters import WithoutAdapters
from interventions import architecture

TEACHER_FROM = 2**31
"""The bytes of weights from which a teacher is sharded too, if the student is."""
AGREED = "agreed"
"""The attribute of an error that all processes raise together."""


class Whole:
    """A network before it is sharded, and the way back to it.

    Args:
        network: the network, whose weights are whole.
    """

    def __init__(self, network: nn.Module) -> None:
        self._modules = [(module, type(module), _registries(module)) for module in network.modules()]
        self._names = {id(module): set(vars(module)) for module in network.modules()}
        self._added: dict[int, set[str]] = {}

    def let_go(self) -> None:
        """Free the whole weights; the network is sharded now."""
        for module, _, before in self._modules:
            self._added[id(module)] = set(vars(module)) - self._names[id(module)]
            for name, parameter in before["_parameters"].items():
                if parameter is not None and module._parameters.get(name) is not parameter:
                    parameter.data = parameter.data.new_empty(0)

    @torch.no_grad()
    def gather(self) -> None:
        """Make the network whole, with all its weights in the parameters that it had; all processes take part."""
        for module, _, _ in self._modules:
            if isinstance(module, FSDPModule):
                module.reshard()
        gathered: set[int] = set()
        for module, _, before in self._modules:
            for name, parameter in before["_parameters"].items():
                now = module._parameters.get(name)
                if now is not None and now is not parameter and id(parameter) not in gathered:
                    parameter.data = _whole(now)
                    gathered.add(id(parameter))
        for module, kind, before in self._modules:
            module.__class__ = kind
            for name, kept in before.items():
                registry = vars(module)[name]
                registry.clear()
                registry.update(kept)
            for name in self._added.get(id(module), ()):
                vars(module).pop(name, None)
            _module_state_mapping.pop(module, None)


@contextmanager
def whole_afterwards(network: nn.Module) -> Iterator[Whole]:
    """Yield what a network is before the block shards it, and make it whole after the block.

    After an error that other processes may not have, it stays sharded, as they would not take part.
    """
    found = Whole(network)
    try:
        yield found
    except GeneratorExit:
        found.gather()
        raise
    except BaseException as error:
        if getattr(error, AGREED, False):
            found.gather()
        raise
    else:
        found.gather()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Gather all weights of a sharded model in the block, in all processes; each may then call it as often as it likes.

    Calls without gradients alone. A model that is whole stays as it is.
    """
    parts = [each for each in model.modules() if isinstance(each, FSDPModule)]
    if not parts:
        yield
        return
    parts[0]._get_fsdp_state()._lazy_init()  # before the first step its blocks would take themselves for whole models
    groups = [group for part in parts for group in part._get_fsdp_state()._fsdp_param_groups]
    before = [(group.post_forward_mesh_info, len(group._post_forward_indices)) for group in groups]
    calls = len(groups[0].comm_ctx.post_forward_order) if groups else 0
    for part in parts:
        part.unshard()
    for group in groups:
        group.post_forward_mesh_info = None  # divided again after the block, not after each call
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
        for group, (mesh, own_calls) in zip(groups, before, strict=True):
            group.post_forward_mesh_info = mesh
            # The order of the calls is that in which a backward gathers; processes called it differently often.
            del group._post_forward_indices[own_calls:]
            del group.comm_ctx.post_forward_order[calls:]


@contextmanager
def shard_teacher(teacher: Any, accelerator: Accelerator) -> Iterator[None]:
    """Divide the weights of a large teacher over the processes in the block, one of its own blocks after the other."""
    if not isinstance(teacher, nn.Module) or not _can_be_sharded(teacher):
        yield
        return
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    with whole_afterwards(teacher) as whole:
        for each in (*architecture(teacher).blocks, teacher):
            fully_shard(each, mesh=mesh)
        whole.let_go()
        yield


def refuse_unfit_for_shards(accelerator: Accelerator, computation: Any) -> None:
    """Raise DistillError for FSDP1, weights of several types or without axes, and objectives that run as rows say.

    Args:
        accelerator: knows the engine and its precision.
        computation: all runs of a step; the weights that it trains are those of the student and of the objectives.
    """
    if not accelerator.is_fsdp2:
        raise DistillError(
            "FSDP of version 1 flattens the weights, so that no place in the model could be read; use version 2: "
            "FullyShardedDataParallelPlugin(fsdp_version=2), or fsdp_version: 2 in the configuration of accelerate."
        )
    if any(isinstance(network_of(each), WithoutAdapters) for each in computation.still):
        raise DistillError(
            "FSDP divides the weights of the student, which are its teacher's too, as it is the teacher with adapters; "
            "load the teacher once more, fit(from_pretrained(name), student, …), or leave FSDP out, as DDP trains it."
        )
    number = next((n for n, each in computation.named_parameters() if each.requires_grad and not each.ndim), None)
    if number is not None:
        raise DistillError(
            f"FSDP divides weights along their first axis, and {number} is a single number without one; make it a "
            "vector, nn.Parameter(torch.ones(1)), or leave FSDP out, as DDP trains it."
        )
    types = {each.dtype: name for name, each in computation.named_parameters() if each.requires_grad}
    if len(types) > 1 and accelerator.mixed_precision == "no":
        found = " and ".join(f"{dtype} ({name})" for dtype, name in types.items())
        raise DistillError(
            f"FSDP shards weights of one type, and the student and what its objectives train hold {found}; train in "
            "mixed precision, which keeps all of them in float32: Accelerator(mixed_precision='bf16', fsdp_plugin=…), "
            "or convert the student: student.float()."
        )
    odd = next((each for each in computation.objectives.modules() if getattr(each, "runs_by_rows", False)), None)
    if odd is not None:
        raise DistillError(
            f"{type(odd).__name__}() runs the student as often as its rows say, and with sharded weights each process "
            "would wait for the others in another run; leave FSDP out, as DDP trains it."
        )


def _can_be_sharded(teacher: nn.Module) -> bool:
    """Return whether a teacher is large, and its weights are plain numbers that lie on one device."""
    weights = list(teacher.parameters())
    plain = all(each.is_floating_point() and not isinstance(each, DTensor) and not each.is_meta for each in weights)
    moved = any(hasattr(each, "_hf_hook") for each in teacher.modules()) or len({each.device for each in weights}) > 1
    return plain and not moved and sum(each.nbytes for each in weights) >= TEACHER_FROM


def _registries(module: nn.Module) -> dict[str, Any]:
    """Return copies of the parameters and of all hooks of a module, by the names of its attributes."""
    return {
        name: value.copy()
        for name, value in vars(module).items()
        if isinstance(value, dict) and (name == "_parameters" or name.endswith(("_hooks", "_hooks_with_kwargs")))
    }


def _whole(parameter: Tensor) -> Tensor:
    """Return all values of a parameter; all processes take part."""
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()
