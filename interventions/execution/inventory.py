"""The modules of a model with their settings and tensors, found once and kept until something among them is assigned.

Python numbers the changes of every dict, and torch's compiler reads these numbers. So one comparison of numbers shows
that no attribute, parameter, buffer or part of any module was assigned since, and only modules whose number is another
are read again. Where this torch has no such numbers, all modules are read each time: slower, and the same.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain, compress, filterfalse
from operator import attrgetter, itemgetter, methodcaller, ne
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor, nn

from interventions.hooks.replacements import changes_before, own_forward
from interventions.models.modules import changes_of, modules_of
from interventions.models.wrappers import is_sharded

Settings = tuple[object, ...]
Named = tuple[int, str]
"""The number of a holder and the name of one of its attributes."""
_OF_TORCH = frozenset(vars(nn.Module())) - {"training"}
_REGISTERED = ("_parameters", "_buffers", "_modules")
_COLUMNS = tuple(map(itemgetter, _REGISTERED))
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
        registered: the dicts of parameters of all modules, those of buffers, and those of parts.
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
    def of(
        cls, modules: list[nn.Module], configured: list[int], listing: "Iterable[Named] | None" = None
    ) -> "Contents":
        """Return the contents of modules.

        Args:
            modules: all modules of the model, each once.
            configured: the number of a module with each of the configurations.
            listing: the dicts and lists that are settings, by the number of their holder and their name; None looks
                for them.
        """
        holders = [*modules, *(vars(modules[number])["config"] for number in configured)]
        types = list(map(type, holders))
        if listing is None:
            listing = [(number, name) for number, holder in enumerate(holders) for name in _plain(vars(holder))[1]]
        within = [(vars(holders[number]).get(name), number) for number, name in listing]
        attributes = list(map(_dict_of, modules))
        try:
            registered: list[Any] = [each for column in _COLUMNS for each in map(column, attributes)]
        except KeyError:  # where it is no dict, a class may keep it elsewhere
            registered = [getattr(module, name) for name in _REGISTERED for module in modules]
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
            empty=list(filterfalse(None, registered)),
        )

    def changes(self) -> list[int]:
        """Return the number of the last change of each holder and of each inner dict."""
        assert changes_of is not None
        return list(map(changes_of, map(_dict_of, self.holders))) + list(map(changes_of, self.inner))

    def forwards(self) -> list[int]:
        """Return the id of the `forward` of each class."""
        return [id(getattr(each, "forward", None)) for each in self.classes]


@dataclass(frozen=True, eq=False)
class Inventory:
    """The modules, settings and tensors that were found in a model. It holds no part of the model.

    Attributes:
        key: the same object in all inventories with the same modules and tensors.
        modules: the modules of the model.
        configured: the number of a module with each of the configurations.
        listing: the dicts and lists that are settings, by the number of their holder and their name.
        settings: the settings of each holder.
        parts: the ids of what must be the same objects in the `vars` of each holder.
        changes: the number of the last change of the `vars` of each holder, and of each inner dict, but for changes
            that only replaced a method while a block was open, or put it back.
        texts: the texts in each list that is a setting.
        kinds: the id of the class of each holder.
        classed: the number of the class of each holder.
        sources: the numbers of the registered dicts with tensors that a run reads, and does not change.
        chosen: which values in the sources are tensors, each tensor once; empty where all are.
        is_kept: whether the changes show all that is assigned.
        is_sharded: whether FSDP shards a part of the model.
    """

    key: object
    modules: list[ReferenceType[nn.Module]]
    configured: list[int]
    listing: list[Named]
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
    def of(cls, model: nn.Module) -> tuple["Inventory", Contents]:
        """Return the inventory of a model, found now, and the contents of the model."""
        modules = modules_of(model)
        configs: dict[int, int] = {}
        for number, module in enumerate(modules):
            if (config := _config_of(module)) is not None:
                configs.setdefault(id(config), number)
        configured = list(configs.values())
        contents = Contents.of(modules, configured)
        # These numbers are read before what they stand for: what is changed in between is then read again.
        is_kept = changes_of is not None and all(isinstance(each, dict) for each in contents.registered)
        changes = changes_before(contents.changes()) if is_kept else []
        read = [_settings(holder) for holder in contents.holders]
        # In train mode a run itself changes the buffers of a norm, which reads none of them then.
        count = len(modules)
        read_by_runs = [True] * count + [not module.training for module in modules]
        filled = [number for number, each in enumerate(contents.registered[: 2 * count]) if each]
        sources, chosen = _first_tensors([number for number in filled if read_by_runs[number]], contents.registered)
        numbers = {each: number for number, each in enumerate(contents.classes)}
        found = cls(
            key=object(),
            modules=list(map(ref, modules)),
            configured=configured,
            listing=[(number, name) for number, (_, within) in enumerate(read) for name in within],
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
        return found, contents

    def renewed(self, contents: Contents | None) -> tuple["Inventory", Contents] | None:
        """Return both as the model is now; None where its modules or tensors are others, or may be.

        Args:
            contents: those for which the inventory was made; None looks for them.
        """
        if not self.is_kept or changes_of is None:
            return None
        if contents is None:
            modules: Any = [each() for each in self.modules]
            if None in modules or not all(map(_config_of, map(modules.__getitem__, self.configured))):
                return None
            contents = Contents.of(modules, self.configured, self.listing)
            if list(map(id, contents.types)) != self.kinds:
                return None
        if list(map(type, contents.holders)) != contents.types or any(contents.empty):
            return None
        changes = contents.changes()
        changes[:1] = changes_before(changes[:1])  # that of the model itself, whose methods each open block replaces
        texts = list(map(_texts, contents.lists))
        is_same = changes == self.changes and texts == self.texts
        now = self if is_same else self._reread(contents, changes, texts)
        return None if now is None else (now, contents)

    def _reread(self, contents: Contents, changes: list[int], texts: list[list[str]]) -> "Inventory | None":
        """Return the inventory with the settings of those holders read again that others have changed."""
        if len(changes) != len(self.changes) or len(texts) != len(self.texts):
            return None
        count, changes = len(contents.holders), changes_before(changes)
        owners: list[int | None] = [*compress(contents.holders_of_lists, map(ne, texts, self.texts))]
        for at in compress(range(len(changes)), map(ne, changes, self.changes)):
            owners.append(at if at < count else contents.owners[at - count])
        if not owners:
            return self
        settings = list(self.settings)
        for number in set(owners):
            if number is None:
                return None
            holder = contents.holders[number]
            now, within = _settings(holder)
            if _ids(holder, within) != self.parts[number]:
                return None
            if vars(holder).get("_buffers") and ("training", holder.training) not in settings[number]:
                return None  # its buffers are read in one mode only
            settings[number] = now
        return replace(self, settings=settings, changes=changes, texts=texts)

    def tensors(self, contents: Contents) -> list[Tensor]:
        """Return the tensors that a run reads and does not change, each once."""
        dicts = map(contents.registered.__getitem__, self.sources)
        values = chain.from_iterable(map(dict.values if self.is_kept else methodcaller("values"), dicts))
        return list(compress(values, self.chosen) if self.chosen else values)


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


def _ids(holder: object, within: Mapping[str, object]) -> tuple[int, ...]:
    """Return the ids of what must be the same objects in the `vars` of a holder."""
    held = (vars(holder).get(name) for name in (*_REGISTERED, "config"))
    return (*map(id, held), *map(id, within.values()))


def _settings(holder: Any) -> tuple[Settings, dict[str, dict | list]]:
    """Return the settings of a module or a configuration, and the dicts and lists among them, by name.

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


def _plain(attributes: Mapping[str, Any]) -> tuple[list[object], dict[str, dict | list]]:
    """Return those attributes that are settings: bools, floats and strings; and the dicts and lists that hold some.

    Integers are left out, as modules count with them while they run, and so are private attributes, except those of
    adapters, as modules note in them what they have done.
    """
    plain: list[object] = []
    within: dict[str, dict | list] = {}
    for name, value in list(attributes.items()):
        kind = type(value)
        if kind not in _KINDS or name in _OF_TORCH or (name[0] == "_" and "adapter" not in name):
            continue
        if kind in _PLAIN:
            plain.append((name, value))
        elif kind is dict:
            within[name] = value
            plain.extend((name, _key(key), each) for key, each in list(value.items()) if type(each) in _NUMBERS)
        else:
            plain.extend((name, each) for each in value if type(each) is str)
            if kind is list:
                within[name] = value
    return plain, within


def _key(key: object) -> object:
    """Return a key of a dict, or its id where comparing it might mean something else."""
    return key if type(key) in _NUMBERS else id(key)


def _texts(values: list) -> list[str]:
    """Return those values in a list that are settings."""
    return [each for each in values if type(each) is str]
