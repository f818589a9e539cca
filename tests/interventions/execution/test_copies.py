"""Swaps and zeros are copied, and give the bits that the operators give, in every layout and for all positions."""

from contextlib import nullcontext
from itertools import product
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from interventions import InterventionError, Location, Swap, Zero, interchange, intervene, run
from interventions.execution import targets, writes
from interventions.execution.copies import cuts_of, pieces_of
from interventions.execution.measures import Change
from interventions.execution.writes import Source, Write
from interventions.hooks.scopes import Scope
from interventions.locations import Location as At
from interventions.models.calls import Call
from interventions.models.places import Place
from interventions.models.sides import Side
from interventions.positions import Columns
from tests.interventions.tiny_models import answer, batch, make

TEXT = Side("attention_mask")
PLACES = {  # a place, and the shape of its activation, of 3 examples and 6 tokens
    "b t d": (Place(nn.Linear(8, 8), "", "output", None, TEXT), (3, 6, 8)),
    "b d": (Place(nn.Linear(8, 8), "", "output", None, TEXT), (3, 8)),
    "b t h d": (Place(nn.Linear(8, 8), "", "attention_heads", None, TEXT, heads=2), (3, 6, 2, 4)),
    "b h t d": (Place(nn.Linear(8, 8), "", "attention_pattern", None, TEXT), (3, 2, 6, 6)),
    "scores": (Place(nn.Linear(8, 8), "", "attention_scores", None, TEXT), (3, 2, 6, 6)),
    "t b d": (Place(nn.LSTM(8, 8), "", "output", None, TEXT), (6, 3, 8)),
    "b d x": (Place(nn.Conv1d(8, 8, 1), "", "output", None, TEXT), (3, 8, 6)),
    "b d x y": (Place(nn.Conv2d(8, 8, 1), "", "output", None, TEXT), (3, 8, 2, 3)),
    "b x y h d": (Place(nn.Linear(8, 8), "", "query", None, TEXT, heads=2), (3, 2, 3, 2, 4)),
}
RAGGED = [[0], [1, -1], [2]]
MASK = torch.zeros(3, 6, dtype=torch.bool).index_fill(1, torch.tensor([2, 3]), True)
POSITIONS = [None, -1, [1, 2], [0, -1], [-1, 2, 0, 3, 1], slice(1, None), torch.tensor([[0, 1], [2, 1], [-1, -2]])]
POSITIONS += [RAGGED, MASK]
LAYOUTS = {
    "dense": lambda x: x,
    "a view of every second": lambda x: torch.cat([x, x], -1)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
    "exchanged": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "half": lambda x: x.bfloat16(),
    "complex": lambda x: torch.complex(x, x),
    "whole numbers": lambda x: (x * 9).long(),
}


def padding(*lengths: int) -> torch.Tensor:
    return torch.arange(6) < torch.tensor(lengths)[:, None]


MASKS = {
    "no mask": (None, None),
    "no padding": (torch.ones(3, 6).long(), torch.ones(3, 6).long()),
    "padded": (padding(6, 5, 6).flip(1).long(), padding(6, 5, 6)),
}


