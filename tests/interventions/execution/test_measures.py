"""No write waits for a device: changes and NaN are counted there, and masks and positions are copied at most once."""

import traceback
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from interventions import (
    Add,
    Interpolate,
    InterventionError,
    Location,
    Mean,
    Noise,
    Stored,
    Swap,
    Zero,
    interchange,
    intervene,
)
from interventions.devices import indices_on, is_on_host, moved
from interventions.execution import measures, targets
from interventions.execution.measures import Change, Missing, count_missing
from tests.interventions.tiny_models import answer, batch, make

ASKING = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "bincount")


class Device(TorchDispatchMode):
    """A device that is none: what is put there, and all that is computed from it, is asked for in `waits`."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.there = WeakIdKeyDictionary()

    def put(self, value):
        for each in tree_leaves(value):
            if isinstance(each, Tensor):
                self.there[each] = True
        return value

    def holds(self, value: object) -> bool:
        return isinstance(value, Tensor) and value in self.there

    def note(self) -> None:
        """Note a wait that code of ours asks for, and not the model."""
        names = [frame.filename for frame in traceback.extract_stack()]
        own = [name for name in names if "/torch/" not in name and name != __file__]
        if "/interventions/" in own[-1]:
            self.waits.append("\n".join(traceback.format_stack()[-12:]))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = tree_leaves((args, kwargs or {}))
        there, name = any(map(self.holds, given)), func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(each, Tensor) and each.dtype == torch.bool for each in tree_leaves(args[1:])
        )
        if there and (name in ASKING or by_mask):
            self.note()
        result = func(*args, **(kwargs or {}))
        return self.put(result) if there else result


@contextmanager
def a_device(*values: object):
    """A block in which these values are on another device than the host."""
    device = Device()
    device.put(values)

    def cpu(self):
        if not device.holds(self):
            return self
        device.note()
        with torch.utils._python_dispatch._disable_current_modes():
            return self.detach().clone()

    def tolist(self, original=Tensor.tolist):
        if device.holds(self):
            device.note()
        with torch.utils._python_dispatch._disable_current_modes():
            return original(self)

    def near(tensor):
        return not device.holds(tensor)

    with (
        mock.patch.object(Tensor, "cpu", cpu),
        mock.patch.object(Tensor, "tolist", tolist),
        mock.patch.object(targets, "is_on_host", near),
        mock.patch.object(measures, "is_on_host", near),
        device,
    ):
        yield device


RAGGED = [[0, 1], [-1], [2]]
PLACES = [Location(0), Location(1), Location(1, "attention_heads", heads=0), Location(2, dims=[3, 1])]


def padded(inputs: dict, *lengths: int) -> dict:
    return {**inputs, "attention_mask": (torch.arange(5) < torch.tensor(lengths)[:, None]).long()}


OPERATORS = [Swap(), Zero(), Mean(), Interpolate(0.5), Add(torch.tensor(1.0)), Noise(0.1)]


@pytest.mark.parametrize("op", OPERATORS, ids=lambda op: type(op).__name__)
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_an_interchange_waits_once_for_its_device_and_once_for_masks(name, op):
    model, base, source = make(name), batch(name), batch(name, seed=2)
    needs = isinstance(op, Swap | Mean | Interpolate)
    for positions in (None, -1, [0, -1], slice(1, 3), RAGGED):
        expected = interchange(model, base, source if needs else None, dict.fromkeys(PLACES, op), positions=positions)
        with a_device(base, source) as device:
            done = interchange(model, base, source if needs else None, dict.fromkeys(PLACES, op), positions=positions)
        waits = needs + (positions is not None or isinstance(op, Mean))  # for NaN in sources, and for masks of padding
        assert len(device.waits) <= waits, "\n\n".join(device.waits)
        assert positions is None or "attention_mask" in base
        assert isinstance(op, Noise) or torch.equal(done.logits, expected.logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_masks_and_positions_are_copied_together(side):
    model, base = make("gpt2"), padded(batch("gpt2"), 5, 4, 5)
    source, chosen = padded(batch("gpt2", seed=2), 4, 5, 5), torch.tensor([[0], [1], [-1]])
    if side == "left":
        base, source = ({**each, "attention_mask": each["attention_mask"].flip(1)} for each in (base, source))
    mask = torch.zeros(3, 5, dtype=torch.bool).index_fill(1, torch.tensor(2), True)
    for positions in (-1, chosen, mask):
        expected = interchange(model, base, source, PLACES, positions=positions)
        with a_device(base, source, positions) as device:
            done = interchange(model, base, source, PLACES, positions=positions)
        assert len(device.waits) == 2, "\n\n".join(device.waits)  # the masks and positions, and the NaN of the sources
        assert torch.equal(done.logits, expected.logits)


def test_an_open_block_waits_where_it_ends():
    model, base = make("gpt2"), {"input_ids": batch("gpt2")["input_ids"]}
    with a_device(base) as device:
        with intervene(model, Location(1), source=base, positions=0) as handle:
            for _ in range(3):
                answer(model, base)
            before = len(device.waits)
        assert (before, len(device.waits)) == (0, 1)
    assert handle.firings == {Location(1): 3}


@pytest.mark.parametrize("positions", [None, 1, RAGGED], ids=str)
def test_nan_on_a_device_is_told_when_the_verb_ends(positions):
    model, base = make("gpt2"), batch("gpt2")
    place = Location(1)

    source = interchange(model, base, None, {place: lambda base, source, generator: base * float("nan")}, record=place)
    kept = {place: source.activations[place]}

    def opened():
        with intervene(model, place, source=Stored(kept), positions=positions):
            answer(model, base)

    def counterfactual():
        interchange(model, base, Stored(kept), place, positions=positions)

    texts = set()
    for there in ((), (base, kept)):
        for verb in (opened, counterfactual):
            with a_device(*there), pytest.raises(InterventionError, match=r"the source has NaN at block_ou") as raised:
                verb()
            texts.add(str(raised.value))
    assert len(texts) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_nan_is_found_among_all_numbers(dtype):
    values = torch.tensor([1.0, 2.0] if dtype == torch.float8_e4m3fn else [torch.inf, -torch.inf, 6e4, 6e4])
    assert Missing().look(values.to(dtype)) == 0
    assert Missing().look(torch.cat([values, torch.tensor([torch.nan])]).to(dtype).requires_grad_()) == 1
    assert Missing().look(torch.tensor([1, 2])) == 0
    with mock.patch.object(measures, "is_on_host", return_value=False):
        there, whole = Missing(), Missing()
        for number in range(3):
            assert there.look(torch.cat([values, torch.full((number,), torch.nan)]).to(dtype)) == 0
        assert count_missing([whole, there, Missing()]) == [0, 3, 0]
        assert there.entries == 3 * len(values) + 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.long])
def test_a_change_is_relative_to_what_was_there(dtype):
    change = Change()
    assert change.share == 0
    before = torch.tensor([300.0, 400.0]).to(dtype)
    change.add(before, before)
    assert change.share == 0
    change.add(before, before * 0)
    assert change.share == pytest.approx(0.5**0.5)
    change.include(torch.tensor(0.0), torch.tensor(10 * 500.0))
    assert change.share == pytest.approx((1 / 102) ** 0.5)


def test_an_index_is_moved():
    at = torch.device("meta")
    assert indices_on(torch.device("cpu"), (2, 0)).tolist() == [2, 0]
    assert indices_on(at, range(3)).device == at
    here = torch.zeros(1)
    assert moved(here, here.device) is here
    assert is_on_host(here)
    assert not is_on_host(moved(here, at))
