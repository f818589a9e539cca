"""Records in a few large files: appended whole or not at all by several processes at once, and read in place.

A series of shards is `NAME-0000.shard`, `NAME-0001.shard`, …; a process appends to the first that no other one holds
the lock of. A record is a header and its bytes, with a checksum of each:

    magic [4] · key [20] · length of the bytes [8] · their checksum [4] · checksum of the header [4] · bytes

Beside a shard its index, `NAME-0000.index`, has the same headers with the places of the records in place of the magic.
It is written after the record. So a process that is killed leaves a record without its entry, which is found by reading
on behind the last entry, or a part of a record, which counts as none and which the next writer cuts off.
"""

import mmap
import os
import struct
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4
from zlib import crc32

from filelock import FileLock, Timeout

from distill.errors import DistillError
from distill.storage.locks import LOCK

KEY = 20
"""The length of a key [bytes]."""
FULL = 8 * 2**30
"""The length of a shard [bytes] from which on nothing is appended to it."""
SHARD, INDEX, MAGIC = ".shard", ".index", b"\x89rec"
_HEADER = struct.Struct(f"<4s{KEY}sQII")
_ENTRY = struct.Struct(f"<Q{KEY}sQII")
_CHECKSUM = 4
_INHERITED: list["_Writer"] = []
"""Writers of the process that this one was forked from: to let go of them would unlock their shards."""


class Record(NamedTuple):
    """The place of a record in a shard: its bytes, and their checksum."""

    shard: Path
    start: int
    length: int
    checksum: int


@dataclass
class _Read:
    """The part of a shard that is known.

    Attributes:
        entries, end: the number of entries that were read, and where the last known record ends.
        sizes: the lengths of the shard and of its index when this was read.
        mapped: the shard in memory.
    """

    entries: int = 0
    end: int = 0
    sizes: tuple[int, int] = (0, 0)
    mapped: mmap.mmap | None = None


class Shards:
    """A series of shards in a folder, as a store of bytes by key; the last record of a key counts.

    Args:
        folder: an existing folder.
        name: the name of the series.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self._records: dict[bytes, Record] = {}
        self._read: dict[Path, _Read] = {}
        self._writer: _Writer | None = None
        self.look()

    def __reduce__(self) -> tuple[type["Shards"], tuple[Path, str]]:
        return Shards, (self.folder, self.name)

    def __len__(self) -> int:
        return len(self._records)

    def get(self, key: bytes) -> memoryview | None:
        """Return the bytes of a key, in place; None if there are none.

        Raises:
            LookupError: they are damaged, and are forgotten. The message names the shard.
        """
        if key not in self._records:
            self.look()
        record = self._records.get(key)
        if record is None:
            return None
        content = self._bytes(record)
        if len(content) != record.length or crc32(content) != record.checksum:
            del self._records[key]
            raise LookupError(f"{record.shard} is damaged at byte {record.start}")
        return content

    def put(self, contents: Mapping[bytes, bytes]) -> None:
        """Append the bytes of some keys.

        Raises:
            DistillError: they cannot be written, e.g. as the disk is full; nothing of them is then kept.
        """
        if self._writer is not None and self._writer.process != os.getpid():
            _INHERITED.append(self._writer)
            self._writer = None
        if self._writer is None or self._writer.end >= FULL:
            self._writer = None
            self._writer = _Writer(self.folder, self.name)
            self.look()
        writer = self._writer
        found = writer.append(contents)
        self._records.update(found)
        known = self._read.setdefault(writer.shard, _Read())
        known.entries, known.end = writer.entries, writer.end
        known.sizes = writer.end, writer.entries * _ENTRY.size

    def look(self) -> None:
        """Take in what other processes have appended."""
        for shard in sorted(self.folder.glob(f"{self.name}-*{SHARD}")):
            known = self._read.setdefault(shard, _Read())
            with suppress(FileNotFoundError):
                sizes = shard.stat().st_size, _size_of(shard.with_suffix(INDEX))
                if sizes != known.sizes:
                    self._look_into(shard, known, sizes[0])
                    known.sizes = sizes

    def _look_into(self, shard: Path, known: _Read, size: int) -> None:
        """Take in the new entries of an index, and the records behind them."""
        entries, is_whole = _entries_of(shard, known.entries, size)
        if not is_whole:
            entries, known.end = [], 0
        for key, record in entries:
            self._records[key] = record
            known.end = max(known.end, record.start + record.length)
        known.entries += len(entries)
        for key, record in _scanned(shard, known.end, size):
            self._records[key] = record
            if is_whole:
                known.end = record.start + record.length

    def _bytes(self, record: Record) -> memoryview:
        """Return bytes of a shard, which is mapped into memory; fewer if it has become shorter."""
        known, end = self._read[record.shard], record.start + record.length
        if known.mapped is None or len(known.mapped) < end:
            try:
                with record.shard.open("rb") as file:
                    known.mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError):  # removed, or empty
                return memoryview(b"")
        return memoryview(known.mapped)[record.start : end]


class _Writer:
    """The one writer of a shard, which holds its lock until it is let go of; a killed process holds none.

    Args:
        folder: of the shards.
        name: of their series.

    Attributes:
        process: the id of the process that made it.
        shard: the shard that it appends to.
        end, entries: where the last whole record ends, and the number of entries in the index.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.process = os.getpid()
        self.shard, self._lock = _unheld(folder, name)
        files = [os.open(each, os.O_RDWR | os.O_CREAT, 0o600) for each in (self.shard, self.shard.with_suffix(INDEX))]
        self._data, self._index = files
        for each in files:
            weakref.finalize(self, os.close, each)
        size = os.fstat(self._data).st_size
        entries, is_whole = _entries_of(self.shard, 0, size)
        entries = entries if is_whole else []
        self.end = max((record.start + record.length for _, record in entries), default=0)
        self.entries = len(entries)
        unlisted = list(_scanned(self.shard, self.end, size))
        self.end = max((record.start + record.length for _, record in unlisted), default=self.end)
        os.ftruncate(self._data, self.end)
        os.ftruncate(self._index, self.entries * _ENTRY.size)
        self._list(dict(unlisted))

    def append(self, contents: Mapping[bytes, bytes]) -> dict[bytes, Record]:
        """Append records and their entries; return where they are."""
        found, parts, end = dict[bytes, Record](), list[bytes](), self.end
        for key, content in contents.items():
            checksum = crc32(content)
            parts += [_sealed(_HEADER, MAGIC, key, len(content), checksum), content]
            found[key] = Record(self.shard, end + _HEADER.size, len(content), checksum)
            end += _HEADER.size + len(content)
        try:
            _write(self._data, b"".join(parts), self.end)
            self._list(found)
        except BaseException as error:
            with suppress(OSError):
                os.ftruncate(self._data, self.end)
                os.ftruncate(self._index, self.entries * _ENTRY.size)
            if not isinstance(error, OSError):
                raise
            raise DistillError(
                f"{self.shard} cannot be written ({error.strerror}); all that was kept before is whole: make room, and "
                "start the same again."
            ) from error
        self.end = end
        return found

    def _list(self, found: Mapping[bytes, Record]) -> None:
        """Append the entries of records to the index."""
        lines = [_sealed(_ENTRY, each.start, key, each.length, each.checksum) for key, each in found.items()]
        _write(self._index, b"".join(lines), self.entries * _ENTRY.size)
        self.entries += len(lines)


