"""Fingerprints of data, models and settings, by which a resumed run sees that something differs from its start."""

import inspect
import platform
import re
import sys
import types
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import partial
from hashlib import blake2b
from importlib import metadata
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from distill import objectives as own_objectives
from distill.causal.feed import Feed
from distill.causal.model import CausalModel
from distill.data.draws import seeded
from distill.data.rows import Rows
from distill.data.sources.lazy_columns import LazyColumn, some_rows
from distill.models.inputs import network_of
from distill.objectives import Objective
from distill.teachers.served import Served
from interventions import Subspace

PACKAGES = ("torch", "transformers", "accelerate", "causal-distillation")
REPORTED = ("causal-distillation", "torch", "transformers", "accelerate", "numpy")
SOURCES = "public names"
"""The key under which fingerprints say which version of our own sources they were made from."""
SOURCES_NOW = "7"
"""2: DIITO has sources=, Location operation=. 3: docstrings and private names were written anew. 4: of functions also
what they are bound to, and the globals that they read. 5: DIITO has rules of positions, and hands out its runs. 6: it
draws among kinds. 7: it takes several pairs a step, and draws on the host."""
CHUNK = 4096
INSTALLED = ("torch", "transformers", "tokenizers", "numpy", "distill", "interventions", *sys.stdlib_module_names)
"""Modules whose objects are known by their class alone, as their attributes may change with use."""
_known: WeakKeyDictionary[CausalModel, str] = WeakKeyDictionary()
"""The fingerprint of each causal model when it was first taken: its functions may keep caches, which fill."""
SAMPLED = 64
"""The number of values of each parameter and buffer that the fingerprint of a network holds."""


def fingerprints(
    *,
    data: Rows | Feed,
    networks: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    objectives: Sequence[Objective] = (),
    weights: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Return the fingerprints of a run, {name: text}.

    They cover the columns of the data in their order, the class and a sample of the weights of each network, the words
    of a tokenizer, settings and source of objectives and functions, and the versions of packages.
    """
    return {
        SOURCES: SOURCES_NOW,
        **of_data(data),
        **{name: of_network(each) for name, each in (networks or {}).items() if each is not None},
        **({} if tokenizer is None else {"tokenizer": of_tokenizer(tokenizer)}),
        **{
            f"objective {number} ({type(each).__name__})": of_objective(each)
            for number, each in enumerate(objectives, 1)
        },
        **{f"weight of {name!r}": of_value(each) for name, each in (weights or {}).items() if callable(each)},
        **{f"version of {name}": version for name, version in versions().items()},
    }


def comparable(known: Mapping[str, str], now: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the fingerprints at the start of a run and now, without those that need not mean a change.

    If our own sources were rewritten since the run was started, fingerprints that contain them are left out: those of
    our objectives, whose settings are compared too, of functions that are weights, and of causal models.
    """
    if known.get(SOURCES) == SOURCES_NOW:
        return dict(known), dict(now)
    kept = [
        {name: text for name, text in each.items() if name != SOURCES and not _holds_own_source(name)}
        for each in (known, now)
    ]
    return kept[0], kept[1]


def _holds_own_source(name: str) -> bool:
    """Return whether the fingerprint of this name contains source text of this package."""
    if name.startswith("objective "):
        return hasattr(own_objectives, name[name.find("(") + 1 : -1])
    return name.startswith("weight of ") or name == "causal model"


def by_new_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run with its objectives as they are printed now, whenever it was started."""
    printed = {name: settings[name] for name in ("objective", "own") if isinstance(settings.get(name), list)}
    texts = {name: [re.sub(r"(Location\([^()]*\b)source=", r"\1operation=", str(each)) for each in all_of]
             for name, all_of in printed.items()}  # fmt: skip
    return {**settings, **texts}


def of_data(data: Rows | Feed) -> dict[str, str]:
    """Return the fingerprints of data: its columns and number of rows, or the causal model that samples it."""
    if isinstance(data, Rows):
        named = {f"data column {name!r}": of_value(column) for name, column in data.table.items()}
        return {"number of rows": str(len(data)), **named}
    values = getattr(data, "values", None)
    named = {} if values is None else {f"data column {name!r}": of_value(each) for name, each in values.items()}
    return {"causal model": of_causal(data.model), **named}


def of_network(model: Any) -> str:
    """Return the fingerprint of a network: its class and a sample of its weights, or the facts of a served one."""
    if isinstance(model, Served):  # whose cache sees more of the weights, which runs of earlier versions did not know
        return _short({name: fact for name, fact in model.facts().items() if name != "modules"})
    network = network_of(model)
    state = {name: (tuple(value.shape), some_of(value)) for name, value in network.state_dict().items()}
    return _short((f"{type(network).__module__}.{type(network).__qualname__}", state))


def of_causal(model: CausalModel) -> str:
    """Return the fingerprint of a causal model: its variables and domains, and the source of all its functions."""
    if model not in _known:
        parts = {name: part for name, part in vars(model).items() if name not in ("_by_row", "_computation")}
        _known[model] = _short(parts)
    return _known[model]


def of_tokenizer(tokenizer: Any) -> str:
    """Return the fingerprint of a tokenizer: its class and its words, or of a processor: its printed text."""
    words = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else repr(tokenizer)
    return _short((type(tokenizer).__qualname__, words))


def of_objective(objective: Objective) -> str:
    """Return the fingerprint of an objective: its settings and the source of its class."""
    return _short(objective)


def of_value(value: Any) -> str:
    """Return the fingerprint of numbers, tensors, functions and plain data."""
    return _short(value)


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of Python and of packages, by default those that decide the result of a step.

    A package that is not installed, as a checkout, has none.
    """
    found = {"python": platform.python_version()}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def environment() -> dict[str, str]:
    """Return the device and the versions of packages, on which figures depend."""
    threads = f"cpu, {torch.get_num_threads()} threads"
    return {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else threads, **versions(REPORTED)}


def _short(value: Any) -> str:
    """Return the hash of a value's content as text."""
    found = blake2b(digest_size=10)
    for part in _parts(value, set()):
        found.update(part)
    return found.hexdigest()


def some_of(value: Tensor) -> Tensor:
    """Return a sample of the values of a tensor, evenly spaced."""
    flat = value.detach().flatten()
    return flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED]


