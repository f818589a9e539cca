"""Attributes of a user's modules and classes that are replaced while scopes are open, and put back afterwards."""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, ref

from torch import nn

from interventions.endings import one_at_a_time

lock = threading.RLock()
"""Held while hooks and replacements are put on a model or taken off it."""
_missing = object()
Holder = nn.Module | type


@dataclass(eq=False, slots=True)
class Replacement:
    """An attribute that is replaced while scopes need it.

    The first user puts the replacement in place and the last one takes it away, in whatever order they end. The
    original is restored as it stood in `vars(holder)`, because accelerate and others keep their own `forward` there.
    """

    holder: Holder
    original: object
    replacement: object
    users: dict[int, ReferenceType[Any]] = field(default_factory=dict)
    is_placed: bool = False


_replacements: dict[tuple[int, str], Replacement] = {}
"""The replacements in place, by the id of the holder and the name of the attribute."""


@one_at_a_time(lock)
def replace_attribute(holders: Iterable[Holder], name: str, user: object, make: Callable[[Any, Any], object]) -> None:
    """Replace an attribute of modules or classes by `make(holder, original)`, until `restore_attribute`."""
    reference = ref(user)
    for holder in holders:
        key = id(holder), name
        entry = _replacements.get(key)
        if entry is None:
            entry = Replacement(holder, vars(holder).get(name, _missing), make(holder, getattr(holder, name, None)))
        entry.users[id(user)] = reference
        _replacements[key] = entry
        if not entry.is_placed:
            _put(holder, name, entry.replacement)
            entry.is_placed = True


@one_at_a_time(lock)
def restore_attribute(holders: Iterable[Holder], name: str, user: object | None = None) -> None:
    """Put the originals back, unless other users need the replacements."""
    for holder in holders:
        key = id(holder), name
        entry = _replacements.get(key)
        if entry is None:
            continue
        entry.users.pop(id(user), None)
        if not entry.users or all(each() is None for each in entry.users.values()):
            entry.is_placed = False
            _put(holder, name, entry.original)
            _replacements.pop(key, None)


def holders_of(name: str) -> set[int]:
    """Return the ids of the modules and classes of which this attribute has a replacement now."""
    return {holder for holder, replaced in list(_replacements) if replaced == name}


def users_of(holder: Holder, name: str) -> Iterable[Any]:
    """Return those who need the replacement of an attribute."""
    found = (each() for each in list(_replacements[id(holder), name].users.values()))
    return [user for user in found if user is not None]


def own_forward(module: nn.Module) -> object:
    """Return the `forward` that others set on the module itself, past its class; None if there is none.

    One set by this package or by nnsight does not count.
    """
    replaced = _replacements.get((id(module), "forward"))
    own = vars(module).get("forward", _missing) if replaced is None else replaced.original
    return None if own is _missing or type(own).__module__.split(".")[0] == "nnsight" else own


def _put(holder: Holder, name: str, value: object) -> None:
    """Set an attribute in `vars(holder)`, or remove it from there where the value is `_missing`."""
    if isinstance(holder, type):  # vars of a class cannot be written
        if value is not _missing:
            setattr(holder, name, value)
        elif name in vars(holder):
            delattr(holder, name)
    elif value is _missing:
        vars(holder).pop(name, None)
    else:
        vars(holder)[name] = value
