"""Calls of everything that is public, with one argument wrong at a time, and what became of each."""

import contextlib
import io
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill import DistillError
from interventions import InterventionError
from tests.faults.fuzz.takes import accepted
from tests.faults.fuzz.values import WRONG, Planted

LONGEST = 20  # seconds
PACKAGES = ("/interventions/", "/distill/")


@dataclass(frozen=True)
class Recipe:
    """A call that is right.

    Attributes:
        name: of what is called.
        call: it, given the arguments by name.
        right: makes right arguments anew.
        takes: what each argument takes, in the words of `takes.KINDS`.
        own: arguments that go into the user's own code (a model, a function), whose errors pass as they are.
        skip: wrong values that would take too long or be no test, by argument.
    """

    name: str
    call: Callable[..., Any]
    right: Callable[[], dict[str, Any]]
    takes: dict[str, str]
    own: tuple[str, ...] = ()
    skip: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of a call: "clear", "right", "own", "silent", "raw", "left" or "hangs"."""

    recipe: str
    argument: str
    value: str
    kind: str
    text: str = ""


class TookTooLong(BaseException):
    """Raised by the alarm."""


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise in a block that takes too long."""

    def ring(number: int, frame: Any) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def hooks(values: dict[str, Any]) -> int:
    """Count what stands on the networks among the arguments."""
    found = 0
    for value in values.values():
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, nn.Module):
                for module in each.modules():
                    found += len(module._forward_hooks) + len(module._forward_pre_hooks) + ("forward" in vars(module))
    return found


def attacks(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield each argument with each wrong value."""
    for argument in recipe.takes:
        for value in WRONG:
            if value not in recipe.skip.get(argument, "").split("|"):
                yield argument, value


def attacked(recipe: Recipe, argument: str = "", value: str = "") -> Outcome:
    """Call with one wrong argument, or none, in an empty folder, and say what became of it."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        given = recipe.right() | ({argument: WRONG[value]()} if argument else {})
        before = hooks(given)
        kind, text = _outcome(recipe, argument, value, given)
        if kind != "hangs" and hooks(given) != before:
            kind, text = "left", f"{hooks(given)} hooks, before {before}; {text}"
    return Outcome(recipe.name, argument, value, kind, text)


def _outcome(recipe: Recipe, argument: str, value: str, given: dict[str, Any]) -> tuple[str, str]:
    quiet = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet), limited(LONGEST):
                result = recipe.call(**given)
        except TookTooLong:
            return "hangs", ""
        except (InterventionError, DistillError) as error:
            return ("clear" if _is_one_line(str(error)) else "raw"), str(error)
        except Planted:
            return "own", "planted"
        except Exception as error:
            return ("own" if _is_own(recipe, argument, value, error) else "raw"), _place(error)
    right = not argument or value in accepted(recipe.takes[argument])
    return ("right" if right else "silent"), " ".join(repr(result).split())[:100]


def _is_one_line(text: str) -> bool:
    return bool(text) and "\n" not in text and "\x1b" not in text


def _is_own(recipe: Recipe, argument: str, value: str, error: Exception) -> bool:
    """Whether the error comes from the user's own code: the last frame of ours called it."""
    if argument not in recipe.own:
        return False
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    last = max((i for i, name in enumerate(frames) if _is_ours(name)), default=-1)
    after = frames[last + 1 :]
    if not after:  # what is called has no frame, or cannot be called with what it is given
        return value in ("type", "class of network", "operator")
    return "torch/nn/modules/" in after[0] or not _is_library(after[0])


def _is_ours(name: str) -> bool:
    parts = Path(name).parts
    return ("interventions" in parts or "distill" in parts) and "tests" not in parts


def _is_library(name: str) -> bool:
    return "site-packages" in name or "/lib/python" in name


def _place(error: Exception) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_ours(f.filename)]
    at = f"{'/'.join(Path(frames[-1].filename).parts[-2:])}:{frames[-1].lineno}" if frames else "outside"
    return f"{type(error).__name__} at {at}: {str(error).splitlines()[0][:150] if str(error) else ''}"
