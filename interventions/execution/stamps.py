"""A stamp of a model: it shows whether tensors, modes, adapters or settings have changed since a run.

Torch counts writes into a tensor, but not those through `.data`, NumPy or other views of its memory. So a stamp also
holds the address of each tensor, all numbers of models up to `numbers.WHOLE` numbers, and for larger ones a sample
from every row and every column of every matrix. Changed rows, columns, heads, units and layers are seen; one number of
a large matrix, written past torch, is not.

What was found in a model is kept for its next stamp. Only stamps, which live as long as the runs that hold them, hold
parts of a model; what is kept without them holds neither a model nor memory that it has given up.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from interventions.endings import setting
from interventions.errors import InterventionError
from interventions.execution.inventory import Contents, Inventory, Settings
from interventions.execution.numbers import Layout, Numbers, numbers_of
from interventions.models.modules import model_name
from interventions.models.wrappers import Model, module_of

_version_of: Any = torch._C.TensorBase._version.__get__  # type: ignore[attr-defined]


@dataclass(eq=False)
class Stamp:
    """The state of a model at some time.

    Attributes:
        settings: the identity, mode, own `forward` and plain settings of each module, and those of each configuration.
        forwards: the id of the `forward` of each class.
        classed: the number of the class of each module and configuration.
        versions: how often torch has written into each tensor.
        numbers: the addresses and numbers of the tensors; None where these are elsewhere or move from run to run (FSDP,
            offloading).
    """

    settings: list[Settings]
    forwards: list[int]
    classed: list[int]
    versions: list[int]
    numbers: Numbers | None
    _held: "_Held | None" = field(default=None, repr=False)

    @classmethod
    def of(cls, model: Model) -> "Stamp":
        """Return the stamp of a model now, or that of the block `unchanged` around."""
        module, readings = module_of(model), _readings.get()
        return _read(module) if readings is None else readings.stamp(module)

    def is_of(self, model: Model) -> bool:
        """Return whether the model is still the same."""
        module, readings = module_of(model), _readings.get()
        return not self._changes(_read(module)) if readings is None else readings.is_same(self, module)

    def _changes(self, now: "Stamp") -> str:
        """Return what has changed from this stamp to another; "" if nothing has."""
        if self is now:
            return ""
        if self.settings != now.settings or not self._runs_as(now):
            return "modules, settings, adapters or the train/eval mode"
        if self.versions != now.versions:
            return "weights or buffers, by torch"
        if self.numbers is not None and now.numbers is not None and not self.numbers.are_as(now.numbers):
            return "weights or buffers, past torch"
        return ""

    def _runs_as(self, now: "Stamp") -> bool:
        """Return whether each module runs the same `forward` of its class."""
        if self.classed == now.classed:
            return self.forwards == now.forwards
        return [self.forwards[each] for each in self.classed] == [now.forwards[each] for each in now.classed]


class _Held:
    """The inventory of a model and what it holds, shared by its stamps: an older stamp holds nothing that is gone."""

    found: tuple[Inventory, Contents]

    def __reduce__(self) -> tuple[Any, ...]:
        return _Held, ()  # a copy of a stamp is of no model


@dataclass(eq=False)
class _Known:
    """The findings of the last stamp of a model for the next one. They hold no part of the model.

    Attributes:
        inventory: what was found in the model.
        layout: how its tensors are read.
        held: the inventory with the contents, as long as a stamp holds them.
        last: the last stamp.
    """

    inventory: Inventory | None = None
    layout: Layout | None = None
    held: ReferenceType[_Held] | None = None
    last: ReferenceType[Stamp] | None = None


_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def _read(module: nn.Module, *, with_sums: bool = True) -> Stamp:
    """Return the stamp of a model now: the last one, where it is held by somebody and nothing has changed.

    Args:
        module: the model.
        with_sums: whether tensors are read that lie on other devices, or are not plain.
    """
    known = _known.get(module)
    if known is None:
        known = _known[module] = _Known()
    held = None if known.held is None else known.held()
    before, kept = (known.inventory, None) if held is None else held.found
    inventory, contents = (before and before.renewed(kept)) or Inventory.of(module)
    if held is None:
        held = _Held()
    if inventory is not before or contents is not kept:
        held.found, known.inventory, known.held = (inventory, contents), inventory, ref(held)
    tensors = inventory.tensors(contents)
    numbers, layout = None, None
    if not inventory.is_sharded:
        numbers, layout = numbers_of(tensors, inventory.key, known.layout, with_sums=with_sums)
    known.layout = layout
    now = Stamp(inventory.settings, contents.forwards(), inventory.classed, _versions(tensors), numbers, held)
    last = None if known.last is None else known.last()
    # Sums on other devices are not compared here, as that waits for the device.
    is_here = numbers is not None and numbers.sums is not None and all(each.is_cpu for each in numbers.sums)
    if last is not None and is_here and last.numbers is not None and not last._changes(now):
        if layout is not None and numbers is not None:
            layout.give_back(numbers.sample)
        return last
    known.last = ref(now)
    return now


def _versions(tensors: list[Tensor]) -> list[int]:
    """Return how often torch has written into each tensor; −1 for those of inference, which are not counted."""
    try:
        return list(map(_version_of, tensors))
    except RuntimeError:
        return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


class _Readings:
    """The stamps of models inside a block in which each is read once."""

    def __init__(self, *, is_promised: bool, is_trusted: bool = False) -> None:
        self.is_promised, self.is_trusted = is_promised, is_trusted
        self.stamps: dict[nn.Module, Stamp] = {}
        self.same: dict[Stamp, nn.Module] = {}

    def stamp(self, module: nn.Module) -> Stamp:
        """Return the stamp of a model in this block."""
        found = self.stamps.get(module)
        if found is None:
            found = self.stamps[module] = Stamp([], [], [], [], None) if self.is_trusted else _read(module)
        return found

    def is_same(self, stamp: Stamp, module: nn.Module) -> bool:
        """Return whether a stamp is as that of a model in this block."""
        now = self.stamp(module)
        if stamp is now or self.same.get(stamp) is module:
            return True
        is_same = not stamp._changes(_read(module) if self.is_trusted else now)
        if is_same:
            self.same[stamp] = module
        return is_same

    def check(self) -> None:
        """Raise InterventionError for a model that is no longer as it was in this block."""
        for module, stamp in self.stamps.items():
            changed = stamp._changes(_read(module, with_sums=False))
            if changed:
                raise InterventionError(
                    f"the {model_name(module)} changed inside `with unchanged():` ({changed}), where its runs are not "
                    "checked; end the block before you change the model, and open it again: with unchanged(): …"
                )


_readings: ContextVar[_Readings | None] = ContextVar("readings", default=None)


@contextmanager
def unchanged() -> Iterator[None]:
    """Check each model once inside the block, and at its end, instead of at each use of a run.

    A run is refused where its model has changed since, so each use of a run looks at the whole model. Where no model
    changes for a while, as in a loop of measurements or in the forward of a training step, it is enough to look at the
    first run or use inside the block, and at its end. Runs made before the block are compared once. The block holds the
    models that are run in it until it ends; blocks inside it join it; other threads are not in it.

    Raises:
        InterventionError: a model that was run in the block changed before the end. At the end it is seen in what torch
            and Python count, and in the numbers of weights in the memory of the CPU; those on other devices are not
            read again, so that nothing waits for the device.

    >>> from interventions import Location, interchange, run
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1)).eval()
    >>> base, source = torch.zeros(4, 2), torch.ones(4, 2)
    >>> with unchanged():
    ...     held = run(net, base)
    ...     changed = [interchange(net, held, source, Location(module=name)).output for name in "01"]
    >>> len(changed)
    2
    """
    around = _readings.get()
    if around is not None and around.is_promised:
        yield
        return
    readings = _Readings(is_promised=True)
    with setting(_readings, readings):
        yield
    readings.check()


@contextmanager
def trusting() -> Iterator[None]:
    """Leave models unchecked inside the block, where the caller changes none, as in the forward of a training step.

    As `unchanged`, without the look at the models at the first use and at the end. A run that was made inside the block
    is of use inside it alone; one that was made before is compared once. Sources on a device are not searched for NaN,
    as that waits for the device: a training looks at its loss instead, and at the weights before it saves them.

    >>> from interventions import Location, interchange, run
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1)).eval()
    >>> with trusting():
    ...     base, source = run(net, torch.zeros(4, 2)), run(net, torch.ones(4, 2), Location(module="0"))
    ...     changed = interchange(net, base, source, Location(module="0"))
    >>> torch.equal(changed.output, source.output)
    True
    """
    around = _readings.get()
    if around is not None and around.is_promised:
        yield
        return
    with setting(_readings, _Readings(is_promised=True, is_trusted=True)):
        yield


def may_read(tensor: Tensor) -> bool:
    """Return whether a value of a tensor may be read: on a device not inside a block of `trusting`."""
    readings = _readings.get()
    return tensor.is_cpu or readings is None or not readings.is_trusted


def read_once() -> AbstractContextManager[None]:
    """Read each model once inside the block, for a verb that checks several runs before it runs anything."""
    return nullcontext() if _readings.get() is not None else setting(_readings, _Readings(is_promised=False))
