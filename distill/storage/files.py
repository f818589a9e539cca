"""Files that are written whole or not at all, and whose damage is found when they are read.

Each file is written under another name, flushed to the disk and then renamed in one operation. A JSON file holds the
checksum of its own content, and a folder has a manifest with the checksums of its files.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

from distill.errors import DistillError

CHECKSUM, MANIFEST, PARTIAL = "checksum", "manifest.json", ".partial"


class Damaged(DistillError):
    """An error for a file whose content is not what was written."""


def write(path: Path, content: bytes | str, *, replacing: bool = True, durable: bool = True) -> None:
    """Write a file whole or not at all.

    Args:
        path: the file.
        content: its bytes or text.
        replacing: False leaves a file that another process wrote first.
        durable: whether the file is on the disk when this returns; if not, a crash of the machine may lose it.
    """
    partial = path.with_name(f".{path.name}.{uuid4().hex}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        if replacing:
            os.replace(partial, path)
        else:
            _link(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    if durable:
        _flush_folder(path.parent)


def write_json(path: Path, value: Mapping[str, Any], *, replacing: bool = True) -> None:
    """Write plain data with the checksum of its content."""
    plain = json.loads(json.dumps(value, default=str))
    text = json.dumps({**plain, CHECKSUM: _checksum(plain)}, indent=1, ensure_ascii=False) + "\n"
    write(path, text, replacing=replacing)


def read_json(path: Path, way_out: str, newest: int | None = None) -> dict[str, Any]:
    """Return what `write_json` wrote, without the checksum; warn about files of earlier versions, which have none.

    Args:
        path: the file.
        way_out: the end of the message of an error: what to do if the file is damaged.
        newest: the highest "format" that this version reads.

    Raises:
        Damaged: the file is no JSON, or not what was written.
        DistillError: a newer format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise Damaged(f"{path} is damaged ({_first_line(error)}); {way_out}.") from None
    if not isinstance(content, dict):
        raise Damaged(f"{path} is damaged (it holds a {type(content).__name__} and no object); {way_out}.")
    number = content.get("format")
    if newest is not None and isinstance(number, int) and number > newest:
        raise DistillError(
            f"{path.parent} is of format {number} and this version reads up to {newest}; upgrade: pip install -U "
            "causal-distillation."
        )
    found = content.pop(CHECKSUM, None)
    if found is None:
        warnings.warn(
            f"{path} was written by an earlier version, without a checksum, and is not checked.", stacklevel=3
        )
    elif found != _checksum(content):
        raise Damaged(f"{path} is damaged (its content is not what was written: checksum); {way_out}.")
    return content


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Hold a new folder that replaces `path`, with a manifest, when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid4().hex}{PARTIAL}")
    partial.mkdir()
    try:
        yield partial
        seal(partial)
        take_place(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def save_into(path: Path) -> Iterator[Path]:
    """Hold a folder whose files move into `path` when the block ends without an error, their manifest last."""
    path.mkdir(parents=True, exist_ok=True)
    partial = path / f".{uuid4().hex}{PARTIAL}"
    partial.mkdir()
    try:
        yield partial
        seal(partial)
        (path / MANIFEST).unlink(missing_ok=True)  # until the last file moves, old and new files are mixed
        for each in sorted(partial.iterdir(), key=lambda file: file.name == MANIFEST):
            take_place(each, path / each.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def take_place(new: Path, path: Path) -> None:
    """Move a file or folder to its place; an older one there is removed."""
    if path.is_dir():
        old = path.with_name(f".{path.name}.{uuid4().hex}{PARTIAL}")
        path.rename(old)
        new.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        new.replace(path)
    _flush_folder(path.parent)


def seal(folder: Path) -> None:
    """Write the manifest of a folder, {name: bytes and SHA-256}, after all its files are flushed to the disk."""
    found = {}
    for file in sorted(each for each in folder.rglob("*") if each.is_file() and each.name != MANIFEST):
        with suppress(OSError), file.open("rb+") as opened:  # a read-only file was not written here
            os.fsync(opened.fileno())
        found[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    write_json(folder / MANIFEST, {"files": found})


def damage(folder: Path) -> str | None:
    """Return the first file of a folder that differs from its manifest, and how; None if none does, or without one."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return None
    try:
        files = read_json(manifest, "").get("files")
    except Damaged:
        return f"{manifest} is damaged"
    for name, expected in files.items() if isinstance(files, dict) else ():
        file = folder / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{file} is damaged ({file.stat().st_size} bytes of {expected['bytes']})"
        if sha256_of(file) != expected["sha256"]:
            return f"{file} is damaged (its content is not what was written: checksum)"
    return None


def check_folder_whole(folder: Path, way_out: str) -> None:
    """Raise Damaged if a file of a folder differs from its manifest."""
    found = damage(folder)
    if found is not None:
        raise Damaged(f"{found}; {way_out}.")


def is_leftover(path: Path) -> bool:
    """Return whether a path is a file or folder that was being written here when a process was killed."""
    return path.name.startswith(".") and path.name.endswith(PARTIAL)


def clear_leftovers(folder: Path) -> None:
    """Remove what was being written in a folder when a process was killed; call this under the lock of the folder."""
    for each in folder.iterdir() if folder.is_dir() else ():
        if is_leftover(each):
            shutil.rmtree(each) if each.is_dir() else each.unlink(missing_ok=True)


def remove_empty(folder: Path) -> None:
    """Remove a folder if it is empty."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _link(partial: Path, path: Path) -> None:
    with suppress(FileExistsError):  # another process was first
        try:
            os.link(partial, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            os.replace(partial, path)


def _checksum(plain: Mapping[str, Any]) -> str:
    return sha256(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of the content of a file."""
    found = sha256()
    with file.open("rb") as opened:
        while block := opened.read(2**20):
            found.update(block)
    return found.hexdigest()


def _flush_folder(folder: Path) -> None:
    with suppress(OSError):  # where folders cannot be opened
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]
