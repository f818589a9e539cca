"""Signatures of commands: options that several commands share are written once, in groups."""

import inspect
from collections.abc import Callable
from inspect import Parameter
from typing import Any

Command = Callable[..., None]


def takes(*groups: type) -> Callable[[Command], Command]:
    """Give a command with `**options` the options of groups, by the signature that typer reads.

    Args:
        groups: classes whose annotated attributes are options, each with its default.
    """

    def with_groups(command: Command) -> Command:
        own = [each for each in inspect.signature(command).parameters.values() if each.kind != Parameter.VAR_KEYWORD]
        shared = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=getattr(group, name), annotation=annotation)
            for group in groups
            for name, annotation in inspect.get_annotations(group).items()
        ]
        names = [each.name for each in (*shared, *own)]
        assert len(set(names)) == len(names), f"{command.__name__} has two options of one name"
        keywords = [each.replace(kind=Parameter.KEYWORD_ONLY) for each in own]
        described: Any = command
        described.__signature__ = inspect.Signature([*shared, *keywords])
        command.__annotations__ = {each.name: each.annotation for each in (*shared, *keywords)}
        return command

    return with_groups
