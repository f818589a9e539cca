"""Fingerprints of models, inputs and settings, by which a folder of results recognises what they were computed from.

Each is the SHA-256 of what is read. Of a tensor of a model with more than `WHOLE` numbers it is a sample that meets
every row and every column of each matrix: other weights have another fingerprint, one number of a large matrix that was
changed by hand need not.
"""

import re
import sys
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
from interventions.execution.writes import Write
from interventions.hooks.scopes import open_scopes
from interventions.models.modules import model_name
from interventions.models.wrappers import Model, module_of

_VOLATILE = ("_name_or_path", "transformers_version", "_commit_hash")
"""Entries of a configuration that say where a model came from, and not what it computes."""
_ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters")
"""Settings of layers of PEFT: which adapters they apply."""
_INSTALLED = ("interventions", "distill", "torch", "numpy", "transformers", *sys.stdlib_module_names)
"""Packages whose functions change with their version alone."""


def fingerprint_of_model(model: Model) -> str:
    """Return the fingerprint of a model.

    It covers its modules with their settings, its configuration and weights, which adapters it applies, and what the
    blocks of interventions that are open here write into it.
    """
    module, digest = module_of(model), sha256()
    config: Any = getattr(module, "config", None)
    known = config.to_dict() if hasattr(config, "to_dict") else {}
    facts = {name: value for name, value in sorted(known.items()) if name not in _VOLATILE}
    _feed(digest.update, [model_name(module), type(module).__qualname__, str(facts)])
    for path, part in module.named_modules():
        applied = [str(vars(part)[name]) for name in _ADAPTERS if name in vars(part)]
        settings = re.sub(r"\bat 0x[0-9a-fA-F]+", "", part.extra_repr())  # without addresses
        _feed(digest.update, [path, type(part).__qualname__, settings, *applied])
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, Tensor):
            _feed(digest.update, name)
            _feed_tensor(digest.update, tensor.detach(), sampled=True)
    for scope in open_scopes(module):
        for write in (tap.function for tap in scope.taps if isinstance(tap.function, Write)):
            source = None if write.source is None else write.source.states
            _feed(digest.update, [str(write.location), write.location.subspace, write.op, source])
            _feed(digest.update, [write.positions, write.source_positions, write.steps])
    return digest.hexdigest()


def fingerprint_of(value: object) -> str:
    """Return the fingerprint of inputs or settings: of plain data, tensors, functions and objects that hold such.

    A function is read as its code, its defaults, what it holds from around it, and the plain data and functions that it
    reads from its module; a `Run` as its inputs.

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
        yield from _globals_of(value)
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
        entries = sorted(getattr(value, "__dict__", {}).items())
        yield from (entry for name, entry in entries if not name.startswith("_") or _is_plain(entry))


def _globals_of(function: FunctionType) -> Iterator[Any]:
    """Yield what a user's function reads from its module: plain data, and other functions of that user."""
    if _is_installed(function):
        return
    for name in sorted(_names_in(function.__code__) & function.__globals__.keys()):
        entry = function.__globals__[name]
        if _is_plain(entry) or (isinstance(entry, FunctionType) and not _is_installed(entry)):
            yield from (name, entry)


def _names_in(code: CodeType) -> set[str]:
    """Return the names that code reads, in functions inside of it too."""
    inner = (_names_in(each) for each in code.co_consts if isinstance(each, CodeType))
    return set(code.co_names).union(*inner)


def _is_installed(function: FunctionType) -> bool:
    """Return whether a function is one of a package, which is known by its code alone."""
    return function.__module__ is not None and function.__module__.partition(".")[0] in _INSTALLED


def _is_plain(value: Any) -> bool:
    """Return whether a value is plain data or a tensor, or consists of such."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | complex | str | bytes | range | Tensor | np.ndarray)


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
