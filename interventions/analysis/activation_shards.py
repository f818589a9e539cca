"""Shards of activations: files of safetensors whose vectors are written batch by batch and read by memory mapping.

    folder/index.json             the settings, and the columns: the file, shape and dtype of each location
    folder/complete.json          written last: the number of rows of the data, and of vectors in each shard
    folder/00000/0.safetensors    "vectors" [n, …] at the first location, 1.safetensors those at the second
    folder/00000/tokens.safetensors   "row" [n] and "position" [n] of each vector
    folder/00000/shard.json       the number of vectors, the fingerprint of the inputs, and a checksum of each file

A shard holds a fixed number of batches. It is written under another name, beside a lock that ends with its process, and
renamed when it is whole: a shard is there whole or not at all, and of several processes one writes it.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4
from zlib import crc32

import safetensors.torch
import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from torch import Tensor

from interventions.analysis.fingerprints import as_bytes
from interventions.errors import InterventionError

FORMAT = 1
INDEX, COMPLETE, TOKENS, FACTS = "index.json", "complete.json", "tokens.safetensors", "shard.json"
HEADER = 256
"""Bytes before the vectors in a file, 8 of which state the length of the others. So vectors are aligned in memory."""
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
}
"""The names of dtypes in the files."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of writing alone, which name no file: a full disk, a quota, and a file that is as large as it may be."""


@dataclass(eq=False)
class ShardWriter:
    """A shard that is being written.

    Attributes:
        folder: the folder of its files.
        columns: {location: description}, as in the index.
        vectors: how many vectors were written.
    """

    folder: Path
    columns: Mapping[str, Mapping[str, Any]]
    vectors: int = 0
    _files: dict[str, BinaryIO] = field(default_factory=dict)
    _sums: dict[str, int] = field(default_factory=dict)
    _rows: list[Tensor] = field(default_factory=list)
    _positions: list[Tensor] = field(default_factory=list)

    def open(self) -> None:
        """Create the files, with room for their headers."""
        for name, column in self.columns.items():
            self._files[name] = (self.folder / column["file"]).open("wb")
            self._files[name].write(bytes(HEADER))

    def add(self, vectors: Mapping[str, Tensor], rows: Tensor, positions: Tensor | None) -> None:
        """Write the vectors of a batch, with the row and the position of each."""
        for name, values in vectors.items():
            content = as_bytes(values).numpy().data
            self._files[name].write(content)
            self._sums[name] = crc32(content, self._sums.get(name, 0))
        self._rows.append(rows)
        self._positions += [] if positions is None else [positions]
        self.vectors += len(rows)

    def end(self, fingerprint: str) -> None:
        """Write the headers, the tokens and the facts of the shard, to the disk."""
        for name, column in self.columns.items():
            shape, dtype = [self.vectors, *column["shape"]], DTYPES[getattr(torch, column["dtype"])]
            size = self._files[name].tell() - HEADER
            header = json.dumps({"vectors": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}})
            self._files[name].seek(0)
            self._files[name].write((HEADER - 8).to_bytes(8, "little") + header.ljust(HEADER - 8).encode())
            self._files[name].flush()
            os.fsync(self._files[name].fileno())
        tokens = {"row": torch.cat(self._rows)}
        tokens |= {"position": torch.cat(self._positions)} if self._positions else {}
        content = safetensors.torch.save(tokens)
        _write(self.folder / TOKENS, content)
        sums = {TOKENS: crc32(content), **{self.columns[name]["file"]: sum_ for name, sum_ in self._sums.items()}}
        _write(self.folder / FACTS, _json({"vectors": self.vectors, "inputs": fingerprint, "crc32": sums}))

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


