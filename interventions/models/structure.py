"""The modules of a model and how they lie in each other, found once and kept until the model changes.

To look at every module for each call would cost more than a small model. So what was found is kept, and two things
tell that it still holds, without a look at every module: a count of the modules that torch registers in modules of a
model that was looked at (`module.part = …`, `add_module`), and the modules on the way to the blocks, whose lists can
lose entries uncounted (`del model.layers[3]`). Where the count has moved, the whole model is compared. Lists that a
model makes while it runs, as `self.layers[:depth]`, are no part of it, and are not counted. Weights that are no plain
ones, as those that are split over processes, are counted too.

What is kept refers to modules weakly: they often refer back to their model, which could never be freed.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, WeakValueDictionary, ref

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from interventions.models.modules import changes_of
from interventions.models.overrides import EXCEPTIONS, Blocks, exception_for
from interventions.models.stacks import Stack, entries_of, names_of, stacks_in
from interventions.models.wrappers import unwrapped

Names = tuple[tuple[int, tuple[tuple[str, int], ...]], ...]
"""The id of each module of a model, with the names and the ids of its parts."""


@dataclass(eq=False)
class Structure:
    """The modules of one model, as they were found.

    Attributes:
        names: tells whether the model still has the same modules.
        modules: each module once, in the order of `model.named_modules()`; they are numbered in this order.
        paths: the dotted path of each module.
        numbers: the number of each module, by its id.
        parents: the numbers of the modules that hold each module.
        stacks: name, path and numbers of the blocks of each list of repeated blocks.
        trunk: the modules around blocks, with their parts.
        entry: the entry of `interventions.models.overrides` that was used, if any.
        table: all entries as they were then.
        registered: how many modules torch had registered when the model was last compared.
        weights: how many weights that are no plain ones torch had registered by then.
        changes: the number of the last change of the parts of each module of the trunk, when these were last compared.
        upward: the numbers of a module and of all those around it, by its number, where they were needed before.
        kept: what others have found in the model, by names of their own; it must not refer to modules strongly.
    """

    names: Names
    modules: tuple[ReferenceType[nn.Module], ...]
    paths: tuple[str, ...]
    numbers: dict[int, int]
    parents: tuple[tuple[int, ...], ...]
    stacks: tuple[tuple[str, str, tuple[int, ...]], ...]
    trunk: tuple[tuple[ReferenceType[nn.Module], tuple[Callable[[], nn.Module | None], ...]], ...]
    entry: Blocks | None
    table: dict[str, Blocks]
    registered: int
    weights: int
    changes: list[int]
    upward: dict[int, set[int]] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> "Structure":
        """Return what is found in a model now."""
        entry = exception_for(model)
        registered, found = _count.watch(model)
        numbers = {id(module): number for number, (_, module) in enumerate(found)}
        refs = tuple(ref(module) for _, module in found)
        parents: list[list[int]] = [[] for _ in found]
        for number, (_, module) in enumerate(found):
            for part in module._modules.values():
                if part is not None:
                    parents[numbers[id(part)]].append(number)
        lists = _lists_of(model, entry)
        stacks = tuple(
            (name, path, tuple(numbers[id(block)] for block in blocks))
            for name, (path, blocks) in zip(names_of([path for path, _ in lists]), lists, strict=True)
        )
        around = _upward([number for *_, blocks in stacks for number in blocks], parents)
        around -= {number for *_, blocks in stacks for number in blocks}
        trunk = tuple(
            (
                refs[number],
                tuple(_nothing if part is None else ref(part) for part in found[number][1]._modules.values()),
            )
            for number in sorted(around)
        )
        paths = tuple(path for path, _ in found)
        return cls(
            _names_in(model),
            refs,
            paths,
            numbers,
            tuple(map(tuple, parents)),
            stacks,
            trunk,
            entry,
            dict(EXCEPTIONS),
            registered,
            _count.weights,
            [-1] * len(trunk),
        )

    def still_holds(self, model: nn.Module) -> bool:
        """Return whether the model has the same modules as when this was found."""
        if self.table != EXCEPTIONS and self.entry is not exception_for(model):
            return False
        if self.registered != _count.registered:
            registered = _count.registered
            if not self.is_exact(model):
                return False
            self.registered = registered
        if self.weights != _count.weights:  # some may have been split over processes since
            self.weights = _count.weights
            for name in ("split", "places"):
                self.kept.pop(name, None)
        for number, (holder, parts) in enumerate(self.trunk):
            module = holder()
            if module is None:
                return False
            held = module._modules
            change = -1 if changes_of is None or type(held) is not dict else changes_of(held)
            if change == -1 or change != self.changes[number]:
                if [part() for part in parts] != list(held.values()):
                    return False
                self.changes[number] = change  # read before the comparison: what changes meanwhile is seen next time
        return True

    def is_exact(self, model: nn.Module) -> bool:
        """Return whether each module of the model is where it was, also those that were put there past torch."""
        return self.names == _names_in(model)

    def holds(self, module: nn.Module) -> bool:
        """Return whether a module is the model or a part of it."""
        number = self.numbers.get(id(module))
        return number is not None and self.modules[number]() is module

    def module(self, number: int) -> nn.Module:
        """Return the module with a number."""
        module = self.modules[number]()
        assert module is not None, "the model holds its modules"
        return module

    def those_left(self) -> list[tuple[str, nn.Module]]:
        """Return path and module of each module that still exists."""
        both = zip(self.paths, self.modules, strict=True)
        return [(path, module) for path, each in both if (module := each()) is not None]

    def modules_left(self) -> list[nn.Module]:
        """Return each module that still exists."""
        return [module for each in self.modules if (module := each()) is not None]

    def any_trains(self) -> bool:
        """Return whether any module is in train mode."""
        return True in [module.training for module in self.modules_left()]

    def around(self, modules: Iterable[nn.Module]) -> list[nn.Module]:
        """Return these modules and all those around them, each once."""
        numbers, others = self._numbers_of(modules)
        found: set[int] = set()
        for number in numbers:
            if number not in self.upward:
                self.upward[number] = _upward([number], self.parents)
            found |= self.upward[number]
        refs: Any = self.modules
        return [*[refs[number]() for number in sorted(found)], *others]

    def above(self, modules: Iterable[nn.Module]) -> list[nn.Module]:
        """Return the modules that hold one of these, at any depth."""
        numbers, _ = self._numbers_of(modules)
        holders = [parent for number in numbers for parent in self.parents[number]]
        return [*map(self.module, sorted(_upward(holders, self.parents)))]

    def _numbers_of(self, modules: Iterable[nn.Module]) -> tuple[list[int], list[nn.Module]]:
        """Return the numbers of those modules that are parts of the model, and the others."""
        numbers, others = [], []
        for module in dict.fromkeys(modules):
            number = self.numbers.get(id(module))
            if number is not None and self.modules[number]() is module:
                numbers.append(number)
            else:
                others.append(module)
        return numbers, others

    def stacks_now(self) -> tuple[Stack, ...]:
        """Return the stacks with their blocks."""
        return tuple(Stack(name, path, tuple(map(self.module, blocks))) for name, path, blocks in self.stacks)

    @property
    def unwrapped(self) -> list[nn.Module]:
        """The model and the models that it wraps, the outermost first."""
        numbers: tuple[int, ...] | None = self.kept.get("unwrapped")
        if numbers is None:
            models = unwrapped(self.module(0))
            if any(outer._modules.get("module") is not inner for outer, inner in pairwise(models)):
                return models  # an adapter says which model it wraps, and may say another one later
            numbers = self.kept["unwrapped"] = tuple(self.numbers[id(model)] for model in models)
        return list(map(self.module, numbers))

    def where(self, key: str, is_one: Callable[[nn.Module], bool]) -> list[nn.Module]:
        """Return the modules for which `is_one(module)` was true when they were found; it is called once for each.

        Args:
            key: names the function.
            is_one: a function of a module that depends on its class, or on what it is made of.
        """
        numbers = self.kept.get(key)
        if numbers is None:
            numbers = tuple(i for i, each in enumerate(self.modules) if (now := each()) is not None and is_one(now))
            self.kept[key] = numbers
        return [module for number in numbers if (module := self.modules[number]()) is not None]


def structure_of(model: nn.Module) -> Structure:
    """Return the structure of a model, as it is now."""
    _start_to_count()
    known = _structures.get(model)
    if known is None or not known.still_holds(model):
        known = _structures[model] = Structure.of(model)
    return known


def forget_structure(model: nn.Module) -> None:
    """Look at the modules of a model again when they are needed next."""
    _structures.pop(model, None)


def _lists_of(model: nn.Module, entry: Blocks | None) -> list[tuple[str, tuple[nn.Module, ...]]]:
    """Return path and blocks of each list of repeated blocks: those that the table states, else those found."""
    stated = entry.lists_in(model) if entry is not None else []
    order = entry.in_order if entry is not None else None
    lists = [(path, order(model, tuple(held.children())) if order else entries_of(held)) for path, held in stated]
    return lists or list(stacks_in(model))


def _names_in(model: nn.Module) -> Names:
    """Return the ids of the modules of a model, with the names and the ids of their parts."""
    found, waiting, seen = [], [model], {id(model)}
    while waiting:
        module = waiting.pop()
        parts = [(name, part) for name, part in module._modules.items() if part is not None]
        found.append((id(module), tuple((name, id(part)) for name, part in parts)))
        for _, part in parts:
            if id(part) not in seen:
                seen.add(id(part))
                waiting.append(part)
    return tuple(found)


def _upward(numbers: Iterable[int], parents: Any) -> set[int]:
    """Return the numbers of modules and of all modules around them."""
    found, waiting = set(numbers), list(dict.fromkeys(numbers))
    while waiting:
        for number in parents[waiting.pop()]:
            if number not in found:
                found.add(number)
                waiting.append(number)
    return found


def _nothing() -> None:
    """Return None, as a reference to a part that is None."""


class _Count:
    """The numbers of modules, and of weights that are no plain ones, registered in modules that were looked at."""

    def __init__(self) -> None:
        self.registered = self.weights = 0
        self._holders: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()

    def __call__(self, holder: nn.Module, name: str, module: nn.Module | None) -> None:
        if self._holders.get(id(holder)) is holder:
            self.registered += 1

    def watch(self, model: nn.Module) -> tuple[int, list[tuple[str, nn.Module]]]:
        """Return the count, and path and module of each module, once all that is registered in them is counted."""
        while True:
            registered, found = self.registered, list(model.named_modules())
            new = {id(module): module for _, module in found if self._holders.get(id(module)) is not module}
            if not new:
                return registered, found
            self._holders.update(new)  # another thread may have registered one meanwhile, so they are read again

    def note(self, holder: nn.Module, name: str, weight: nn.Parameter | None) -> None:
        """Count a weight that is e.g. distributed."""
        if weight is not None and type(weight) is not nn.Parameter and self._holders.get(id(holder)) is holder:
            self.weights += 1


_count = _Count()


@cache
def _start_to_count() -> None:
    """Count what torch registers in modules from now on."""
    register_module_module_registration_hook(_count)
    register_module_parameter_registration_hook(_count.note)


_structures: WeakKeyDictionary[nn.Module, Structure] = WeakKeyDictionary()
