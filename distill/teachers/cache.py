"""A cache of a teacher's answers in a folder or in memory, keyed by a hash of what each answer depends on."""

import json
import warnings
from collections.abc import Mapping, Set
from dataclasses import fields, is_dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from distill.errors import DistillError
from distill.storage.files import CHECKSUM, read_json, write_json
from distill.storage.shards import Shards
from distill.teachers.packing import packed, unpacked

FORMAT = 2
"""1: a file for each entry. 2: records in shards. Folders of the first format stay of that format."""
MAY_BE_UNKNOWN = ("tokenizer", "modules")
"""Facts that are compared only where both sides know them."""
DESCRIPTION = "teacher.json"
BEFORE = dict.fromkeys(("distill.objectives.diito", "distill.interchange.random_vectors"), "distill.objectives.causal")
"""Modules that were renamed or split since the first caches: keys use the old names, by which old answers are found."""
FIELDS_BEFORE = {("Location", "operation"): "source", ("Add", "renormalize"): "renormalise"}
"""Fields that were renamed since the first caches; keys use the old names."""


class Cache:
    """A store of named tensors by key, in a folder or, without one, in memory.

    In a folder the entries of each kind are records in a few large files (`distill.storage.shards`), which several
    processes write and read at once; a damaged one counts as missing, with a warning. Folders of earlier versions, with
    a file for each entry, are read too; what is new is put beside these.

    Args:
        folder: a new or empty one, or one of the same teacher.
        of: what the answers depend on beside the sample.

    Raises:
        DistillError: a folder of another teacher, or with other content.
    """

    def __init__(self, folder: Path | None, of: Mapping[str, Any]) -> None:
        self.folder = folder
        self._memory: dict[str, dict[str, Tensor]] = {}
        self._shards: dict[str, Shards] = {}
        self._before: dict[str, int] = {}
        if folder is not None:
            _open(folder, {"format": FORMAT, **of})
            kinds = [each for each in folder.iterdir() if each.is_dir() and not each.name.startswith(".")]
            self._before = {kind.name: sum(1 for _ in kind.glob("*/*.safetensors")) for kind in kinds}

    def get(self, key: str) -> dict[str, Tensor] | None:
        """Return the entry of a key, None if there is none."""
        if self.folder is None:
            return self._memory.get(key)
        kind, name = _split(key)
        try:
            content = self._of_kind(kind).get(bytes.fromhex(name))
            if content is not None:
                return unpacked(content)
        except (LookupError, ValueError) as damage:
            warnings.warn(f"{damage.args[0]}; the answer is fetched again.", stacklevel=2)
        return self._get_file(kind, name) if self._before.get(kind) else None

    def put(self, key: str, entry: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Store an entry; return it as it was stored, on the CPU."""
        return self.put_all({key: entry})[key]

    def put_all(self, entries: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Store entries of one kind together, all or none; return them as they were stored, on the CPU.

        Raises:
            DistillError: they cannot be written.
        """
        kept = {
            key: {name: value.detach().cpu().contiguous().clone() for name, value in entry.items()}
            for key, entry in entries.items()
        }
        if self.folder is None:
            self._memory |= kept
        elif kept:
            [kind] = {_split(key)[0] for key in kept}
            self._of_kind(kind).put({bytes.fromhex(_split(key)[1]): packed(entry) for key, entry in kept.items()})
        return kept

    def count(self, kind: str) -> int:
        """Return the number of entries of a kind."""
        if self.folder is None:
            return sum(key.startswith(f"{kind}/") for key in self._memory)
        shards = self._of_kind(kind)
        shards.look()
        return len(shards) + self._before.get(kind, 0)

    def _of_kind(self, kind: str) -> Shards:
        assert self.folder is not None
        if kind not in self._shards:
            self._shards[kind] = Shards(self.folder, kind)
        return self._shards[kind]

    def _get_file(self, kind: str, name: str) -> dict[str, Tensor] | None:
        """Return an entry that an earlier version has kept in a file of its own; None if there is none."""
        assert self.folder is not None
        file = self.folder / kind / name[:2] / f"{name}.safetensors"
        try:
            content = file.read_bytes()
        except OSError:
            return None
        entry = _load_entry(content)
        if entry is None:
            warnings.warn(f"{file} is damaged; the answer is fetched again.", stacklevel=3)
        return entry


def _split(key: str) -> tuple[str, str]:
    kind, _, name = key.partition("/")
    return kind, name


def _load_entry(content: bytes) -> dict[str, Tensor] | None:
    """Return the tensors of a file of an earlier version, None if they are damaged; the first had no checksum."""
    try:
        entry = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        checksum = header.get("__metadata__", {}).get(CHECKSUM)
    except (SafetensorError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return entry if checksum is None or checksum == digest(entry) else None


class Unhashable(TypeError):
    """An error for a value whose content cannot be hashed."""


def digest(*parts: Any) -> str:
    """Return a hash of the contents of values.

    Tensors count by dtype, shape and numbers; modules by class, settings and weights.

    Raises:
        Unhashable: a function, or any object but plain data, tensors, modules and dataclasses.
    """
    found = blake2b(digest_size=20)
    for part in parts:
        _add(found, part)
    return found.hexdigest()


def weights_of(state: Mapping[str, Tensor]) -> str:
    """Return a hash of up to 64 numbers of each parameter and buffer, enough to distinguish states of a training."""
    return digest({name: (tuple(value.shape), _take_some(value)) for name, value in state.items()})


def _take_some(value: Tensor) -> Tensor:
    flat = value.detach().flatten()
    return flat[:: max(1, len(flat) // 64)][:64]


def _add(found: Any, part: Any) -> None:
    found.update(f"<{type(part).__name__}>".encode())
    if part is None or isinstance(part, bool | int | float | str | bytes | range | slice | torch.dtype):
        found.update(repr(part).encode())
    elif isinstance(part, Tensor):
        value = part.detach().cpu().contiguous()
        found.update(f"{value.dtype}{list(value.shape)}".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    elif isinstance(part, nn.Module):
        found.update(f"{_module_of(part)}.{type(part).__qualname__}{part!r}".encode())
        _add(found, dict(part.state_dict()))
    elif isinstance(part, Mapping):
        for key in sorted(part, key=str):
            _add(found, key)
            _add(found, part[key])
    elif isinstance(part, list | tuple):
        for each in part:
            _add(found, each)
    elif isinstance(part, Set):
        for each in sorted(map(str, part)):
            _add(found, each)
    elif is_dataclass(part) and not isinstance(part, type):
        found.update(_module_of(part).encode())
        for field in fields(part):
            _add(found, FIELDS_BEFORE.get((type(part).__name__, field.name), field.name))
            _add(found, getattr(part, field.name))
    else:
        raise Unhashable(f"{part!r} has no content that can be hashed")
    found.update(b"</>")


def _module_of(part: Any) -> str:
    return BEFORE.get(type(part).__module__, type(part).__module__)


def _open(folder: Path, of: Mapping[str, Any]) -> None:
    """Create the folder of a cache, or check that it belongs to the same teacher."""
    file, wanted = folder / DESCRIPTION, json.loads(json.dumps(of))
    if not file.exists():
        if folder.exists() and (not folder.is_dir() or any(_is_other(each) for each in folder.iterdir())):
            if file.exists():  # another process has just made it
                return _open(folder, of)
            holds, new = "holds other things than answers of a teacher", folder / "answers"
            if not folder.is_dir():
                holds, new = "is a file", folder.with_name(f"{folder.name}-answers")
            raise DistillError(f"{folder} {holds}; give the cache a new folder: cache={str(new)!r}.")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)  # answers of a teacher are private to the user
            write_json(file, wanted, replacing=False)
        except OSError as error:
            raise DistillError(
                f"the cache {folder} cannot be made ({error.strerror or error}); give a folder that you may write and "
                "that has room: cache='answers'."
            ) from None
    there = read_json(file, f"give the cache a new folder: cache={str(folder) + '-2'!r}", newest=FORMAT)
    names = [name for name in dict.fromkeys([*wanted, *there]) if name != "format"]
    known = [name for name in names if name not in MAY_BE_UNKNOWN or (there.get(name) and wanted.get(name))]
    changed = next((name for name in known if there.get(name) != wanted.get(name)), None)
    if changed is not None:
        raise DistillError(
            f"the cache {folder} holds answers of a teacher with {changed}={there.get(changed)!r}, and this one has "
            f"{changed}={wanted.get(changed)!r}; give it a folder of its own: cache={str(folder) + '-2'!r}."
        )


def _is_other(file: Path) -> bool:
    """Return whether a file belongs to no cache: neither its description nor a file that is being written."""
    return file.name != DESCRIPTION and not file.name.startswith(".")
