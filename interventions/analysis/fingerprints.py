"""Fingerprints of models, inputs and settings, by which a folder of results recognises what they were computed from.

Each is the SHA-256 of what is read. Of a tensor of a model with more than `WHOLE` numbers it is a sample that meets
every row and every column of each matrix: other weights have another fingerprint, one number of a large matrix that was
changed by hand need not.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from hashlib import sha256
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from interventions.execution.numbers import WHOLE, sample_of
from interventions.execution.run import Run
from interventions.models.modules import model_name
from interventions.models.wrappers import Model, module_of

_VOLATILE = ("_name_or_path", "transformers_version", "_commit_hash")
"""Entries of a configuration that say where a model came from, and not what it computes."""
_ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters")
"""Settings of layers of PEFT: which adapters they apply."""


def fingerprint_of_model(model: Model) -> str:
    """Return the fingerprint of a model: its class, configuration, weights and which adapters it applies."""
    module, digest = module_of(model), sha256()
    config: Any = getattr(module, "config", None)
    known = config.to_dict() if hasattr(config, "to_dict") else {}
    facts = {name: value for name, value in sorted(known.items()) if name not in _VOLATILE}
    _feed(digest.update, [model_name(module), type(module).__qualname__, str(facts)])
    for path, part in module.named_modules():
        applied = [str(vars(part)[name]) for name in _ADAPTERS if name in vars(part)]
        if applied:
            _feed(digest.update, [path, *applied])
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, Tensor):
            _feed(digest.update, name)
            _feed_tensor(digest.update, tensor.detach(), sampled=True)
    return digest.hexdigest()


def fingerprint_of(value: object) -> str:
    """Return the fingerprint of inputs or settings: of plain data, tensors, functions and objects that hold such.

    A function is read as its code, its defaults and what it holds from around it; a `Run` as its inputs.

    >>> fingerprint_of([1, torch.ones(2)]) == fingerprint_of([1, torch.ones(2)])
    True
    >>> fingerprint_of(lambda output: output[:, 0]) == fingerprint_of(lambda output: output[:, 1])
    False
    """
    digest = sha256()
    _feed(digest.update, value)
    return digest.hexdigest()


def _feed(update: Callable[[Any], None], value: Any, inside: tuple[int, ...] = ()) -> None:
    """Read a value, with its kind and its length, so that no two values are read alike."""
    if isinstance(value, Tensor):
        return _feed_tensor(update, value.detach(), sampled=False)
    if isinstance(value, np.ndarray) and value.dtype != object:
        return update(f"array {value.dtype} {value.shape} ".encode() + np.ascontiguousarray(value).tobytes())
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype | slice | range):
        text = repr(value)
        return update(f"{type(value).__name__} {len(text)} {text} ".encode("utf-8", "surrogatepass"))
    if id(value) in inside:
        return update(b"around ")  # an object that holds itself
    parts = list(_parts(value))
    update(f"{type(value).__qualname__} {len(parts)} ".encode())
    for part in parts:
        _feed(update, part, (*inside, id(value)))
    return None


def _parts(value: Any) -> Iterator[Any]:
    """Yield what a value consists of."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from (key, entry)
    elif isinstance(value, Run):
        yield value.inputs
    elif isinstance(value, nn.Module):
        yield from ([] if not hasattr(value, "settings") else [value.settings])
        yield dict(value.state_dict())
    elif isinstance(value, MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if not _is_empty(cell)]
        yield from (value.__code__, value.__defaults__, value.__kwdefaults__, *cells)
    elif isinstance(value, CodeType):
        yield from (value.co_code, value.co_names, value.co_varnames, *value.co_consts)
    elif isinstance(value, partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, set | frozenset):
        yield from sorted(value, key=repr)
    elif isinstance(value, list | tuple):
        yield from value
    elif isinstance(value, type | BuiltinFunctionType):
        yield f"{value.__module__}.{value.__qualname__}"
    elif is_dataclass(value):
        yield from (getattr(value, each.name) for each in fields(value) if not each.name.startswith("_"))
    else:
        yield from (entry for name, entry in sorted(getattr(value, "__dict__", {}).items()) if not name.startswith("_"))


def _is_empty(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def _feed_tensor(update: Callable[[Any], None], tensor: Tensor, *, sampled: bool) -> None:
    """Read a tensor; one without values here, such as one spread over processes, by its form alone."""
    update(f"tensor {tensor.dtype} {list(tensor.shape)} ".encode())
    if tensor.is_meta or tensor.layout != torch.strided or hasattr(tensor, "__tensor_flatten__") or not tensor.numel():
        return
    if sampled:
        tensor = sample_of(tensor, tensor.numel() <= WHOLE)
    update(as_bytes(tensor).numpy().data)


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the values of a tensor as bytes on the CPU, `[numbers · bytes of one]`."""
    return tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8)
