"""Adapters of peft, which are saved with the model under them where that is not the one that they name."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

ADAPTERS = "adapter_config.json"
BASE = "base"
"""The folder of the model under adapters, beside them."""
_NAMED = "base_model_name_or_path"
_ORIGINAL = ".original_module."


def save_base(model: Any, folder: Path, place: Path) -> None:
    """Save the model under adapters beside them, unless it is the one that they name, and name it in their files.

    Adapters name the model from which a student was made: the teacher, where it has some of the teacher's layers, on
    which they would compute something else without an error.

    Args:
        model: a model with adapters, which are saved in the folder; of any other nothing is saved.
        folder: holds the adapters.
        place: where the folder will lie in the end.
    """
    files = list(folder.rglob(ADAPTERS))
    base = model.get_base_model() if files and hasattr(model, "get_base_model") else None
    if base is None or not hasattr(base, "save_pretrained"):
        return
    settings = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    if all(each.get(_NAMED) and _is_saved(base, model, str(each[_NAMED])) for each in settings):
        return
    own = {name.replace(_ORIGINAL, "."): tensor for name, tensor in _own_weights(base, model)}
    if own.keys() == _names_of(base):
        base.save_pretrained(folder / BASE, state_dict=own)
    else:  # another kind of adapters, whose parts have other names
        copy.deepcopy(model).unload().save_pretrained(folder / BASE)
    for file, each in zip(files, settings, strict=True):
        file.write_text(json.dumps({**each, _NAMED: str((place / BASE).resolve())}, indent=2), encoding="utf-8")


def _own_weights(base: Any, model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield name and values of each weight of the model under adapters, without those of the adapters.

    A module that is trained and saved with the adapters keeps its former weights under the name `original_module`.
    """
    prefix = getattr(model.base_model, "prefix", None)
    for name, tensor in base.state_dict().items():
        parts = name.split(".")
        if "modules_to_save" not in parts and not (prefix and any(part.startswith(prefix) for part in parts)):
            yield name.replace(".base_layer.", "."), tensor


def _names_of(base: Any) -> set[str]:
    """Return the names of the weights of a model of this class and configuration."""
    with torch.device("meta"):
        return set(type(base)(copy.deepcopy(base.config)).state_dict())


def _is_saved(base: Any, model: Any, named: str) -> bool:
    """Return whether the model that adapters name, in a folder or from the hub, has the weights of the one under them.

    Weights that are quantized in memory are not compared, and neither are those that the adapters hold themselves.
    """
    settings = _found(named, "config.json")
    if settings is None or not _agree(json.loads(Path(settings).read_text(encoding="utf-8")), base.config.to_dict()):
        return False  # of another size
    saved: dict[str, str] = {}
    for file in _files_of(named):
        with safe_open(file, "pt") as opened:
            saved.update(dict.fromkeys(opened.keys(), file))
    seen: set[int] = set()
    wanted: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _own_weights(base, model):
        if _ORIGINAL in name or not tensor.is_floating_point():
            continue
        inner = name.removeprefix(f"{getattr(base, 'base_model_prefix', '')}.")
        found = next((each for each in (name, inner) if each in saved), None)
        if found is not None:
            wanted.setdefault(saved[found], {})[found] = tensor
            seen.add(tensor.data_ptr())
    others = (t for n, t in _own_weights(base, model) if _ORIGINAL not in n and t.is_floating_point())
    return all(each.data_ptr() in seen for each in others) and all(map(_holds, wanted, wanted.values()))


def _holds(file: str, weights: dict[str, Tensor]) -> bool:
    """Return whether a file holds these values, up to their dtype."""
    with safe_open(file, "pt") as opened:
        return all(
            list(opened.get_slice(name).get_shape()) == list(each.shape)
            and torch.equal(opened.get_tensor(name).to(each), each)
            for name, each in weights.items()
        )


def _agree(one: Any, other: Any) -> bool:
    """Return whether two configurations hold the same whole numbers, as far as both hold them, but for token ids."""
    if isinstance(one, dict) and isinstance(other, dict):
        return all(_agree(one[key], other[key]) for key in one.keys() & other.keys() if not key.endswith("token_id"))
    return one == other or not (type(one) is int and type(other) is int)


def _files_of(named: str) -> list[str]:
    """Return the files of weights of a saved model, those that are on this machine."""
    whole, index = _found(named, "model.safetensors"), _found(named, "model.safetensors.index.json")
    if whole is not None or index is None:
        return [] if whole is None else [whole]
    parts = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    return [found for part in parts if (found := _found(named, part)) is not None]


def _found(named: str, file: str) -> str | None:
    """Return a file of a saved model, in a folder or in the cache of the hub; None if it is not on this machine."""
    from transformers.utils.hub import cached_file

    try:
        return cached_file(
            named, file, local_files_only=True, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
    except (OSError, ValueError):
        return None