@dataclass(frozen=True, eq=False)
class ShardFolder:
    """A folder of shards.

    Attributes:
        path: the folder.
    """

    path: Path

    def index(self) -> dict[str, Any] | None:
        """Return the index; None where there is none."""
        return _read(self.path / INDEX)

    def complete(self) -> dict[str, Any] | None:
        """Return what was written when the last shard was whole; None before."""
        return _read(self.path / COMPLETE)

    def facts(self, number: int) -> dict[str, Any] | None:
        """Return the facts of a shard; None where it is not there yet."""
        return _read(self.path / f"{number:05}" / FACTS)

    def begin(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the form of the vectors in the folder for these settings; None where nothing was written yet.

        Raises:
            InterventionError: the folder holds something else, or activations with other settings.
        """
        index = self.index()
        if index is None:
            if self.path.is_dir() and any(not each.name.startswith(".") for each in self.path.iterdir()):
                raise InterventionError(f"{self.path} holds other files than activations; choose another folder.")
            return None
        if index.get("format") != FORMAT:
            raise InterventionError(
                f"{self.path} is of format {index.get('format')} and this version reads {FORMAT}; choose another "
                "folder, or another version."
            )
        before = index["settings"]
        changed = next((name for name in {**before, **settings} if before.get(name) != settings.get(name)), None)
        if changed is not None:
            raise InterventionError(_other(self.path, changed, before.get(changed), settings.get(changed)))
        form: dict[str, Any] = index["form"]
        return form

    def write_index(self, settings: Mapping[str, Any], form: Mapping[str, Any]) -> None:
        """Write the settings and the form of the vectors, unless another process did.

        Raises:
            InterventionError: another process wrote other ones.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if _create(self.path / INDEX, _json({"format": FORMAT, "settings": settings, "form": form})):
            return
        there = self.begin(settings)
        if there != form:
            raise InterventionError(
                f"{self.path} holds vectors of the form {there} and these are {form}; choose another folder."
            )

    @contextmanager
    def shard(self, number: int, columns: Mapping[str, Any]) -> Iterator[ShardWriter | None]:
        """Hold a writer of a shard; None where another process is writing it, or has."""
        path, partial = self.path / f"{number:05}", self.path / f".{number:05}.partial"
        lock = FileLock(self.path / f".{number:05}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield None
            return
        writer = ShardWriter(partial, columns)
        try:
            if path.is_dir():
                yield None
                return
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            partial.mkdir()
            writer.open()
            yield writer
            writer.close()
            partial.rename(path)
            _sync(self.path)
        finally:
            writer.close()
            shutil.rmtree(partial, ignore_errors=True)
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()

    def finish(self, rows: int, shards: int) -> None:
        """Write the number of rows and of vectors if all shards are there, and remove what killed processes left."""
        facts = [self.facts(number) for number in range(shards)]
        if any(each is None for each in facts):
            return
        counts = [each["vectors"] for each in facts if each is not None]
        lock = FileLock(self.path / ".finish.lock")
        with lock:
            _create(self.path / COMPLETE, _json({"rows": rows, "vectors": counts}))
            for left in self.path.glob(".*"):
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink(missing_ok=True)


@dataclass(eq=False)
class ShardReader:
    """The shards of a complete folder, each mapped into memory when it is first read.

    Attributes:
        path: the folder.
        columns: {location: description}, as in the index.
        counts: the number of vectors of each shard.
    """

    path: Path
    columns: Mapping[str, Mapping[str, Any]]
    counts: Sequence[int]
    _opened: dict[int, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": {}}  # another process maps the files itself

    def tensors(self, number: int) -> dict[str, Tensor]:
        """Return the columns of a shard, mapped into memory: "row", "position" and the locations."""
        if number not in self._opened:
            folder = self.path / f"{number:05}"
            self._check_sums(folder)
            try:
                found = safetensors.torch.load_file(folder / TOKENS)
                for name, column in self.columns.items():
                    with safe_open(folder / column["file"], "pt") as file:
                        found[name] = file.get_tensor("vectors")
            except (OSError, safetensors.SafetensorError) as error:
                raise InterventionError(
                    f"{folder} is damaged ({' '.join(str(error).split())}); remove it and {COMPLETE}, and collect "
                    "again."
                ) from None
            wrong = next((name for name, each in found.items() if len(each) != self.counts[number]), None)
            if wrong is not None:
                raise InterventionError(
                    f"{folder} is damaged ({wrong} has {len(found[wrong])} entries for {self.counts[number]} vectors); "
                    f"remove it and {COMPLETE}, and collect again."
                )
            self._opened[number] = found
        return self._opened[number]

    def _check_sums(self, folder: Path) -> None:
        """Raise InterventionError for files of a shard whose bytes are others than were written, or are gone."""
        sums = (_read(folder / FACTS) or {}).get("crc32", {})  # an earlier version kept none
        try:
            wrong = next((name for name, kept in sums.items() if _sum_of(folder / name) != kept), None)
        except OSError as error:
            raise InterventionError(
                f"{folder} is damaged ({error.strerror}: {error.filename}); remove it and {COMPLETE}, and collect "
                "again."
            ) from None
        if wrong is not None:
            raise InterventionError(
                f"{folder} is damaged (the bytes of {wrong} are not those that were written); remove it and "
                f"{COMPLETE}, and collect again."
            )


def _sum_of(file: Path) -> int:
    """Return the checksum of the vectors in a file, without mapping them; of the tokens that of the whole file."""
    found = 0
    with file.open("rb") as opened:
        opened.seek(0 if file.name == TOKENS else HEADER)
        while part := opened.read(2**20):
            found = crc32(part, found)
    return found


@contextmanager
def writing(folder: Path, verb: str) -> Iterator[None]:
    """Raise InterventionError where a folder cannot be written, and leave errors of the data as they are.

    Args:
        folder: the folder.
        verb: the name of the function that continues there.
    """
    try:
        yield
    except OSError as error:
        named = None if error.filename is None else Path(os.fsdecode(error.filename)).absolute()
        own = folder.absolute()
        is_own = named is not None and (own == named or own in named.parents or named in own.parents)
        if not is_own and error.errno not in _FULL:
            raise
        raise InterventionError(
            f"{folder} cannot be written: {error.strerror or error}; free or choose another place, and call {verb} "
            "again: what is written stays."
        ) from error


def _other(path: Path, name: str, before: Any, now: Any) -> str:
    """Return the message for a folder with other settings."""
    if name in ("model", "data"):
        return f"{path} holds activations of another {name}; choose another folder."
    return f"{path} holds activations with {name}={before!r}, and {name}={now!r} was given; choose another folder."


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def _read(file: Path) -> dict[str, Any] | None:
    """Return what is in a file of JSON; None where there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8", errors="surrogatepass"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise InterventionError(f"{file} is damaged ({error}); remove its folder and collect again.") from None
    if not isinstance(content, dict):
        raise InterventionError(f"{file} is damaged (it holds no object); remove its folder and collect again.")
    return content


def _write(file: Path, content: bytes) -> None:
    """Write a file to the disk."""
    with file.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())


def _create(file: Path, content: bytes) -> bool:
    """Write a file whole, and return True, unless there is one."""
    if file.exists():
        return False
    partial = file.with_name(f".{file.name}.{uuid4().hex}.partial")
    try:
        _write(partial, content)
        try:
            os.link(partial, file)
        except FileExistsError:
            return False
        except FileNotFoundError:
            if file.exists():  # another process has finished all, and removed what was left
                return False
            raise
        _sync(file.parent)
        return True
    finally:
        partial.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Write the names of the files of a folder to the disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