def _unheld(folder: Path, name: str) -> tuple[Path, FileLock | None]:
    """Return the first shard that no other process appends to and that is not full, with its lock."""
    for number in count():
        shard = folder / f"{name}-{number:04}{SHARD}"
        if shard.exists() and shard.stat().st_size >= FULL:
            continue
        lock = FileLock(shard.with_suffix(LOCK), thread_local=False)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            continue
        except NotImplementedError:  # a file system without locks: a shard of its own
            return folder / f"{name}-{uuid4().hex}{SHARD}", None
        return shard, lock
    raise AssertionError("numbers do not end")


def _size_of(file: Path) -> int:
    """Return the length of a file, 0 if there is none."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def _entries_of(shard: Path, first: int, size: int) -> tuple[list[tuple[bytes, Record]], bool]:
    """Return the keys and records of the entries of an index from one on, and whether all of them are whole.

    Args:
        shard: the shard.
        first: the number of the first entry to read.
        size: the length of the shard; what lies behind it was lost.
    """
    try:
        with shard.with_suffix(INDEX).open("rb") as file:
            file.seek(first * _ENTRY.size)
            lines = file.read()
    except FileNotFoundError:
        return [], True
    found = list[tuple[bytes, Record]]()
    for place in range(0, len(lines) - _ENTRY.size + 1, _ENTRY.size):
        start, key, length, checksum, own = _ENTRY.unpack_from(lines, place)
        if crc32(memoryview(lines)[place : place + _ENTRY.size - _CHECKSUM]) != own:
            return found, False
        if start + length > size:
            break
        found.append((key, Record(shard, start, length, checksum)))
    return found, True


def _scanned(shard: Path, start: int, size: int) -> Iterator[tuple[bytes, Record]]:
    """Yield the keys and records of the whole records in a shard from a place on; what is none is passed over."""
    if start + _HEADER.size > size:
        return
    with shard.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        place = mapped.find(MAGIC, start)
        while 0 <= place <= len(mapped) - _HEADER.size:
            header = mapped[place : place + _HEADER.size]
            _, key, length, checksum, own = _HEADER.unpack(header)
            begin, end = place + _HEADER.size, place + _HEADER.size + length
            is_whole = crc32(header[:-_CHECKSUM]) == own and end <= len(mapped)
            if is_whole and crc32(mapped[begin:end]) == checksum:
                yield key, Record(shard, begin, length, checksum)
                place = mapped.find(MAGIC, end)
            else:
                place = mapped.find(MAGIC, place + 1)


def _sealed(kind: struct.Struct, *values: object) -> bytes:
    """Return a header or an entry with its own checksum at its end."""
    line = kind.pack(*values, 0)[:-_CHECKSUM]
    return line + struct.pack("<I", crc32(line))


def _write(file: int, content: bytes, place: int) -> None:
    """Write bytes at a place of a file, all of them."""
    left = memoryview(content)
    while left:
        written = os.pwrite(file, left, place)
        left, place = left[written:], place + written
