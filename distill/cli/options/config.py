"""The options of a command in a file: read from .toml or .yaml as defaults, and written back beside a run."""

import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

RUN = "run.toml"
"""The file of a run that holds all of its options."""
NOT_IN_FILES = ("config", "resume", "anyway", "debug", "help")
"""Options that say what to do with a run, and belong to the call alone."""
WAY_OUT = 'write an option a line, e.g. steps = 1000, or data = "texts.jsonl"'


def read_config(context: Any, path: Path | None) -> Path | None:
    """Make the options in a file the defaults of a command, so that options of the call win; `--config` calls it.

    Tables (`[schedule]`) only group options; their names mean nothing. Names may have - or _.

    Args:
        context: of the command, as click makes it.
        path: the file; None leaves the defaults.

    Raises:
        DistillError: a file that cannot be read, or an option that the command does not have.
    """
    if path is None:
        return None
    from distill.errors import DistillError

    known = {name: each for each in context.command.params if (name := each.name) not in NOT_IN_FILES}
    found: dict[str, Any] = {}
    for written, value in _flat(_parse(path)):
        name = written.replace("-", "_")
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            reason = "belongs to the call alone" if name in NOT_IN_FILES else "is no option"
            raise DistillError(
                f"{path} sets {written!r}, which {reason} of {context.command_path}; {hint}options are "
                f"{', '.join(known)}."
            )
        if name in found:
            raise DistillError(f"{path} sets {name!r} twice, in two tables; leave one of them out.")
        if isinstance(value, bool) and not known[name].is_flag:
            raise DistillError(f"{path} sets {name} = {str(value).lower()}, and {name} takes a value; {WAY_OUT}.")
        found[name] = [value] if known[name].multiple and not isinstance(value, list | None) else value
    context.default_map = {name: value for name, value in found.items() if value is not None}
    return path


def as_toml(options: Mapping[str, Any]) -> str:
    r"""Return options as the text of a .toml file; those that are None are left out.

    >>> print(as_toml({"steps": 5, "lr": 5e-05, "data": 'a"b.csv', "seeds": (0, 1), "label": None}), end="")
    steps = 5
    lr = 5e-05
    data = "a\"b.csv"
    seeds = [0, 1]
    """
    given = {name: value for name, value in options.items() if value is not None}
    lines = (f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in given.items())
    return "".join(lines).replace("\x7f", "\\u007f")  # all else in JSON's strings, numbers and lists is TOML's too


def _parse(path: Path) -> Mapping[str, Any]:
    """Return what a file holds."""
    from distill.errors import DistillError

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DistillError(f"--config {path} cannot be read: {error.strerror}; name a .toml or .yaml file.") from None
    except UnicodeDecodeError as error:
        raise DistillError(f"--config {path} is no text in utf-8 ({error.reason}); save it as utf-8.") from None
    try:
        parsed = _as_options(text, path.suffix.lower())
    except ValueError as error:
        raise DistillError(f"--config {path} cannot be parsed: {' '.join(str(error).split())}; {WAY_OUT}.") from None
    if not isinstance(parsed, Mapping):
        raise DistillError(f"--config {path} holds a {type(parsed).__name__} and no options; {WAY_OUT}.")
    return parsed


def _as_options(text: str, suffix: str) -> Any:
    """Return the content of a file by the ending of its name.

    Raises:
        ValueError: it cannot be parsed, or has another ending.
    """
    if suffix == ".toml":
        import tomllib

        return tomllib.loads(text)
    if suffix == ".json":
        return json.loads(text)
    if suffix not in (".yaml", ".yml"):
        raise ValueError(f"{suffix or 'a name without an ending'} is none of .toml, .yaml, .yml, .json")
    import yaml

    try:
        parsed = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    return {} if parsed is None else parsed


def _flat(options: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the options of a file, those of its tables too."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield str(name), value
