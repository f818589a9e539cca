"""A command line as a frozen dataclass: a field for each flag, and how this library treats the flag."""

import argparse
from collections.abc import Sequence
from dataclasses import Field, field, fields
from difflib import get_close_matches
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

from distill.errors import DistillError

Settings = TypeVar("Settings")
WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def flag(default: Any, becomes: str) -> Any:
    """Return the field of a flag that is honored.

    Args:
        default: its value where the flag is not given.
        becomes: the setting of this library that it stands for, for the help.
    """
    return field(default=default, metadata={"becomes": becomes})


def ignored(default: Any, why: str) -> Any:
    """Return the field of a flag that is accepted and has no effect.

    Args:
        default: its value where the flag is not given.
        why: the reason, for the help and for a note where another value is given.
    """
    return field(default=default, metadata={"ignored": why})


def parse(kind: type[Settings], arguments: Sequence[str], program: str) -> Settings:
    """Read the settings of a command line.

    Switches may be given a value: `--fp16` and `--fp16 True` are the same.

    Args:
        kind: a dataclass whose fields are made by `flag` and `ignored`; a field of type bool is a switch.
        arguments: those after the name of the program.
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


def notes_on_ignored(settings: Any) -> list[str]:
    """Return a line for each flag without effect that was given another value than its default."""
    return [
        f"--{each.name} is ignored: {each.metadata['ignored']}."
        for each in _fields(type(settings))
        if "ignored" in each.metadata and getattr(settings, each.name) != each.default
    ]


class _Parser(argparse.ArgumentParser):
    """A parser that raises DistillError; argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        """Raise DistillError with the message of argparse."""
        raise DistillError(f"{message}; see --help.")


def _fields(kind: Any) -> tuple[Field[Any], ...]:
    """Return the fields of a dataclass; `fields` alone does not take a type variable."""
    return fields(kind)


def _add(parser: argparse.ArgumentParser, each: Field[Any], annotation: Any) -> None:
    """Add the flag of a field to the parser."""
    description = each.metadata.get("becomes") or f"ignored: {each.metadata['ignored']}"
    options: dict[str, Any] = {"default": each.default, "help": f"{description} ({each.default})".replace("%", "%%")}
    if annotation is bool:
        parser.add_argument(f"--{each.name}", type=_truth, nargs="?", const=True, metavar="True|False", **options)
        return
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)] or [annotation]
    parser.add_argument(f"--{each.name}", type=kinds[0], metavar=kinds[0].__name__, **options)


def _truth(text: str) -> bool:
    """Read the value of a switch."""
    if text.lower() not in WORDS:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return WORDS[text.lower()]


def _unknown(argument: str, names: Sequence[str]) -> str:
    """Return the message about an argument that is no flag, with the nearest one."""
    if not argument.startswith("-"):
        return f"{argument!r} belongs to no flag; put its flag before it, or quotes around a value with spaces."
    name = argument.lstrip("-").partition("=")[0]
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    return f"there is no flag --{name}; {f'did you mean --{near[0]}?' if near else 'see --help.'}"
