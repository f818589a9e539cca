"""The state of a training as tensors by name, divided among the processes that write and read it.

`torch.distributed.checkpoint` writes what each process holds, and another number of processes reads it back. The files
are of safetensors, which hold numbers alone: those that torch writes otherwise describe their contents in a pickle.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from distill.errors import DistillError

WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")
MODEL, OPTIMIZER, GROUP, SCALER, STEP = "model.", "optimizer.", "group.", "scaler.", "step"


def save_state(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Write the state of the model and the optimizer that an accelerator wrapped; each process writes its part."""
    model, optimizer = _wrapped(accelerator)
    state = {**_weights(model), **_scale(accelerator), STEP: torch.tensor(step)}
    for name, parameter in _parameters(model).items():
        held = optimizer.state.get(parameter, {})
        state |= {f"{OPTIMIZER}{name}.{key}": each for key, each in _tensors(held, optimizer).items()}
    for number, group in enumerate(optimizer.param_groups):
        counted = {key: each for key, each in group.items() if _is_counted(key, each, optimizer)}
        state |= {f"{GROUP}{number}.{key}": each for key, each in _tensors(counted, optimizer).items()}
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    planner = DefaultSavePlanner(
        flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True
    )
    with _as_one_call():
        save({name: each.detach().contiguous() for name, each in state.items()}, storage_writer=writer, planner=planner,
             no_dist=accelerator.num_processes == 1)  # fmt: skip


def load_state(accelerator: Accelerator, folder: Path) -> None:
    """Read the state that `save_state` wrote, by any number of processes, into the model and its optimizer.

    Raises:
        DistillError: it is that of another model.
    """
    model, optimizer = _wrapped(accelerator)
    reader = HuggingFaceStorageReader(str(folder))
    kept: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
    state = _weights(model)
    _refuse_others({name: tuple(each.shape) for name, each in state.items()}, kept, folder)
    moments = {}
    for name, parameter in _parameters(model).items():
        start = f"{OPTIMIZER}{name}."
        keys = [each.removeprefix(start) for each in kept if each.startswith(start) and "." not in each[len(start) :]]
        moments[parameter] = {key: _place_for(kept[start + key], parameter) for key in keys}
        state |= {start + key: each for key, each in moments[parameter].items()}
    scale = {name: each for name, each in _scale(accelerator).items() if name in kept}
    groups = {name: torch.zeros((), dtype=torch.float64) for name in kept if name.startswith(GROUP)}
    with torch.no_grad(), _as_one_call():
        load({**state, **scale, **groups}, storage_reader=reader, planner=DefaultLoadPlanner(flatten_state_dict=False),
             no_dist=accelerator.num_processes == 1)  # fmt: skip
    _put(optimizer, moments, groups)
    if accelerator.scaler is not None and scale:
        before = accelerator.scaler.state_dict()
        found = {name.removeprefix(SCALER): each.item() for name, each in scale.items()}
        accelerator.scaler.load_state_dict({name: type(before[name])(each) for name, each in found.items()})


def copied_weights(accelerator: Accelerator) -> dict[str, Tensor]:
    """Return a copy of the weights and buffers of the model that an accelerator wrapped, on the host if it is whole."""
    return {
        name: each.clone() if isinstance(each, DTensor) else each.to("cpu", copy=True)
        for name, each in _weights(_wrapped(accelerator)[0]).items()
    }


@torch.no_grad()
def put_weights(accelerator: Accelerator, copied: Mapping[str, Tensor]) -> None:
    """Write weights that `copied_weights` returned back into the model."""
    for name, each in _weights(_wrapped(accelerator)[0]).items():
        each.copy_(copied[name])


def is_sharded(accelerator: Accelerator) -> bool:
    """Return whether the weights of the model that an accelerator wrapped are divided among processes."""
    return isinstance(_wrapped(accelerator)[0], FSDPModule)