def _parts(value: Any, above: set[int]) -> Iterator[bytes | memoryview]:
    """Yield the content of a value as bytes; a value inside itself is not repeated."""
    yield f"<{type(value).__qualname__}>".encode()
    if id(value) in above:
        return
    inner = above | {id(value)}
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | range | slice | torch.dtype):
        yield repr(value).encode()
    elif isinstance(value, Tensor):
        yield from _of_tensor(value)
    elif isinstance(value, LazyColumn):  # too much to read: its rows are recognized by their lengths and a sample
        with seeded(0):
            yield from _parts((len(value), value.lengths(), some_rows(value)), inner)
    elif isinstance(value, Objective):
        yield from _of_code(type(value), inner)
        yield repr(value).encode()
        for name, setting in sorted(_settings(value).items()):
            yield name.encode()
            yield from _parts(setting, inner)
    elif isinstance(value, nn.Module):
        yield from _of_code(type(value), inner)
        yield repr(value).encode()
        if not isinstance(value, Subspace):  # which is learned, and looks another way after a step
            yield from _parts({name: some_of(each) for name, each in value.state_dict().items()}, inner)
    elif isinstance(value, np.generic):
        yield from _parts(value.item(), inner)
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype}{value.shape}".encode()
        yield repr(value.tolist()).encode() if value.dtype.hasobject else np.ascontiguousarray(value).tobytes()
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _parts(key, inner)
            yield from _parts(value[key], inner)
    elif isinstance(value, list | tuple):
        if value and isinstance(value[0], Tensor) and all(_is_row(each, value[0]) for each in value):
            for start in range(0, len(value), CHUNK):  # a tensor at a time takes ten times as long
                part = value[start : start + CHUNK]
                yield repr([len(row) for row in part]).encode()
                yield from _of_tensor(torch.cat(part))
            return
        for each in value:
            yield from _parts(each, inner)
    elif isinstance(value, Set):
        for text in sorted(_short(each) for each in value):
            yield text.encode()
    else:
        yield from _of_object(value, inner)


def _of_object(value: Any, inner: set[int]) -> Iterator[bytes | memoryview]:
    """Yield the content of a function, a class or an object as bytes."""
    if isinstance(value, partial):
        yield from _parts((value.func, value.args, value.keywords), inner)
    elif isinstance(value, types.FunctionType | types.MethodType | type):
        yield from _of_code(value, inner)
        if isinstance(value, types.MethodType) and not isinstance(value.__self__, type):
            yield from _parts(value.__self__, inner)
    elif isinstance(value, types.BuiltinFunctionType):  # also a method of a tensor
        yield f"{value.__module__}.{value.__qualname__}".encode()
        if not isinstance(value.__self__, types.ModuleType):
            yield from _parts(value.__self__, inner)
    elif hasattr(value, "get_vocab"):
        yield of_tokenizer(value).encode()
    elif is_dataclass(value):
        yield from _of_code(type(value), inner)
        for field in fields(value):
            if not field.name.startswith("_"):
                yield field.name.encode()
                yield from _parts(getattr(value, field.name), inner)
    elif callable(value):
        yield from _of_code(type(value), inner)
        yield from _parts(getattr(value, "__dict__", {}), inner)
    else:
        yield f"{type(value).__module__}.{type(value).__qualname__}".encode()
        if _is_users(value) or isinstance(value, types.SimpleNamespace | Namespace):
            yield from _parts(getattr(value, "__dict__", {}), inner)