def drawn(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def written(write: Write, state: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The new activation in a call of a model with this padding mask."""
    arguments = {} if mask is None else {"attention_mask": mask}
    return write(state, Scope(nn.Identity(), call=Call(nn.Identity(), arguments, 0, 6, 6)))


def as_computed():
    """A block in which nothing is copied: the operators compute it, and each vector has its index."""
    return mock.patch.object(Write, "_copy", return_value=None)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one, other) and one.stride() == other.stride() and one.dtype == other.dtype


CASES = [(axes, layout) for axes in PLACES for layout in LAYOUTS]
CASES = [case for case in CASES if case not in (("scores", "complex"), ("scores", "whole numbers"))]


@pytest.mark.parametrize(("axes", "layout"), CASES)
def test_a_copy_has_the_bits_and_the_layout_of_what_is_computed(axes, layout):
    place, shape = PLACES[axes]
    state, held = LAYOUTS[layout](drawn(shape, 1)), LAYOUTS[layout](drawn(shape, 2))
    before = state.clone(), held.clone()
    parts = [{}] if layout == "complex" or axes == "b x y h d" else [{}, dict(dims=[1, 2]), dict(dims=[3, 0])]
    parts += [dict(heads=[1]), dict(heads=0, dims=range(2))] if "h" in axes else []
    for positions, (name, masks), op, part in product(POSITIONS, MASKS.items(), (Swap(), Zero()), parts):
        if (positions is not None and len(shape) < 3) or (positions is MASK and name == "padded"):
            continue
        if name == "no padding" and (part or positions is not POSITIONS[3]):
            continue
        at = Location(module="0", **part) if "h" not in axes else Location(0, "attention_heads", **part)
        new = []
        for block in (nullcontext(), as_computed()):
            source = Source([held], masks[1]) if isinstance(op, Swap) else None
            write = Write(at, place, op, positions, source, change=Change())
            with block:
                new.append((written(write, state, masks[0]), write.change.share))
        assert same(new[0][0], new[1][0]), (positions, name, op, part)
        assert new[0][1] == pytest.approx(new[1][1], rel=1e-2 if layout == "half" else 1e-4)
        assert new[0][0].data_ptr() not in (state.data_ptr(), held.data_ptr())
    assert torch.equal(state, before[0])
    assert torch.equal(held, before[1])


@pytest.mark.parametrize("positions", [None, -1, [0, -1], [[0], [1], [2]]], ids=str)
@pytest.mark.parametrize("axes", ["b t d", "b t h d", "b h t d", "b d x"])
def test_gradients_reach_base_and_source_as_they_would(axes, positions):
    place, shape = PLACES[axes]
    for op in (Swap(), Zero()):
        found = []
        for block in (nullcontext(), as_computed()):
            state, held = drawn(shape, 1).requires_grad_(), drawn(shape, 2).requires_grad_()
            write = Write(Location(0), place, op, positions, Source([held]) if isinstance(op, Swap) else None)
            with block:
                new = written(write, state * 2, None)
            ((new * drawn(shape, 3)).square() + state + held).sum().backward()
            found.append([torch.zeros(shape) if each.grad is None else each.grad for each in (state, held)])
        assert all(map(torch.equal, *found))
        assert (found[0][1] != 1).any() == isinstance(op, Swap)


def test_inference_tensors_and_transforms_of_functions():
    place, shape = PLACES["b t d"]
    with torch.inference_mode():
        held = drawn(shape, 2)
    state = drawn(shape, 1).requires_grad_()
    new = written(Write(Location(0), place, Swap(), -1, Source([held])), state, None)
    new.sum().backward()
    assert torch.equal(new[:, -1], held[:, -1])
    assert state.grad[:, :-1].all()
    assert not state.grad[:, -1].any()
    many = drawn((4, *shape), 3)
    with mock.patch.object(Write, "_check_numbers"):
        found = torch.func.vmap(lambda x: written(Write(Location(0), place, Swap(), 1, Source([x])), state, None))(many)
    assert torch.equal(found[:, :, 1], many[:, :, 1])
    tangent = torch.func.jvp(
        lambda x: written(Write(Location(0), place, Zero(), 1), x, None), (state.detach(),), (torch.ones(shape),)
    )[1]
    assert tangent.sum() == 3 * 5 * 8


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5", "vit"])
@pytest.mark.parametrize("site", ["block_output", "attention_heads", "key"])
def test_runs_are_the_same(name, site):
    model, base, source = make(name), batch(name), batch(name, seed=2)
    stack = dict(stack="decoder") if name == "t5" else {}
    place = Location(1, site, **stack)
    for positions, op in product((None, 1, [0, -1], RAGGED), (Swap(), Zero())):
        options = dict(positions=positions, record=[Location(-1, **stack)])
        given = source if isinstance(op, Swap) else None
        once = interchange(model, base, given, {place: op}, **options)
        with as_computed():
            again = interchange(model, base, given, {place: op}, **options)
        assert torch.equal(once.logits, again.logits), (positions, op)
        assert not torch.equal(once.logits, run(model, base).logits)


def test_what_is_known_in_a_call_changes_nothing():
    """Several writes of one call with the same and with other positions, sources and padding."""
    model, places = make("gpt2"), [Location(0), Location(1), Location(1, "attention_heads"), Location(2, "key")]
    base, source = batch("gpt2"), batch("gpt2", seed=2)
    base["attention_mask"], source["attention_mask"] = padding(5, 4, 5)[:, :5], padding(4, 5, 5)[:, :5]
    other = batch("gpt2", seed=3)
    sources = {place: other if number % 2 else source for number, place in enumerate(places)}
    ragged = [[0, 1], [-1], [2]]
    positions = {places[0]: -1, places[1]: ragged, places[2]: torch.tensor([[0], [1], [2]]), places[3]: ragged}
    once = interchange(model, base, sources, places, positions=positions)
    with (
        mock.patch.object(targets, "known_in", side_effect=lambda context: {}) as asked,
        mock.patch.object(writes, "known_in", asked),
    ):
        again = interchange(model, base, sources, places, positions=positions)
    assert asked.called
    assert torch.equal(once.logits, again.logits)


def test_nothing_is_known_in_the_next_call():
    model, place, inputs = make("gpt2"), Location(1), batch("gpt2")
    seen = []
    chosen = torch.tensor([[0], [1], [2]])
    with intervene(model, place, op=Zero(), positions=chosen):
        model.transformer.h[2].register_forward_pre_hook(lambda module, args: seen.append((args[0] == 0).all(-1)))
        answer(model, inputs)
        chosen += 1
        answer(model, inputs | {"attention_mask": padding(5, 5, 5)[:, :5]})
    assert [each.nonzero()[:, 1].tolist() for each in seen] == [[0, 1, 2], [1, 2, 3]]


# --- how little it takes ----------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """The operations of torch that are called inside the block."""

    def __enter__(self):
        self.names: list[str] = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("op", "positions", "most"),
    [(Swap(), -1, 6), (Swap(), slice(1, 3), 6), (Swap(), None, 3), (Zero(), [2], 3), (Zero(), None, 1)],
    ids=str,
)
def test_a_copy_takes_few_operations_also_beside_others(op, positions, most):
    place, shape = PLACES["b t d"]
    state, held = drawn(shape, 1), drawn(shape, 2)
    scope, counts = Scope(nn.Identity(), call=Call(nn.Identity(), {}, 0, 6, 6)), []
    for number in range(12):
        source = Source([held]) if isinstance(op, Swap) else None
        write = Write(Location(number), place, op, positions, source)
        with Operations() as seen:
            write(state, scope)
        counts.append(len(seen.names))
    assert counts == [counts[0]] * 12
    assert counts[0] <= most


def test_a_change_is_measured_only_where_it_can_be_read():
    place, shape = PLACES["b t d"]
    for op, more in ((Zero(), 2), (Swap(), 3)):  # the part and its norm; the difference and its norm, and no sum
        counts = []
        for change in (None, Change()):
            source = Source([drawn(shape, 2)]) if isinstance(op, Swap) else None
            with Operations() as seen:
                written(Write(Location(0), place, op, 1, source, change=change), drawn(shape, 1), None)
            counts.append(len(seen.names))
        assert counts[1] == counts[0] + more


@pytest.mark.parametrize("wrong", ["source", "base", "both infinite"])
def test_nan_in_a_source_is_found_where_a_change_is_measured_and_nan_elsewhere_is_none(wrong):
    place, shape = PLACES["b t d"]
    state, held = drawn(shape, 1), drawn(shape, 2)
    value = torch.inf if wrong == "both infinite" else torch.nan
    for each in (state, held) if wrong == "both infinite" else (held,) if wrong == "source" else (state,):
        each[0, 1] = value
    for positions in (1, slice(1, 2), None):
        for change in (None, Change()):
            write = Write(Location(0), place, Swap(), positions, Source([held]), change=change)
            if wrong == "source":
                with pytest.raises(InterventionError, match=r"the source has NaN at block_output\.0 in 8 of"):
                    written(write, state, None)
            else:
                assert torch.equal(written(write, state, None)[:, 1], held[:, 1])
    model = make("gpt2")
    made = []
    with mock.patch.object(Write, "_count", lambda self, context: made.append(self)):
        interchange(model, batch("gpt2"), None, {Location(1): Zero()})
        with intervene(model, layer=1, op=Zero()) as handle:
            answer(model, batch("gpt2"))
    assert [write.change is None for write in made] == [True, False]
    assert handle.change[Location(1)] == pytest.approx(1.0)


def test_tokens_are_padded_once_for_all_places_of_a_call():
    place, shape = PLACES["b t d"]
    mask, source_mask = MASKS["padded"]
    scope = Scope(nn.Identity(), call=Call(nn.Identity(), {"attention_mask": mask}, 0, 6, 6))
    held, counts = Source([drawn(shape, 2)], source_mask), []
    for number in range(3):
        with Operations() as seen:
            Write(Location(number), place, Swap(), -1, held)(drawn(shape, 1), scope)
        counts.append(len(seen.names))
    assert counts[1] == counts[2] < counts[0] / 3


def test_pieces_and_cuts():
    known = {}
    assert pieces_of(None, None, 5, known) == ((slice(0, 5), slice(0, 5)),)
    assert pieces_of(Columns(2, (3,)), Columns(2, (0,)), 5, known) == ((slice(3, 4), slice(0, 1)),)
    to, taken = Columns(2, (0, 1, 4)), Columns(2, (1, 2, 3))
    assert pieces_of(to, taken, 5, known) == ((slice(0, 2), slice(1, 3)), (slice(4, 5), slice(3, 4)))
    many = Columns(2, tuple(range(0, 12, 2)))
    [(selected, _)] = pieces_of(many, many, 12, known)
    assert selected.columns.tolist() == [0, 2, 4, 6, 8, 10] * 2
    vectors = torch.zeros(2, 3, 2, 4)
    assert cuts_of(At(0, "query", heads=1, dims=[1, 2]), vectors) == [(-2, 1, 1), (-1, 1, 2)]
    assert cuts_of(At(0, "query", dims=[0, 2]), vectors) is None
    assert cuts_of(At(0, "query", dims=[4]), vectors) is None
    assert cuts_of(At(0, "query"), vectors) == []
