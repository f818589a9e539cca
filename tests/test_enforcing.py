"""What is enforced while tests run is what jaxtyping enforces, on functions of all kinds."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from beartype import BeartypeConf, beartype
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

from tests.enforcing import enforced

if TYPE_CHECKING:
    from nowhere import Unknown


def plain(number: float, names: tuple[str, ...] = (), *, flag: bool = False) -> int | None:
    return number if flag else None


def shaped(one: Float[Tensor, "rows size"], other: Float[Tensor, "rows size"] | None = None) -> Float[Tensor, " rows"]:
    return one.sum(1 if other is None else 0)


def nested(terms: Mapping[str, Float[Tensor, " rows"]], *more: Float[Tensor, " rows"]) -> int:
    return len(terms) + len(more)


def unknown(value: "Unknown", number: "int") -> "Unknown":
    return number


def items(count: int, each: Float[Tensor, " rows"] | None = None) -> Iterator[int]:
    yield from range(count)


@contextmanager
def block(name: str) -> Iterator[str]:
    yield name


@dataclass(frozen=True)
class Row:
    values: Float[Tensor, " size"]
    weights: Float[Tensor, " size"]
    name: str = ""


class Plain:
    def __init__(self, count: int):
        self.count = count


ZEROS = torch.zeros
CALLS: list[tuple[Any, tuple, dict]] = [
    (plain, (1,), {}),
    (plain, (1.5, ("a",)), {"flag": False}),
    (plain, (1,), {"flag": True}),
    (plain, (1.5,), {"flag": True}),  # returns no int
    (plain, ("1",), {}),
    (plain, (1, ["a"]), {}),
    (plain, (1,), {"flag": 1}),
    (plain, (1, (), 2), {}),  # takes two by place
    (plain, (), {}),
    (shaped, (ZEROS(2, 3),), {}),
    (shaped, (ZEROS(2, 3), ZEROS(2, 3)), {}),  # returns of another size
    (shaped, (ZEROS(2, 2), ZEROS(2, 2)), {}),
    (shaped, (ZEROS(2, 3), ZEROS(2, 4)), {}),
    (shaped, (ZEROS(2),), {}),
    (shaped, (ZEROS(2, 3).long(),), {}),
    (shaped, (), {"one": ZEROS(2, 3), "other": None}),
    (nested, ({"a": ZEROS(2)}, ZEROS(2), ZEROS(2)), {}),
    (nested, ({"a": ZEROS(2)}, ZEROS(3)), {}),
    (nested, ({1: ZEROS(2)},), {}),
    (unknown, (1, 2), {}),
    (unknown, (1, "2"), {}),
    (items, (2,), {}),
    (items, ("2",), {}),
    (items, (2, ZEROS(2, 2)), {}),
    (block, ("a",), {}),
    (block, (1,), {}),
    (Row, (ZEROS(2), ZEROS(2)), {}),
    (Row, (ZEROS(2), ZEROS(3)), {}),
    (Row, (ZEROS(2), ZEROS(2), 3), {}),
    (Plain, ("any",), {}),  # of a class that holds no data the methods are checked, not the class
]


def fresh(what):
    """A class of its own for each that changes it in place; of a function in a decorator the function."""
    if inspect.isclass(what):
        return type(what.__name__, (what,), {"__init__": what.__init__})
    return inspect.unwrap(what)


def outcome(decorate, what, args, kwargs):
    """The error of a call, by its type; none where the call is accepted."""
    checked = decorate(fresh(what))
    try:
        checked(*args, **kwargs)
    except Exception as error:
        return type(error)
    return None


def by_jaxtyping(what):
    return jaxtyped(what, typechecker=beartype(conf=BeartypeConf(is_pep484_tower=True)))


@pytest.mark.parametrize(("what", "args", "kwargs"), CALLS)
def test_what_jaxtyping_refuses_is_refused_and_no_more(what, args, kwargs):
    expected = outcome(by_jaxtyping, what, args, kwargs)
    assert outcome(enforced, what, args, kwargs) == expected
    assert expected in (None, TypeError, TypeCheckError)


def test_the_calls_are_of_both_kinds():
    outcomes = [outcome(by_jaxtyping, *call) for call in CALLS]
    assert {None, TypeError, TypeCheckError} == set(outcomes)


def test_sizes_are_those_of_one_call():
    checked = enforced(shaped)
    for rows in (2, 3):
        assert checked(ZEROS(rows, 4)).shape == (rows,)
    with pytest.raises(ValueError, match="within"):
        enforced(raising)(ZEROS(2))
    assert checked(ZEROS(5, 4)).shape == (5,)


def raising(one: Float[Tensor, " rows"]) -> None:
    raise ValueError("within")


def test_a_function_stays_what_it_was():
    """Its name, its annotations as written, and whether it is checked twice."""
    before = dict(unknown.__annotations__)
    found = enforced(unknown)
    assert found.__annotations__ == unknown.__annotations__ == before
    assert (found.__name__, found.__doc__, inspect.signature(found)) == (
        unknown.__name__, unknown.__doc__, inspect.signature(unknown)
    )  # fmt: skip
    row = fresh(Row)
    once = enforced(row).__init__
    assert enforced(row).__init__ is once
