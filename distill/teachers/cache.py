"""Teacher outputs on disk, keyed by sample: what was fetched once is not fetched again."""

import json
import warnings
from collections.abc import Mapping, Set
from dataclasses import fields, is_dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from distill.errors import DistillError
from distill.storage.files import CHECKSUM, read_json, write, write_json

FORMAT = 1
OF_WHOM = "teacher.json"
BEFORE = {"distill.objectives.diito": "distill.objectives.causal"}
"""Where classes that keys name stood when the first keys were made; what was kept under these is found again."""
FIELDS_BEFORE = {("Location", "operation"): "source", ("Add", "renormalize"): "renormalise"}
"""What fields were called when the first keys were made."""


class Cache:
    """Named tensors by key, in a folder or, without one, in memory.

    In a folder each entry is a file of its own, written beside its place and moved there, so that no other process and
    no later run sees half of one, with a checksum; one that is damaged all the same counts as none, which is said.

    Args:
        folder: a new or empty one, or one of the same teacher.
        of: what the answers depend on, beside the sample.

    Raises:
        DistillError: a folder of another teacher, or of something else.
    """

    def __init__(self, folder: Path | None, of: Mapping[str, Any]) -> None:
        self.folder = folder
        self._memory: dict[str, dict[str, Tensor]] = {}
        if folder is not None:
            _open(folder, {"format": FORMAT, **of})

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The entry of a key, None where there is none."""
        if self.folder is None:
            return self._memory.get(key)
        file = self._file(key)
        try:
            content = file.read_bytes()
        except OSError:
            return None
        entry = _whole(content)
        if entry is None:
            warnings.warn(f"{file} is damaged; the answer is fetched again.", stacklevel=2)
        return entry

    def put(self, key: str, entry: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keep an entry; returns what was kept."""
        kept = {name: value.detach().cpu().contiguous().clone() for name, value in entry.items()}
        if self.folder is None:
            self._memory[key] = kept
            return kept
        file = self._file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, save(kept, metadata={CHECKSUM: digest(kept)}), durable=False)  # else it is fetched again
        return kept

    def count(self, kind: str) -> int:
        """How many entries of a kind there are."""
        if self.folder is None:
            return sum(key.startswith(f"{kind}/") for key in self._memory)
        return sum(1 for _ in (self.folder / kind).glob("*/*.safetensors"))

    def _file(self, key: str) -> Path:
        kind, _, name = key.partition("/")
        assert self.folder is not None
        return self.folder / kind / name[:2] / f"{name}.safetensors"


def _whole(content: bytes) -> dict[str, Tensor] | None:
    """The tensors of an entry, None where they are not what was written; those of earlier versions have no checksum."""
    try:
        entry = load(content)
        told = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {}).get(CHECKSUM)
    except (SafetensorError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return entry if told is None or told == digest(entry) else None


class Unhashable(TypeError):
    """A value whose content cannot be told."""


def digest(*parts: Any) -> str:
    """A hash of the contents of values: tensors by dtype, shape and numbers; modules by class, settings and weights.

    Raises:
        Unhashable: a function, or an object that is none of plain data, tensors, modules and dataclasses.
    """
    found = blake2b(digest_size=20)
    for part in parts:
        _add(found, part)
    return found.hexdigest()


def weights_of(network: nn.Module) -> str:
    """A hash of up to 64 numbers of each parameter and buffer, enough to tell one training state from another."""
    return digest({name: (tuple(value.shape), _some(value)) for name, value in network.state_dict().items()})


def _some(value: Tensor) -> Tensor:
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
        raise Unhashable(f"{part!r} has no content that can be told")
    found.update(b"</>")


def _module_of(part: Any) -> str:
    return BEFORE.get(type(part).__module__, type(part).__module__)


def _open(folder: Path, of: Mapping[str, Any]) -> None:
    told, wanted = folder / OF_WHOM, json.loads(json.dumps(of))
    if not told.exists():
        if folder.exists() and (not folder.is_dir() or any(_is_other(each) for each in folder.iterdir())):
            raise DistillError(
                f"{folder} holds other things than answers of a teacher; give the cache a new folder: "
                f"cache={str(folder / 'answers')!r}."
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)  # what a teacher answered is its owner's
        write_json(told, wanted, replacing=False)
    there = read_json(told, f"give the cache a new folder: cache={str(folder) + '-2'!r}")
    changed = next((name for name in [*wanted, *there] if there.get(name) != wanted.get(name)), None)
    if changed is not None:
        raise DistillError(
            f"the cache {folder} holds answers of a teacher with {changed}={there.get(changed)!r}, and this one has "
            f"{changed}={wanted.get(changed)!r}; give it a folder of its own: cache={str(folder) + '-2'!r}."
        )


def _is_other(file: Path) -> bool:
    """Whether it is nothing that another process, which opens the same cache now, has just written."""
    return file.name != OF_WHOM and not file.name.startswith(".")
