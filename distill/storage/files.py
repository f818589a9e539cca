"""Files that are whole or not there, and that say when they are damaged.

Each file is written beside its place, flushed to the disk and moved there in one operation. JSON carries the checksum
of its own content, a folder a manifest of the checksums of its files.
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
    """A file that does not hold what was written."""


def write(path: Path, content: bytes | str, *, replacing: bool = True, durable: bool = True) -> None:
    """Write a whole file, or none.

    Args:
        path: the file.
        content: its bytes or text.
        replacing: False leaves a file that another process wrote first.
        durable: whether it is on the disk when this returns; without, what a crash of the machine leaves may be none.
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
    """What `write_json` wrote, without the checksum; files of earlier versions have none, which is said.

    Args:
        path: the file.
        way_out: what to do if it is damaged, for the message.
        newest: the last "format" that is known here.

    Raises:
        Damaged: it is no JSON, or not what was written.
        DistillError: a newer format.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise Damaged(f"{path} is damaged ({_first_line(error)}); {way_out}.") from None
    if not isinstance(told, dict):
        raise Damaged(f"{path} is damaged (it holds a {type(told).__name__} and no object); {way_out}.")
    number = told.get("format")
    if newest is not None and isinstance(number, int) and number > newest:
        raise DistillError(
            f"{path.parent} is of format {number} and this version reads up to {newest}; upgrade: pip install -U "
            "causal-distillation."
        )
    found = told.pop(CHECKSUM, None)
    if found is None:
        warnings.warn(
            f"{path} was written by an earlier version, without a checksum, and is not checked.", stacklevel=3
        )
    elif found != _checksum(told):
        raise Damaged(f"{path} is damaged (its content is not what was written: checksum); {way_out}.")
    return told


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside, which takes the place of `path` when the block ends without an error, with a manifest."""
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
    """A folder whose files go into `path` when the block ends without an error, the manifest of them last."""
    path.mkdir(parents=True, exist_ok=True)
    partial = path / f".{uuid4().hex}{PARTIAL}"
    partial.mkdir()
    try:
        yield partial
        seal(partial)
        (path / MANIFEST).unlink(missing_ok=True)  # from here to the end the files are of two savings
        for each in sorted(partial.iterdir(), key=lambda file: file.name == MANIFEST):
            take_place(each, path / each.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def take_place(new: Path, path: Path) -> None:
    """Move a file or folder to its place; what was there goes."""
    if path.is_dir():
        old = path.with_name(f".{path.name}.{uuid4().hex}{PARTIAL}")
        path.rename(old)
        new.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        new.replace(path)
    _flush_folder(path.parent)


def seal(folder: Path) -> None:
    """Flush all files of a folder to the disk and write the manifest: {name: bytes and SHA-256}."""
    found = {}
    for file in sorted(each for each in folder.rglob("*") if each.is_file() and each.name != MANIFEST):
        with suppress(OSError), file.open("rb+") as opened:  # a file that may only be read is not ours
            os.fsync(opened.fileno())
        found[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    write_json(folder / MANIFEST, {"files": found})


def damage(folder: Path) -> str | None:
    """The first file of a folder that is not what its manifest says, and how; None where all are, or there is none."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return None
    try:
        files = read_json(manifest, "").get("files")
    except Damaged:
        return f"{manifest} is damaged"
    for name, told in files.items() if isinstance(files, dict) else ():
        file = folder / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != told["bytes"]:
            return f"{file} is damaged ({file.stat().st_size} bytes of {told['bytes']})"
        if sha256_of(file) != told["sha256"]:
            return f"{file} is damaged (its content is not what was written: checksum)"
    return None


def check_folder_whole(folder: Path, way_out: str) -> None:
    """Raise Damaged where a file of a folder is not what its manifest says."""
    found = damage(folder)
    if found is not None:
        raise Damaged(f"{found}; {way_out}.")


def is_leftover(path: Path) -> bool:
    """Whether it is something of ours that was being written when a process was killed."""
    return path.name.startswith(".") and path.name.endswith(PARTIAL)


def clear_leftovers(folder: Path) -> None:
    """Remove what was being written in a folder when a process was killed; call it under the lock of the folder."""
    for each in folder.iterdir() if folder.is_dir() else ():
        if is_leftover(each):
            shutil.rmtree(each) if each.is_dir() else each.unlink(missing_ok=True)


def remove_empty(folder: Path) -> None:
    """Remove a folder that holds nothing."""
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
    """The SHA-256 of what a file holds."""
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
