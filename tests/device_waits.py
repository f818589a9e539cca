"""Count where a program would wait for its device, on a machine that has none.

On an accelerator Python runs ahead of the device, until it asks for a value that is there. Here the tensors that would
be on the device are followed instead: those that are given, e.g. the parameters of the models and the moved batch, and
all that is computed from any of them. Asking one of them for a value counts as a wait: `item`, `bool`, `tolist`, `cpu`,
`numpy`, `torch.equal`, `nonzero`, `unique`, and an index by a boolean mask, whose result has a shape that depends on
values. So do the draws of a generator that is said to be on the device.
"""

import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from distill.causal.domains import Domain
from distill.losses import response
from distill.models import host_copies
from distill.training import gradients, loop, schedule
from interventions import keep_on_host
from interventions.execution import targets, writes

ROOT = Path(__file__).parents[1]
READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount")
READS += ("unique_consecutive", "repeat_interleave", "argwhere")
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")


class DeviceWaits(TorchDispatchMode):
    """Follow the tensors on the device inside a block, and note each place that waits for one of them.

    Attributes:
        places: for each wait `file:line function` of the innermost frame of this repository, outside of the tests.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        self._there: Any = WeakIdKeyDictionary()
        self._generators: list[torch.Generator] = []

    def put(self, value: Any) -> None:
        """Take all tensors in a value as on the device."""
        for each in tree_leaves(value):
            if isinstance(each, Tensor):
                self._there[each] = True

    def put_generator(self, generator: torch.Generator) -> None:
        """Take a generator as on the device, and so all that is drawn from it."""
        self._generators.append(generator)

    def holds(self, value: Any) -> bool:
        """Return whether a value is a tensor on the device."""
        return isinstance(value, Tensor) and value in self._there

    def count(self) -> Counter[str]:
        """Return how often each place waited."""
        return Counter(self.places)

    def note(self) -> None:
        """Note a wait at the place of the caller, unless a model waits by itself, as in a plain call of it."""
        frames = [each for each in traceback.extract_stack() if not _is_passed_over(each.filename)]
        place = frames[-1]
        if "transformers" not in Path(place.filename).parts:
            self.places.append(f"{place.filename.removeprefix(f'{ROOT}/')}:{place.lineno} {place.name}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tree_leaves((args, kwargs))
        there = any(self.holds(each) for each in given)
        name = func.overloadpacket.__name__
        if there and ((name in READS and not _stays(name, kwargs)) or (name in INDEXED and _by_mask(args))):
            self.note()
        result = func(*args, **kwargs)
        if there or any(each is own for each in given for own in self._generators):
            self.put(result)
        return result


def _is_passed_over(file: str) -> bool:
    """Return whether a frame only hands on what was called: of torch, of this file, of the standard library."""
    parts = Path(file).parts
    passing = {"torch", "einops", "jaxtyping"} & {*parts} or ("site-packages" not in parts and str(ROOT) not in file)
    return file == __file__ or bool(passing)


def _stays(name: str, kwargs: Any) -> bool:
    """Return whether the size of a result is given, so that it is not asked for."""
    return name == "repeat_interleave" and kwargs.get("output_size") is not None


def _by_mask(args: Any) -> bool:
    """Return whether an index holds a boolean mask; one value written under a mask needs no wait."""
    masks = any(isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8) for each in args[1])
    return masks and not (len(args) > 2 and isinstance(args[2], Tensor) and args[2].numel() == 1)


@contextmanager
def counting(waits: DeviceWaits) -> Iterator[DeviceWaits]:
    """Count the waits in a block, also those of methods that do not reach the dispatcher of torch.

    What is looked at where it is on the CPU alone is not looked at.
    """
    holds_span = Domain.holds_span

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if waits.holds(self):
                waits.note()
            with mock.patch.object(waits, "note"):
                return method(self, *args, **kwargs)

        return wrapped

    with ExitStack() as stack:
        for name in ("tolist", "numpy", "cpu"):
            stack.enter_context(mock.patch.object(Tensor, name, watched(getattr(Tensor, name))))
        for owner, name, replaced in (
            (response, "is_readable", lambda values: not waits.holds(values)),
            (Domain, "holds_span", lambda domain, values: not waits.holds(values) and holds_span(domain, values)),
        ):
            stack.enter_context(mock.patch.object(owner, name, replaced))
        yield stack.enter_context(waits)


@contextmanager
def training_on_a_device(waits: DeviceWaits, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let the trainings in a block take their models, batches and generators as on a device, without being on one.

    Losses are looked at after more steps than any test makes, as that waits; what is moved has its copy on the host.

    Args:
        waits: follows the tensors.
        modules: the models and objectives.
    """

    def moved(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        there = {name: column.clone() for name, column in batch.items()}
        waits.put(there)
        return {name: keep_on_host(column, batch[name]) for name, column in there.items()}

    @contextmanager
    def drawing(*args: Any) -> Iterator[torch.Generator]:
        with schedule.drawing(*args) as generator:
            host_copies._generators[generator] = torch.Generator().manual_seed(generator.initial_seed())
            waits.put_generator(generator)
            yield generator

    for module in modules:
        waits.put([*module.parameters(), *module.buffers()])
    with ExitStack() as stack:
        for name, replaced in {
            "to_device": moved,
            "drawing": drawing,
            "steps_between_looks": lambda device: 1000,
        }.items():
            for part in (each for each in (loop, gradients) if hasattr(each, name)):
                stack.enter_context(mock.patch.object(part, name, replaced))
        stack.enter_context(mock.patch.object(writes, "may_read", return_value=False))
        stack.enter_context(mock.patch.object(targets, "is_on_host", lambda tensor: not waits.holds(tensor)))
        yield


def waits_of_steps(
    records: Iterator[Any], modules: Callable[[], Iterable[nn.Module]], *, after: int = 1, steps: int = 2
) -> list[Counter[str]]:
    """Return where each of some steps of a training waits for the device.

    Args:
        records: the records of the training, whose first step was not made yet.
        modules: returns the models and objectives; it is called after the first steps, which make some of them.
        after: the number of steps before those that are looked at.
        steps: the number of steps that are looked at.
    """
    found, waits = [], DeviceWaits()
    with training_on_a_device(waits, ()):
        for _ in range(after):
            next(records)
        with training_on_a_device(waits, modules()), counting(waits):
            for _ in range(steps):
                waits.places.clear()
                next(records)
                found.append(waits.count())
    return found
