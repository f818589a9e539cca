"""Data sets of Hugging Face as columns: small ones in memory, large ones read from Arrow when they are used.

Columns of one number a row are always in memory. A table that lies in files is mapped into memory by `datasets`; the
pages of it that were read are let go again, so that a training does not come to hold the whole file.
"""

import mmap
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from ctypes import CDLL, c_int, c_size_t, c_void_p
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from distill.data.sources.lazy_columns import CHUNK, LazyColumn, Values

IN_MEMORY = 16 * 2**20
"""The bytes of the columns of a data set up to which they are read into memory, where indexing them is faster."""
LABELS = ("label", "labels")
AROUND = 2**16
"""The bytes around a value that the system maps with it."""
LET_GO = 32 * 2**20
"""The bytes of mapped files after which they are let go."""


def columns_of_hugging_face(data: Any) -> dict[str, Any]:
    """Return the columns of a data set of Hugging Face: tensors, labels of text, and columns of what is no number."""
    chosen = list(data.format["columns"] or data.column_names)
    types = {name: data.features.arrow_schema.field(name).type for name in chosen}
    store = ArrowStore(data)
    single: dict[str, Any] = {}
    for name in chosen:
        if _is_number(types[name]) or (name in LABELS and _is_text(types[name])):
            single[name] = _single(store, name)
        elif is_textual(data.features[name]):
            single[name] = OtherColumn(store, name)
    rest = [name for name in chosen if name not in single]
    whole = data.data.nbytes * len(data) / max(1, data.data.num_rows)
    if not rest or whole <= IN_MEMORY:
        read = data.with_format("torch", columns=rest)[:] if rest else {}
    else:
        read = {name: LazyColumn(store, name) for name in rest}
    store.let_go()
    return {name: single[name] if name in single else read[name] for name in chosen}


def is_textual(feature: Any) -> bool:
    """Return whether a feature of a data set is of texts, bytes, or records, which are no numbers."""
    if isinstance(feature, dict | list | tuple):
        return True
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return is_textual(inner)
    dtype = getattr(feature, "dtype", None)
    return type(feature).__name__ == "Value" and any(word in str(dtype) for word in ("string", "binary", "null"))


@dataclass(frozen=True, eq=False)
class OtherColumn(Sequence[Any]):
    """A column of texts or records, which are read when they are used.

    Attributes:
        store: holds the rows.
        name: the name of the column.
    """

    store: "ArrowStore"
    name: str

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, place: Any) -> Any:
        places = range(len(self))[place]
        found = self._values([places] if isinstance(places, int) else list(places))
        return found[0] if isinstance(places, int) else found

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self), CHUNK):
            yield from self._values(list(range(start, min(start + CHUNK, len(self)))))

    def _values(self, places: list[int]) -> list[Any]:
        return self.store.data.with_format(None, columns=[self.name])[places][self.name]


@dataclass(frozen=True, eq=False)
class ArrowStore:
    """The rows of a data set of Hugging Face, by random access to its Arrow table.

    Attributes:
        data: the data set.
    """

    data: Any
    _read: list[int] = field(default_factory=lambda: [0])

    def __len__(self) -> int:
        return len(self.data)

    def read(self, names: Sequence[str], numbers: Int[Tensor, " rows"]) -> dict[str, Values]:
        """Return these columns of these rows: integers as int64, real numbers as float32."""
        table = self._rows(names, numbers.tolist())
        found: dict[str, Values] = {}
        for name in names:
            array = table.column(name).combine_chunks()
            if _is_plain(array):
                found[name] = _rows_of(array)
            else:  # nested lists, images and missing values are decoded by datasets
                found[name] = self.data.with_format("torch", columns=[name])[numbers.tolist()][name]
        self._let_go(len(numbers) * len(names) * AROUND)
        return found

    def column(self, name: str) -> Any:
        """Return a whole column as an Arrow array."""
        found = self._rows([name], slice(None)).column(name)
        return found.combine_chunks() if found.num_chunks != 1 else found.chunk(0)

    def lengths(self, name: str) -> Int[Tensor, " rows"] | None:
        """Return the number of values in each row of a column of lists; None for others."""
        import pyarrow as pa
        from pyarrow import compute

        kind = self.data.features.arrow_schema.field(name).type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            return None
        parts = self._rows([name], slice(None)).column(name).chunks
        found = np.concatenate([compute.list_value_length(part).to_numpy(zero_copy_only=False) for part in parts])
        self.let_go()
        return None if found.dtype.kind == "f" else torch.from_numpy(found.astype(np.int64))

    def _rows(self, names: Sequence[str], chosen: Any) -> Any:
        """Return rows of some columns as an Arrow table."""
        return self.data.with_format("arrow", columns=list(names))[chosen]

    def _let_go(self, touched: int) -> None:
        """Let the mapped files go once so many bytes were touched."""
        self._read[0] += touched
        if self._read[0] > LET_GO:
            self.let_go()

    def let_go(self) -> None:
        """Let the mapped files go now; what is read of them later is mapped again."""
        self._read[0] = 0
        for start, size in self._mapped:
            _advise(start, size)

    @cached_property
    def _mapped(self) -> list[tuple[int, int]]:
        """The address and size of each file of the table that is mapped into memory for reading."""
        files = {str(Path(each["filename"]).resolve()) for each in getattr(self.data, "cache_files", None) or ()}
        found = []
        if files and sys.platform == "linux":
            with suppress(OSError, ValueError):
                for line in Path("/proc/self/maps").read_text().splitlines():
                    span, rights, _, _, _, *path = line.split(None, 5)
                    if path and path[0] in files and rights.startswith("r-"):
                        start, end = (int(each, 16) for each in span.split("-"))
                        found.append((start, end - start))
        return found


def _advise(start: int, size: int) -> None:
    """Let go of the pages of a mapped file that is only read; they are mapped again when they are next used."""
    CDLL(None).madvise(c_void_p(start), c_size_t(size), c_int(mmap.MADV_DONTNEED))


def _single(store: ArrowStore, name: str) -> Any:
    """Return a column of one number a row as a tensor, or of one text a row as a list."""
    array = store.column(name)
    if _is_text(array.type):
        encoded = array.dictionary_encode()
        texts = [*encoded.dictionary.to_pylist(), None]  # each text once, however many rows have it
        places = encoded.indices.fill_null(len(texts) - 1).to_numpy(zero_copy_only=False)
        return [texts[place] for place in places.tolist()]
    if array.null_count:
        return store.data.with_format("torch", columns=[name])[:][name]
    return _rows_of(array)


def _rows_of(array: Any) -> Values:
    """Return an Arrow array of numbers as a tensor, or of lists of numbers as one tensor a row."""
    if _is_number(array.type):
        return _numbers(array)
    flat = _numbers(array.flatten())
    return list(flat.split(np.diff(array.offsets.to_numpy()).tolist()))


def _numbers(array: Any) -> Tensor:
    """Return an Arrow array of numbers as a tensor in the dtypes that datasets gives to torch."""
    values = array.to_numpy(zero_copy_only=False)
    kinds = {"i": np.int64, "u": np.int64, "f": np.float32}
    return torch.from_numpy(np.array(values, dtype=kinds.get(values.dtype.kind, values.dtype)))


def _is_plain(array: Any) -> bool:
    """Return whether an Arrow array holds a number or a list of numbers in each row, none of them missing."""
    import pyarrow as pa

    if array.null_count:
        return False
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return _is_number(array.type.value_type) and not array.flatten().null_count
    return _is_number(array.type)


def _is_number(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