def _is_users(value: Any) -> bool:
    """Return whether the module that defines a function or the class of an object is code of the user."""
    module = getattr(value, "__module__", None) or type(value).__module__
    return str(module).split(".")[0] not in INSTALLED


def _is_row(value: Any, first: Tensor) -> bool:
    """Return whether a value is a vector of the kind of the first row, so that rows can be concatenated."""
    return isinstance(value, Tensor) and value.ndim == 1 and (value.dtype, value.device) == (first.dtype, first.device)


def _of_tensor(value: Tensor) -> Iterator[bytes | memoryview]:
    """Yield the dtype, shape and numbers of a tensor as bytes."""
    yield f"{value.dtype}{list(value.shape)}".encode()
    if value.numel() and not value.is_meta:
        plain = value.detach().cpu().contiguous()
        numbers: Any = plain.reshape(-1).view(torch.uint8).numpy()
        yield memoryview(numbers)


def _settings(objective: Objective) -> dict[str, Any]:
    """Return the settings of an objective that its printed text may leave out: functions, operators, inner objectives.

    For classes of users plain public attributes belong to them too; objectives of this package print these, and set
    some in training.
    """
    is_own = type(objective).__module__.startswith("distill.")
    public = {name: each for name, each in vars(objective).items() if not name.startswith("_") and _is_setting(each)}
    plain = {name: each for name, each in public.items() if not is_own or not _is_plain(each)}
    return plain | {name: each for name, each in objective.named_children() if isinstance(each, Objective)}


def _is_setting(value: Any) -> bool:
    """Return whether an attribute is plain data, a dataclass or a function, or a list of these."""
    if isinstance(value, list | tuple):
        return all(map(_is_setting, value))
    return _is_plain(value) or ((is_dataclass(value) or callable(value)) and not isinstance(value, nn.Module))


def _is_plain(value: Any) -> bool:
    """Return whether a value is a number, a text, None, or a list of these."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _of_code(code: Any, above: set[int]) -> Iterator[bytes | memoryview]:
    """Yield the source of a class or function, else its bytecode, and the values that a function closes over."""
    function = getattr(code, "__func__", code)
    function = function if _is_users(function) else inspect.unwrap(function)  # a decorator is code of the user too
    yield getattr(function, "__qualname__", repr(type(function))).encode()
    try:
        yield inspect.getsource(getattr(function, "__code__", function)).encode()
    except (OSError, TypeError):
        methods = vars(function).values() if isinstance(function, type) else (function,)
        for compiled in (getattr(each, "__code__", None) for each in methods):
            if compiled is not None:
                yield from _of_compiled(compiled)
    if isinstance(function, types.FunctionType):
        if function.__name__ == "<lambda>":  # its source is the whole line, which may hold others
            yield from _of_compiled(function.__code__)
        if _is_users(function):
            yield from _parts(_globals_of(function), above)
        yield from _parts(function.__defaults__, above)
        yield from _parts(function.__kwdefaults__, above)
        for cell in function.__closure__ or ():
            try:
                yield from _parts(cell.cell_contents, above)
            except ValueError:  # not filled yet
                yield b"<empty>"


def _globals_of(function: types.FunctionType) -> dict[str, Any]:
    """Return the globals that a function reads: plain data, tensors, arrays, and functions of the same module."""
    names, waiting = set[str](), [function.__code__]
    while waiting:
        code = waiting.pop()
        names.update(code.co_names)
        waiting += [each for each in code.co_consts if isinstance(each, types.CodeType)]
    found = {name: function.__globals__[name] for name in sorted(names & function.__globals__.keys())}
    return {name: value for name, value in found.items() if _is_data(value) or _is_neighbor(value, function)}


def _is_neighbor(value: Any, function: types.FunctionType) -> bool:
    """Return whether a value is a function of the same module."""
    return isinstance(value, types.FunctionType) and value.__module__ == function.__module__


def _is_data(value: Any) -> bool:
    """Return whether a value is plain data, a tensor or an array, or a container of these."""
    if isinstance(value, Mapping):
        return all(_is_data(key) and _is_data(each) for key, each in value.items())
    if isinstance(value, list | tuple | Set):
        return all(map(_is_data, value))
    return _is_plain(value) or isinstance(value, Tensor | np.ndarray | np.generic)


def _of_compiled(code: types.CodeType) -> Iterator[bytes | memoryview]:
    """Yield the bytecode, names and constants of compiled code as bytes."""
    yield code.co_code
    yield repr(code.co_names).encode()
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _of_compiled(constant)
        else:
            yield repr(constant).encode()
