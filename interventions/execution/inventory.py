"""The modules of a model with their settings and tensors, found once and kept until something among them is assigned.

Python numbers the changes of every dict, and torch's compiler reads these numbers. So one comparison of numbers shows
that no attribute, parameter, buffer or part of any module was assigned since, and only modules whose number is another
are read again. Where this torch has no such numbers, all modules are read each time: slower, and the same.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain, compress
from operator import attrgetter, methodcaller
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from interventions.hooks.replacements import own_forward
from interventions.models.modules import modules_of
from interventions.models.wrappers import is_sharded

Settings = tuple[object, ...]
changes_of: Callable[[dict], int] | None = getattr(
    getattr(getattr(torch._C, "_dynamo", None), "guards", None), "dict_version", None
)
"""Returns the number of the last change of a dict, which no other change of any dict has; None where torch lacks it."""
_OF_TORCH = frozenset(vars(nn.Module())) - {"training"}
_REGISTERED = ("_parameters", "_buffers", "_modules")
_PLAIN = frozenset({bool, float, str})
_NUMBERS = _PLAIN | {int}
_KINDS = _PLAIN | {dict, list, tuple}
_dict_of = attrgetter("__dict__")


@dataclass(frozen=True, eq=False)
class Contents:
    """The modules, dicts and lists that a model holds now, as themselves.

    Attributes:
        holders: what holds settings in its `vars`: the modules, each once, and after them the configurations.
        types: the class of each holder.
        classes: these classes, each once.
        registered: the dicts of parameters, buffers and parts of each module.
        lists: the lists that are settings.
        holders_of_lists: the number of the holder of each list.
        inner: the dicts that are settings, and those registered ones in which there is something.
        owners: the number of the holder of each inner dict that is a setting; None for a registered one.
        empty: the registered dicts in which there is nothing.
    """

    holders: list[Any]
    types: list[type]
    classes: list[type]
    registered: list[Any]
    lists: list[list]
    holders_of_lists: list[int]
    inner: list[dict]
    owners: list[int | None]
    empty: list[dict]

    @classmethod
    def of(cls, modules: list[nn.Module], configured: list[int], listing: Iterable[int]) -> "Contents":
        """Return the contents of modules.

        Args:
            modules: all modules of the model, each once.
            configured: the number of a module with each of the configurations.
            listing: the numbers of the holders with dicts or lists that are settings.
        """
        holders = [*modules, *(vars(modules[number])["config"] for number in configured)]
        types = list(map(type, holders))
        within = [(each, number) for number in listing for each in _plain(vars(holders[number]))[1]]
        registered: list[Any] = [getattr(module, name) for module in modules for name in _REGISTERED]
        dicts = [(each, number) for each, number in within if type(each) is dict]
        lists = [(each, number) for each, number in within if type(each) is list]
        filled = list(filter(None, registered))
        return cls(
            holders=holders,
            types=types,
            classes=list(dict.fromkeys(types)),
            registered=registered,
            lists=[each for each, _ in lists],
            holders_of_lists=[number for _, number in lists],
            inner=[*(each for each, _ in dicts), *filled],
            owners=[*(number for _, number in dicts), *[None] * len(filled)],
            empty=[each for each in registered if not each],
        )

    def changes(self) -> list[int]:
        """Return the number of the last change of each holder and of each inner dict."""
        assert changes_of is not None
        return list(map(changes_of, map(_dict_of, self.holders))) + list(map(changes_of, self.inner))


@dataclass(frozen=True, eq=False)
class Inventory:
    """The modules, settings and tensors that were found in a model.

    Attributes:
        key: the same object in all inventories with the same modules and tensors.
        contents: what the model holds, as itself; None where what is kept must not hold parts of the model.
        modules: the modules of the model.
        configured: the number of a module with each of the configurations.
        listing: the numbers of the holders with dicts or lists that are settings.
        settings: the settings of each holder.
        parts: the ids of what must be the same objects in the `vars` of each holder.
        changes: the number of the last change of the `vars` of each holder, and of each inner dict.
        texts: the texts in each list that is a setting.
        kinds: the id of the class of each holder.
        classed: the number of the class of each holder.
        sources: the numbers of the registered dicts with tensors that a run reads, and does not change.
        chosen: which values in the sources are tensors, each tensor once; empty where all are.
        is_kept: whether the changes show all that is assigned.
        is_sharded: whether FSDP shards a part of the model.
    """

    key: object
    contents: Contents | None
    modules: list[ReferenceType[nn.Module]]
    configured: list[int]
    listing: list[int]
    settings: list[Settings]
    parts: list[tuple[int, ...]]
    changes: list[int]
    texts: list[list[str]]
    kinds: list[int]
    classed: list[int]
    sources: list[int]
    chosen: list[bool]
    is_kept: bool
    is_sharded: bool

    @classmethod
    def of(cls, model: nn.Module) -> "Inventory":
        """Return the inventory of a model, found now."""
        modules = modules_of(model)
        configs: dict[int, int] = {}
        for number, module in enumerate(modules):
            if (config := _config_of(module)) is not None:
                configs.setdefault(id(config), number)
        configured = list(configs.values())
        contents = Contents.of(modules, configured, range(len(modules) + len(configured)))
        # These numbers are read before what they stand for: what is changed in between is then read again.
        is_kept = changes_of is not None and all(isinstance(each, dict) for each in contents.registered)
        changes = contents.changes() if is_kept else []
        read = [_settings(holder) for holder in contents.holders]
        filled = [number for number, each in enumerate(contents.registered) if each]
        sources = [number for number in filled if number % 3 == 0]
        # In train mode a run itself changes the buffers of a norm, which reads none of them then.
        sources += [number for number in filled if number % 3 == 1 and not modules[number // 3].training]
        sources, chosen = _first_tensors(sources, contents.registered)
        numbers = {each: number for number, each in enumerate(contents.classes)}
        return cls(
            key=object(),
            contents=contents,
            modules=list(map(ref, modules)),
            configured=configured,
            listing=[number for number, (_, within) in enumerate(read) if within],
            settings=[settings for settings, _ in read],
            parts=[_ids(holder, within) for holder, (_, within) in zip(contents.holders, read, strict=True)],
            changes=changes,
            texts=list(map(_texts, contents.lists)),
            kinds=list(map(id, contents.types)),
            classed=[numbers[each] for each in contents.types],
            sources=sources,
            chosen=chosen,
            is_kept=is_kept,
            is_sharded=is_sharded(model),
        )

    def folded(self) -> "Inventory":
        """Return the same inventory without the contents: it keeps no part of the model alive."""
        return replace(self, contents=None)

    def renewed(self) -> "Inventory | None":
        """Return the inventory as the model is now; None where its modules or tensors are others, or may be."""
        if not self.is_kept or changes_of is None:
            return None
        contents = self.contents
        if contents is None:
            modules = [module for each in self.modules if (module := each()) is not None]
            if len(modules) < len(self.modules) or not all(map(_config_of, map(modules.__getitem__, self.configured))):
                return None
            contents = Contents.of(modules, self.configured, self.listing)
            if list(map(id, contents.types)) != self.kinds:
                return None
        if list(map(type, contents.holders)) != contents.types or any(contents.empty):
            return None
        changes = contents.changes()
        if changes != self.changes or (contents.lists and list(map(_texts, contents.lists)) != self.texts):
            return self._reread(contents, changes)
        return self if contents is self.contents else replace(self, contents=contents)

    def _reread(self, contents: Contents, changes: list[int]) -> "Inventory | None":
        """Return the inventory with the settings of those holders that have changed read again."""
        texts = list(map(_texts, contents.lists))
        if len(changes) != len(self.changes) or len(texts) != len(self.texts):
            return None
        numbers = [*range(len(contents.holders)), *contents.owners]
        pairs = chain(zip(changes, self.changes, strict=True), zip(texts, self.texts, strict=True))
        changed = [now != before for now, before in pairs]
        settings = list(self.settings)
        for number in set(compress(chain(numbers, contents.holders_of_lists), changed)):
            if number is None:
                return None
            holder = contents.holders[number]
            now, within = _settings(holder)
            if _ids(holder, within) != self.parts[number]:
                return None
            if vars(holder).get("_buffers") and ("training", holder.training) not in settings[number]:
                return None  # its buffers are read in one mode only
            settings[number] = now
        return replace(self, contents=contents, settings=settings, changes=changes, texts=texts)

    def tensors(self) -> list[Tensor]:
        """Return the tensors that a run reads and does not change, each once."""
        assert self.contents is not None
        registered = self.contents.registered
        dicts = map(registered.__getitem__, self.sources)
        values = chain.from_iterable(map(dict.values if self.is_kept else methodcaller("values"), dicts))
        return list(compress(values, self.chosen) if self.chosen else values)

    def forwards(self) -> list[int]:
        """Return the id of the `forward` of each class."""
        assert self.contents is not None
        return [id(getattr(each, "forward", None)) for each in self.contents.classes]


def _config_of(module: nn.Module) -> Any:
    """Return the configuration that a module holds; None if there is none, or none with attributes."""
    config = vars(module).get("config")
    return config if hasattr(config, "__dict__") else None


def _first_tensors(sources: list[int], registered: list[Any]) -> tuple[list[int], list[bool]]:
    """Return those sources that hold tensors for the first time, and which of their values these are; [] for all."""
    seen = {id(None)}
    first = {
        number: [not (id(each) in seen or seen.add(id(each))) for each in registered[number].values()]  # type: ignore[func-returns-value]
        for number in sources
    }
    first = {number: chosen for number, chosen in first.items() if any(chosen)}
    chosen = list(chain.from_iterable(first.values()))
    return list(first), [] if all(chosen) else chosen


def _ids(holder: object, within: list) -> tuple[int, ...]:
    """Return the ids of what must be the same objects in the `vars` of a holder."""
    held = (vars(holder).get(name) for name in (*_REGISTERED, "config"))
    return (*map(id, held), *map(id, within))


def _settings(holder: Any) -> tuple[Settings, list]:
    """Return the settings of a module or a configuration, and the dicts and lists among them.

    Of a module also its identity and the `forward` that others have set on it count.
    """
    attributes = vars(holder)
    plain, within = _plain(attributes)
    if not isinstance(holder, nn.Module):
        return tuple(plain), within
    forward: Any = own_forward(holder) if "forward" in attributes else None
    if forward is None:
        return (id(holder), *plain), within
    function, of = getattr(forward, "__func__", forward), getattr(forward, "__self__", None)
    return (id(holder), id(function), id(of), *plain), within


def _plain(attributes: Mapping[str, Any]) -> tuple[list[object], list]:
    """Return those attributes that are settings: bools, floats and strings; and the dicts and lists that hold some.

    Integers are left out, as modules count with them while they run, and so are private attributes, except those of
    adapters, as modules note in them what they have done.
    """
    plain: list[object] = []
    within: list = []
    for name, value in list(attributes.items()):
        kind = type(value)
        if kind not in _KINDS or name in _OF_TORCH or (name[0] == "_" and "adapter" not in name):
            continue
        if kind in _PLAIN:
            plain.append((name, value))
        elif kind is dict:
            within.append(value)
            plain.extend((name, _key(key), each) for key, each in list(value.items()) if type(each) in _NUMBERS)
        else:
            plain.extend((name, each) for each in value if type(each) is str)
            if kind is list:
                within.append(value)
    return plain, within


def _key(key: object) -> object:
    """Return a key of a dict, or its id where comparing it might mean something else."""
    return key if type(key) in _NUMBERS else id(key)


def _texts(values: list) -> list[str]:
    """Return those values in a list that are settings."""
    return [each for each in values if type(each) is str]