@contextmanager
def unsharded(accelerator: Accelerator) -> Iterator[None]:
    """Gather the weights in the block that lie in no block of a sharded model, so that parts of it can be called."""
    model, _ = _wrapped(accelerator)
    if not isinstance(model, FSDPModule):
        yield
        return
    model._get_fsdp_state()._lazy_init()  # before the first step its blocks would take themselves for whole models
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def _wrapped(accelerator: Accelerator) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return the model and the optimizer of torch inside of what accelerate made of them."""
    model, optimizer = accelerator._models[-1], accelerator._optimizers[-1]
    return model.module if isinstance(model, DistributedDataParallel) else model, optimizer.optimizer


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights and buffers of a model by name, each once: what is tied has one name."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, each in model.state_dict(keep_vars=True).items():
        if isinstance(each, Tensor):
            found.setdefault(id(each), (MODEL + _plain(name), each))
    return {name: each.detach() for name, each in found.values()}


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a model by name, each once."""
    return {_plain(name): each for name, each in model.named_parameters()}


def _plain(name: str) -> str:
    """Return the name of a weight without those of modules that wrap others."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _scale(accelerator: Accelerator) -> dict[str, Tensor]:
    """Return the state of the scale of gradients in float16; an empty one without scaled gradients."""
    if accelerator.scaler is None:
        return {}
    state = accelerator.scaler.state_dict()
    return {SCALER + name: torch.tensor(float(each), dtype=torch.float64) for name, each in state.items()}


def _place_for(kept: Any, parameter: Tensor) -> Tensor:
    """Return a tensor for a value that an optimizer keeps of a parameter: sharded as it is, or a number beside it."""
    if tuple(kept.size) == tuple(parameter.shape) and parameter.ndim:
        return torch.empty_like(parameter, dtype=kept.properties.dtype, requires_grad=False)
    return torch.empty(tuple(kept.size), dtype=kept.properties.dtype)


def _put(
    optimizer: torch.optim.Optimizer,
    moments: Mapping[nn.Parameter, Mapping[str, Tensor]],
    groups: Mapping[str, Tensor],
) -> None:
    """Give an optimizer its values of each parameter and the numbers of its groups; torch moves them where needed."""
    state = optimizer.state_dict()
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state["state"] = {number: _values(moments[each]) for number, each in enumerate(order) if moments.get(each)}
    for name, value in groups.items():
        number, key = name.removeprefix(GROUP).split(".", 1)
        state["param_groups"][int(number)].update(_values({key: value}))
    optimizer.load_state_dict(state)


def _tensors(held: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return what an optimizer keeps as tensors; the name of a number says its type. None is left out.

    Raises:
        DistillError: it keeps something else, which a run that is resumed would lack.
    """
    found = {}
    for key, each in held.items():
        if isinstance(each, Tensor):
            found[key] = each
        elif isinstance(each, bool | int | float):
            found[f"{key}#{type(each).__name__}"] = torch.tensor(float(each), dtype=torch.float64)
        elif each is not None:
            raise DistillError(
                f"{type(optimizer).__name__} keeps {key!r} as {type(each).__name__}, which no checkpoint holds, so "
                "that the run could not be resumed; train without output_dir, or use another optimizer."
            )
    return found


def _is_counted(key: str, value: Any, optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a number of a group is none of its settings, but one that the optimizer itself changes."""
    settings = ("lr", "weight_decay", "scale", "initial_lr")
    return isinstance(value, bool | int | float) and key not in settings and value != optimizer.defaults.get(key, value)


def _values(held: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what `_tensors` made tensors of."""
    kinds = {"bool": bool, "int": int, "float": float}
    found: dict[str, Any] = {}
    for name, each in held.items():
        key, _, kind = name.partition("#")
        found[key] = kinds[kind](each.item()) if kind else each
    return found


def _refuse_others(needed: Mapping[str, tuple[int, ...]], kept: Mapping[str, Any], folder: Path) -> None:
    """Raise DistillError if a checkpoint lacks a weight, or holds it in another size."""
    for name, shape in needed.items():
        found = tuple(kept[name].size) if name in kept else None
        if found != shape:
            has = "does not hold it" if found is None else f"holds {list(found)}"
            raise DistillError(
                f"the checkpoint {folder.parent} does not fit this model or version ({name.removeprefix(MODEL)} is "
                f"{list(shape)} here, and it {has}); delete {folder.parent.parent} and start anew."
            )


@contextmanager
def _as_one_call() -> Iterator[None]:
    """Raise the error of the first process that has one, as it was; one process alone is no reason for a warning."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as all_failures:
        error, _ = next(iter(all_failures.failures.values()))
        raise error from None
