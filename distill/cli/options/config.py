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
SEPARATORS = {"objective": ",", "classes": ",", "mapping": " "}
"""What stands between the names in the value of an option, for which a file may have a list."""
MERGE = "tag:yaml.org,2002:merge"
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
    spelled: dict[str, str] = {}
    for written, value in _flat(_parse(path)):
        name = written.replace("-", "_")
        if name not in known:
            raise DistillError(_is_unknown(path, written, known, context.command_path))
        if name in found:
            twice = "in two tables" if spelled[name] == written else f"as {spelled[name]} and as {written}"
            raise DistillError(f"{path} sets {name!r} twice, {twice}; leave one of them out.")
        found[name], spelled[name] = _as_value(path, name, known[name], value), written
    context.default_map = {name: value for name, value in found.items() if value is not None}
    return path


def _is_unknown(path: Path, written: str, known: Mapping[str, Any], command: str) -> str:
    """Return the message about a name that is no option of a file."""
    if written.replace("-", "_") in NOT_IN_FILES:
        option = written.replace("_", "-")
        return f"{path} sets {written!r}, which belongs to the call alone: {command} --config {path} --{option} …"
    near = get_close_matches(written.replace("-", "_"), known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{path} sets {written!r}, which is no option of {command}; {hint}options are {', '.join(known)}."


def _as_value(path: Path, name: str, option: Any, value: Any) -> Any:
    """Return the value of an option as the command takes it.

    Raises:
        DistillError: a value of another kind than the option takes.
    """
    from distill.errors import DistillError

    if isinstance(value, bool) and not option.is_flag:
        raise DistillError(f"{path} sets {name} = {str(value).lower()}, and {name} takes a value; {WAY_OUT}.")
    if option.multiple:
        return value if isinstance(value, list | None) else [value]
    if not isinstance(value, list):
        return value
    if name not in SEPARATORS:
        raise DistillError(
            f"{path} sets {name} = {json.dumps(value, default=str)}, and {name} takes one value; {WAY_OUT}."
        )
    if split := [each for each in value if not isinstance(each, str) or SEPARATORS[name] in each.strip()]:
        raise DistillError(
            f"{path} sets {name} to a list with {split[0]!r}, and an entry is a text without {SEPARATORS[name]!r}; "
            f'write each apart: {name} = ["…", "…"].'
        )
    return SEPARATORS[name].join(value)


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
        return json.loads(text, object_pairs_hook=_each_once)
    if suffix not in (".yaml", ".yml"):
        raise ValueError(f"{suffix or 'a name without an ending'} is none of .toml, .yaml, .yml, .json")
    import yaml

    class OnceLoader(yaml.SafeLoader):
        """Reads YAML, and refuses a name that a table has twice."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            _each_once([(name.value, None) for name, _value in node.value if name.tag != MERGE])
            return super().construct_mapping(node, deep)

    try:
        parsed = yaml.load(text, Loader=OnceLoader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    return {} if parsed is None else parsed


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the table of pairs of a name and a value.

    Raises:
        ValueError: a name is there twice, of which a parser would keep the last one without a word.
    """
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"{name!r} is set twice")
        table[name] = value
    return table


def _flat(options: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the options of a file, those of its tables too."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield str(name), value
