"""A command line as a frozen dataclass: a field for each flag, with what becomes of it here."""

import argparse
from collections.abc import Sequence
from dataclasses import Field, field, fields
from difflib import get_close_matches
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

from distill.errors import DistillError

Asked = TypeVar("Asked")
WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def flag(default: Any, becomes: str) -> Any:
    """A field of a flag that is honoured, and what it becomes here."""
    return field(default=default, metadata={"becomes": becomes})


def ignored(default: Any, why: str) -> Any:
    """A field of a flag that is accepted and does nothing, and why."""
    return field(default=default, metadata={"ignored": why})


def parsed(kind: type[Asked], arguments: Sequence[str], program: str) -> Asked:
    """What was asked on a command line.

    Switches may be given a value: `--fp16` and `--fp16 True` are the same.

    Args:
        kind: a dataclass whose fields are made by `flag` and `ignored`; a field of type bool is a switch.
        arguments: what stands behind the name of the program.
        program: its name, for the help.

    Raises:
        DistillError: a flag that does not exist, one without its value, or a value of another type.
    """
    parser = _Parser(prog=program, allow_abbrev=False, description=(kind.__doc__ or "").split("\n")[0])
    types = get_type_hints(kind)
    for each in _fields(kind):
        _add(parser, each, types[each.name])
    known, rest = parser.parse_known_args(arguments)
    if rest:
        raise DistillError(_unknown(rest[0], [each.name for each in _fields(kind)]))
    return kind(**vars(known))


def left_unused(asked: Any) -> list[str]:
    """One line for each flag that was given and does nothing."""
    return [
        f"--{each.name} is ignored: {each.metadata['ignored']}."
        for each in _fields(type(asked))
        if "ignored" in each.metadata and getattr(asked, each.name) != each.default
    ]


class _Parser(argparse.ArgumentParser):
    """Reports what is wrong as all of this library does; argparse would print its usage and end the program."""

    def error(self, message: str) -> NoReturn:
        raise DistillError(f"{message}; see --help.")


def _fields(kind: Any) -> tuple[Field[Any], ...]:
    return fields(kind)


def _add(parser: argparse.ArgumentParser, each: Field[Any], annotation: Any) -> None:
    told = each.metadata.get("becomes") or f"ignored: {each.metadata['ignored']}"
    options: dict[str, Any] = {"default": each.default, "help": f"{told} ({each.default})".replace("%", "%%")}
    if annotation is bool:
        parser.add_argument(f"--{each.name}", type=_truth, nargs="?", const=True, metavar="True|False", **options)
        return
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)] or [annotation]
    parser.add_argument(f"--{each.name}", type=kinds[0], metavar=kinds[0].__name__, **options)


def _truth(text: str) -> bool:
    if text.lower() not in WORDS:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return WORDS[text.lower()]


def _unknown(argument: str, names: Sequence[str]) -> str:
    if not argument.startswith("-"):
        return f"{argument!r} belongs to no flag; put its flag before it, or quotes around a value with spaces."
    asked = argument.lstrip("-").partition("=")[0]
    near = get_close_matches(asked, names, n=1, cutoff=0.5)
    return f"there is no flag --{asked}; {f'did you mean --{near[0]}?' if near else 'see --help.'}"
