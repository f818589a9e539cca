"""What a run was made of, as short texts: two that differ tell what has changed between two starts of a run."""

import inspect
import platform
import re
import types
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import partial
from hashlib import blake2b
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from distill import objectives as ours
from distill.causal.feed import Feed
from distill.causal.model import CausalModel
from distill.data.rows import Rows
from distill.models.inputs import network_of
from distill.objectives import Objective
from distill.teachers.served import Served

PACKAGES = ("torch", "transformers", "accelerate", "causal-distillation")
NAMES = "public names"
"""Which are used in what a run is known by: the second ones, since DIITO has sources=, Location operation=."""
CHUNK = 4096
SAMPLED = 64
"""Numbers of each parameter and buffer by which a network is known."""


def fingerprints(
    *,
    data: Rows | Feed,
    networks: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    objectives: Sequence[Objective] = (),
    weights: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """What a run is known by: {what: text}.

    Of the data its columns as they are read (in order, labels too), of a network its class and a sample of its numbers,
    of a tokenizer its words, of objectives and functions their settings and their source; and the versions.
    """
    return {
        NAMES: "2",
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
    """Return two runs' fingerprints without those that say nothing about a change.

    Where a run was started before public names changed, the source of our own objectives has changed with the names;
    what they are is told by their settings.
    """
    if NAMES in known:
        return dict(known), dict(now)
    mine = {name for name in known if name.startswith("objective ") and hasattr(ours, name[name.find("(") + 1 : -1])}
    before, after = ({name: text for name, text in each.items() if name not in mine | {NAMES}} for each in (known, now))
    return before, after


def by_new_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run with its objectives as they are printed now, whenever it was started."""
    told = {name: settings[name] for name in ("objective", "own") if isinstance(settings.get(name), list)}
    texts = {name: [re.sub(r"(Location\([^()]*\b)source=", r"\1operation=", str(each)) for each in all_of]
             for name, all_of in told.items()}  # fmt: skip
    return {**settings, **texts}


def of_data(data: Rows | Feed) -> dict[str, str]:
    """Of rows each column, and how many there are; of what a causal model samples the model."""
    if isinstance(data, Rows):
        named = {f"data column {name!r}": of_value(column) for name, column in data.table.items()}
        return {"number of rows": str(len(data)), **named}
    values = getattr(data, "values", None)
    named = {} if values is None else {f"data column {name!r}": of_value(each) for name, each in values.items()}
    return {"causal model": of_causal(data.model), **named}


def of_network(model: Any) -> str:
    """The class of a network and a sample of all its numbers; of one that is elsewhere who it is."""
    if isinstance(model, Served):
        return _short(model.facts())
    network = network_of(model)
    state = {name: (tuple(value.shape), _some(value)) for name, value in network.state_dict().items()}
    return _short((f"{type(network).__module__}.{type(network).__qualname__}", state))


def of_causal(model: CausalModel) -> str:
    """The variables of a causal model, their domains and the source of their mechanisms."""
    return _short(model)


def of_tokenizer(tokenizer: Any) -> str:
    """The class of a tokenizer and its words, or what a processor is printed as."""
    words = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else repr(tokenizer)
    return _short((type(tokenizer).__qualname__, words))


def of_objective(objective: Objective) -> str:
    """The settings of an objective and the source of its class."""
    return _short(objective)


def of_value(value: Any) -> str:
    """The content of numbers, tensors, functions and plain data."""
    return _short(value)


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Of Python and of packages, by default those that decide what a step computes; a checkout may not be installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _short(value: Any) -> str:
    found = blake2b(digest_size=10)
    for part in _parts(value, set()):
        found.update(part)
    return found.hexdigest()


def _some(value: Tensor) -> Tensor:
    flat = value.detach().flatten()
    return flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED]


def _parts(value: Any, above: set[int]) -> Iterator[bytes | memoryview]:
    """The content of a value, byte by byte; what holds itself is told once."""
    yield f"<{type(value).__qualname__}>".encode()
    if id(value) in above:
        return
    inner = above | {id(value)}
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | range | slice | torch.dtype):
        yield repr(value).encode()
    elif isinstance(value, Tensor):
        yield from _of_tensor(value)
    elif isinstance(value, Objective):
        yield from _of_code(type(value), inner)
        yield repr(value).encode()
        for name, setting in sorted(_settings(value).items()):
            yield name.encode()
            yield from _parts(setting, inner)
    elif isinstance(value, nn.Module):
        yield from _of_code(type(value), inner)
        yield repr(value).encode()
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
    elif isinstance(value, partial):
        yield from _parts((value.func, value.args, value.keywords), inner)
    elif isinstance(value, types.FunctionType | types.MethodType | type):
        yield from _of_code(value, inner)
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


def _is_row(value: Any, first: Tensor) -> bool:
    return isinstance(value, Tensor) and value.ndim == 1 and (value.dtype, value.device) == (first.dtype, first.device)


def _of_tensor(value: Tensor) -> Iterator[bytes | memoryview]:
    yield f"{value.dtype}{list(value.shape)}".encode()
    if value.numel() and not value.is_meta:
        plain = value.detach().cpu().contiguous()
        numbers: Any = plain.reshape(-1).view(torch.uint8).numpy()
        yield memoryview(numbers)


def _settings(objective: Objective) -> dict[str, Any]:
    """What an objective was made with and its text may not say: functions, operators, inner objectives.

    Of a class of one's own plain public attributes too; ours are printed whole, and some are set in training.
    """
    ours = type(objective).__module__.startswith("distill.")
    public = {name: each for name, each in vars(objective).items() if not name.startswith("_") and _is_setting(each)}
    plain = {name: each for name, each in public.items() if not ours or not _is_plain(each)}
    return plain | {name: each for name, each in objective.named_children() if isinstance(each, Objective)}


def _is_setting(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_setting, value))
    return _is_plain(value) or ((is_dataclass(value) or callable(value)) and not isinstance(value, nn.Module))


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _of_code(code: Any, above: set[int]) -> Iterator[bytes | memoryview]:
    """The source of a class or function, where there is any, and what a function closes over."""
    function = getattr(code, "__func__", code)
    function = inspect.unwrap(function)
    yield getattr(function, "__qualname__", repr(type(function))).encode()
    try:
        yield inspect.getsource(function).encode()
    except (OSError, TypeError):
        methods = vars(function).values() if isinstance(function, type) else (function,)
        for compiled in (getattr(each, "__code__", None) for each in methods):
            if compiled is not None:
                yield from _of_compiled(compiled)
    if isinstance(function, types.FunctionType):
        yield from _parts(function.__defaults__, above)
        yield from _parts(function.__kwdefaults__, above)
        for cell in function.__closure__ or ():
            try:
                yield from _parts(cell.cell_contents, above)
            except ValueError:  # not filled yet
                yield b"<empty>"


def _of_compiled(code: types.CodeType) -> Iterator[bytes | memoryview]:
    yield code.co_code
    yield repr(code.co_names).encode()
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _of_compiled(constant)
        else:
            yield repr(constant).encode()
