"""What an annotation says is what a call takes; what it does not say is left to what is called."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePath
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from interventions import Add, InterventionError, Location, checking, intervene
from interventions.arguments import kind_of

CASES = {
    "bool": (bool, [True, np.True_], [1, 0, None, "True", torch.tensor(True)]),
    "int": (int, [0, -3, np.int64(2), 2**63 - 1], [True, 1.0, "1", 2**63, torch.tensor(1), int, None]),
    "float": (float, [0, 1.5, -2, np.float32(1), float("inf")], [True, float("nan"), "1", 1j, 10**30, None]),
    "str": (str, ["", "a"], [b"a", 1, None, Path("a")]),
    "optional": (int | None, [1, None], [False, "1", 1.5]),
    "generator": (torch.Generator, [torch.Generator()], [0, None, torch.default_generator.get_state()]),
    "network": (nn.Module, [nn.Identity()], [nn.Identity, "gpt2", None]),
    "tensor": (Tensor, [torch.ones(1)], [[1.0], np.ones(1), None]),
    "function": (Callable[[int], int], [len, int, nn.Identity()], [None, "len", 3]),
    "literal": (Literal["a", 1], ["a", 1], ["b", True, 1.0, None]),
    "texts": (Sequence[str], [[], ["a"], ("a", "b")], ["ab", [1], None, {"a"}]),
    "anything in a row": (Sequence[object], [[1, "a"], "ab"], [3, {1}]),
    "arrays in place of sequences": (Sequence[int], [np.array([1, 2])], [np.ones((2, 2), int), np.array([0.5])]),
    "networks": (Sequence[nn.Module], [nn.ModuleList([nn.Identity()])], [nn.Identity(), nn.ModuleDict()]),
    "a list for a tuple": (tuple[int, ...], [(1,), [1, 2]], ["12", {1}]),
    "a path": (str | Path, ["a", Path("a"), PurePath("a")], [b"a", 1]),
}
LEFT_ALONE = {
    "Any": Any,
    "object": object,
    "one or several": str | Iterable[str],
    "positions": int | slice | range | None,
}


@pytest.mark.parametrize(("annotation", "value"), [(a, v) for a, good, _ in CASES.values() for v in good])
def test_what_it_names_is_taken(annotation, value):
    assert kind_of(annotation).holds(value)


@pytest.mark.parametrize(("annotation", "value"), [(a, v) for a, _, bad in CASES.values() for v in bad])
def test_all_else_is_refused(annotation, value):
    assert not kind_of(annotation).holds(value)


@pytest.mark.parametrize("annotation", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_what_says_itself_what_is_wrong_is_left_alone(annotation):
    assert kind_of(annotation) is None


@checking(InterventionError)
def half(value: float, *rest: int, exact: bool = True, names: Mapping[str, int] | None = None, **more: int) -> Any:
    return value, rest, exact, names, more


@pytest.mark.parametrize(
    ("args", "settings", "message"),
    [
        (("3",), {}, r"half\(value='3'\): value must be a number; write value=0\.5\.$"),
        ((3,), {"exact": 0}, r"half\(exact=0\): exact must be True or False; write exact=True\.$"),
        ((nn.Linear(2, 2),), {}, r"half\(value=<Linear>\): value must be a number"),
        ((torch.ones(2, 3),), {}, r"half\(value=Tensor of float32 \[2, 3\]\)"),
        ((1,), {"names": [1]}, r"half\(names=\[1\]\): names must be a mapping"),
    ],
)
def test_the_message_says_what_is_wrong_and_the_way_out(args, settings, message):
    with pytest.raises(InterventionError, match=message):
        half(*args, **settings)


def test_numbers_of_numpy_arrive_as_those_of_python():
    value, _, exact, _, _ = half(np.float32(0.5), exact=np.False_)
    assert (type(value), type(exact)) == (float, bool)


def test_what_is_not_annotated_in_the_signature_is_pythons():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'value'"):
        half()
    assert half(1, "a", other="b")[1:2] == (("a",),)


def test_a_class_is_checked_where_it_is_made_and_named_after_itself():
    @checking(InterventionError)
    @dataclass(frozen=True)
    class Base:
        count: int = 1

    class Child(Base):
        pass

    assert Base(count=2) == Base(2)
    with pytest.raises(InterventionError, match=r"^Child\(count='2'\): count must be a whole number; write count=1\.$"):
        Child("2")


def test_what_is_learned_may_be_a_number():
    """A tensor without axes keeps its gradient."""
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    strength = nn.Parameter(torch.tensor(1.0))
    with intervene(network, module="0", op=Add(torch.ones(2), scale=strength)):
        network(torch.ones(1, 2)).sum().backward()
    assert strength.grad is not None
    with pytest.raises(InterventionError, match=r"is not one number"):
        Add(torch.ones(2), scale=torch.ones(2))


def test_places_are_chosen_by_tensors():
    assert Location(3, dims=torch.tensor([0.1, 0.9, 0.5]).topk(2).indices).dims == range(1, 3)
    with pytest.raises(InterventionError, match="are not whole numbers"):
        Location(3, dims=torch.tensor([0.5]))


def test_checked_functions_compile_whole():
    @checking(InterventionError)
    def doubled(x: Tensor, times: float = 2.0) -> Tensor:
        return x * times

    assert torch.compile(doubled, backend="eager", fullgraph=True)(torch.ones(2)).tolist() == [2.0, 2.0]


def test_fractions_are_numbers():
    assert half(Fraction(1, 2))[0] == 0.5
