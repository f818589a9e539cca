"""Attributes of a user's modules and classes that are replaced while scopes are open, and put back afterwards."""

import threading
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, ref

from torch import nn

from interventions.endings import one_at_a_time
from interventions.models.modules import changes_of

lock = threading.RLock()
"""Held while hooks and replacements are put on a model or taken off it."""
_missing = object()
_before: dict[int, int] = {}
"""The number of a change that was made here → that of the last change before it which was not."""
_MOST = 2**14
"""As many changes are kept: each module has one at most, and a model that is gone needs none."""
Holder = nn.Module | type
Makes = Mapping[str, Callable[[Any], object]]
"""The name of each attribute to replace, and what makes its replacement for a holder."""


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
replaced: Container[tuple[int, str]] = _replacements.keys()
"""The id of the holder and the name of each attribute that is replaced now."""


@one_at_a_time(lock)
def replace_attributes(holders: Iterable[Holder], makes: Makes, user: object) -> None:
    """Replace attributes of modules or classes by `make(holder)`, until `restore_attributes`."""
    reference = ref(user)
    for holder in holders:
        for name, make in makes.items():
            key = id(holder), name
            entry = _replacements.get(key)
            if entry is None:
                entry = Replacement(holder, vars(holder).get(name, _missing), make(holder))
            entry.users[id(user)] = reference
            _replacements[key] = entry
            if not entry.is_placed:
                _put(holder, name, entry.replacement)
                entry.is_placed = True


@one_at_a_time(lock)
def restore_attributes(holders: Iterable[Holder], names: Iterable[str], user: object | None = None) -> None:
    """Put the originals back, the last ones first, unless other users need the replacements."""
    for holder in holders:
        for name in reversed([*names]):
            key = id(holder), name
            entry = _replacements.get(key)
            if entry is None:
                continue
            entry.users.pop(id(user), None)
            if not entry.users or all(each() is None for each in entry.users.values()):
                entry.is_placed = False
                _put(holder, name, entry.original)
                _replacements.pop(key, None)


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


def changes_before(changes: list[int]) -> list[int]:
    """Return the number of the last change of each dict that was not made here, from that of its last change."""
    return list(map(_before.get, changes, changes))


def _put(holder: Holder, name: str, value: object) -> None:
    """Set an attribute in `vars(holder)`, or remove it from there where the value is `_missing`."""
    if isinstance(holder, type):  # vars of a class cannot be written
        if value is not _missing:
            setattr(holder, name, value)
        elif name in vars(holder):
            delattr(holder, name)
        return
    attributes = vars(holder)
    before = None if changes_of is None else changes_of(attributes)
    if value is _missing:
        attributes.pop(name, None)
    else:
        attributes[name] = value
    if changes_of is not None and before is not None:
        if len(_before) >= _MOST:
            _before.clear()
        _before[changes_of(attributes)] = _before.pop(before, before)
