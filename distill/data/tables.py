"""Tables in files: .csv, .tsv, .jsonl and .txt, also compressed by gzip."""

import csv
import gzip
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from distill.errors import DistillError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".txt")
Quoting = Literal[0, 3]  # csv.QUOTE_MINIMAL and csv.QUOTE_NONE
LIMIT = Lock()


def read(path: str | Path, *, quoting: Quoting = csv.QUOTE_MINIMAL) -> list[dict[str, Any]]:
    """Return the rows of a table as dicts; the ending of its name decides its format. A .txt file has a text a line.

    A .tsv that is not well-formed under `quoting` is read again with quotation marks as plain characters, as GLUE's
    files need.

    Raises:
        DistillError: a file that is missing, of another kind or malformed, two columns of one name, or no rows.
    """
    path, kind = Path(path), kind_of(path)
    content = _read_text(path)
    try:
        rows = _parse(kind, content, quoting, path)
    except DistillError:
        raise
    except (csv.Error, ValueError, RecursionError) as error:
        if kind == ".tsv" and quoting != csv.QUOTE_NONE:
            return read(path, quoting=csv.QUOTE_NONE)
        raise DistillError(
            f"{path} is not well-formed {kind[1:]}: {error}; correct that row, or save the file again"
        ) from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise DistillError(
            f"{path} has no rows{'' if not rows else ' of named columns'}; give at least two, with a text each"
        )
    return rows


def kind_of(path: str | Path) -> str:
    """Return the kind of a file by its ending: ".csv", ".tsv", ".jsonl" or ".txt".

    Raises:
        DistillError: a file that is missing or of another kind, or a folder.
    """
    path = Path(path)
    kind = next((suffix for suffix in SUFFIXES if path.name.removesuffix(".gz").endswith(suffix)), None)
    if path.is_dir():
        raise DistillError(
            f"{path} is a folder; give a file, or name the task that it belongs to: --task sst2 --data {path}"
        )
    if kind is None and not path.suffix and not path.exists():
        raise DistillError(f"{path} does not exist; give a file, a folder or a pattern, as --data FILE")
    if kind is None:
        raise DistillError(
            f"{path} is not a kind of file that can be read; "
            f"give a {', '.join(SUFFIXES)} file, or one of these with .gz"
        )
    if not path.is_file():
        raise DistillError(f"{path} does not exist; give the path of a {kind} file, as --data FILE")
    return kind


def header_of(path: Path) -> list[str]:
    """Return the names of the columns of a .csv or .tsv file; none where its first line cannot be read.

    Raises:
        DistillError: two columns of one name.
    """
    delimiter = "," if path.name.removesuffix(".gz").endswith(".csv") else "\t"
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
            names = [name.strip() for name in next(csv.reader(file, delimiter=delimiter), [])]
    except (OSError, EOFError, ValueError, csv.Error):
        return []
    _refuse_twice([name for name in names if name], path)
    return names


@contextmanager
def fields_of_any_length() -> Iterator[None]:
    """Let the csv module read fields of more than 131,072 characters inside a block; its limit is restored after it."""
    with LIMIT:  # the limit is shared by the whole process
        before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _read_text(path: Path) -> str:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DistillError(f"{path} is not utf-8 ({error.reason} at byte {error.start}); save it as utf-8") from None
    except (OSError, EOFError) as error:
        raise DistillError(f"{path} cannot be read: {error}; check the file") from None


def _parse(kind: str, content: str, quoting: Quoting, path: Path) -> list[Any]:
    if kind == ".txt":
        return [{"text": line.strip()} for line in content.splitlines() if line.strip()]
    if kind == ".jsonl":

        def row(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            _refuse_twice([name for name, _ in pairs], path)
            return dict(pairs)

        return [json.loads(line, object_pairs_hook=row) for line in content.split("\n") if line.strip()]
    with fields_of_any_length():
        return _parse_lines(content, "," if kind == ".csv" else "\t", quoting, path)


def _parse_lines(content: str, delimiter: str, quoting: Quoting, path: Path) -> list[dict[str, Any]]:
    # newline="" leaves line ends inside quoted fields to the csv module.
    lines = csv.reader(StringIO(content, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    header = [name.strip() for name in next(lines, [])]
    _refuse_twice([name for name in header if name], path)  # columns without a name are never read
    rows = []
    for row in lines:
        if len(row) > len(header):
            raise csv.Error(f"line {lines.line_num} has {len(row)} fields and the header {len(header)}")
        if row:
            rows.append(dict(zip(header, row, strict=False)))
    return rows


def _refuse_twice(names: list[str], path: Path) -> None:
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise DistillError(
            f"{path} has {names.count(twice)} columns called {twice!r}, and which is meant is not known; rename or "
            "remove all but one"
        )
