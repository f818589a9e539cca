"""Interventions in files: JSON and safetensors in one folder, no pickle and no code.

`interventions.json` says what is written where, and in which model; `tensors.safetensors` holds the tensors of
operators (`operators.i.field`), positions and subspaces (`subspaces.i.parameter`).
"""

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib import metadata
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from interventions.arguments import checked
from interventions.errors import InterventionError
from interventions.execution.run import locations_of
from interventions.locations import Location, as_location
from interventions.models.architectures import architecture
from interventions.models.wrappers import Model, module_of
from interventions.operators import Operator
from interventions.positions import Positions, check_positions
from interventions.saving.encodings import (
    decoded,
    decoded_operator,
    decoded_subspace,
    encoded,
    encoded_operator,
    encoded_subspace,
)
from interventions.steps import Steps, parse_steps

FORMAT = 1
DESCRIPTION, TENSORS, CHECKSUMS = "interventions.json", "tensors.safetensors", "checksums"


@dataclass(frozen=True, eq=False)
class Saved:
    """What `load` found, under the names that `intervene` gives it.

    Attributes:
        at: {Location: operator}, or the locations alone where they were saved without operators.
        positions: as they were given to `save`.
        steps: as they were given to `save`.
    """

    at: dict[Location, Operator] | tuple[Location, ...]
    positions: Positions | dict[Location, Positions] = None
    steps: Steps = None


@checked
def save(
    folder: str | Path,
    interventions: Mapping[Location, Operator] | Iterable[Location] | Location,
    *,
    model: Model,
    positions: Positions | Mapping[Location, Positions] = None,
    steps: Steps = None,
    overwrite: bool = False,
) -> Path:
    """Write interventions to a new folder, all of it or nothing.

    Args:
        folder: where; its parents are made.
        interventions: {Location: operator}, or locations alone, e.g. to keep their learned subspaces.
        model: the model that they belong to; `load` compares what it knows of it.
        positions: which tokens to write, or {Location: positions}.
        steps: which steps of a generation.
        overwrite: replace what an earlier `save` wrote there.

    Returns:
        The folder.

    Raises:
        InterventionError: the folder exists, a location is not in the model, or an operator or subspace is code of
            one's own.

    >>> import tempfile, torch
    >>> from interventions import Add, intervene
    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> folder = Path(tempfile.mkdtemp()) / "steering"
    >>> sorted(file.name for file in save(folder, {Location(module="0"): Add(torch.ones(2))}, model=net).iterdir())
    ['interventions.json', 'tensors.safetensors']
    >>> saved = load(folder, net)
    >>> with intervene(net, saved.at, positions=saved.positions, steps=saved.steps):
    ...     output = net(torch.zeros(3, 2))
    """
    folder = Path(folder)
    _check_free(folder, overwrite)
    ops = _operators_of(interventions)
    found, tensors = architecture(model), dict[str, Tensor]()
    for location in ops:
        found.place(location)
    modules: list[Any] = list(dict.fromkeys(location.subspace for location in ops if location.subspace is not None))
    if isinstance(positions, Mapping) and not positions:
        raise InterventionError("positions={} names no location; write {Location(3): positions}, or leave it out.")
    each = _positions_of(positions, ops) if isinstance(positions, Mapping) else [positions]
    for one in each:
        check_positions(one)
    steps = tuple(steps) if isinstance(steps, Iterator) else steps
    parse_steps(steps)
    description = {
        "format": FORMAT,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
        "model": _facts(model),
        "positions": encoded(each if isinstance(positions, Mapping) else positions, "positions", tensors),
        "has_positions_of_each": isinstance(positions, Mapping),
        "steps": encoded(steps, "steps", tensors),
        "subspaces": [encoded_subspace(module, f"subspaces.{i}", tensors) for i, module in enumerate(modules)],
        "interventions": [
            {
                "location": str(replace(location, subspace=None)),
                "subspace": None if location.subspace is None else modules.index(location.subspace),
                "operator": None if op is None else encoded_operator(op, location, f"operators.{i}", tensors),
            }
            for i, (location, op) in enumerate(ops.items())
        ],
    }
    # Copies, as safetensors refuses tensors that share memory.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    _write(folder, description, safetensors.torch.save(copies))
    return folder


@checked
def load(folder: str | Path, model: Model, *, subspaces: Mapping[str, nn.Module] | None = None) -> Saved:
    """What `save` wrote, for a model of the same type and shape; subspaces in their mode, on the device of their place.

    Args:
        folder: as given to `save`.
        model: the model, or another of its type, depth and width.
        subspaces: modules for those that hold code (a `SparseCoder`, or a class of one's own), by the text of one of
            their locations: `{"mlp_output.1": SparseCoder(encode, decode)}`. What was saved is loaded into them.

    Raises:
        InterventionError: no such folder, a newer format, a model that does not fit, or a class that is not known here.
    """
    folder = Path(folder)
    description, tensors = _read(folder)
    try:
        return _loaded(folder, description, tensors, model, subspaces or {})
    except InterventionError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise _damaged(folder / DESCRIPTION, error) from None


def _loaded(
    folder: Path,
    description: dict[str, Any],
    tensors: Mapping[str, Tensor],
    model: Model,
    subspaces: Mapping[str, nn.Module],
) -> Saved:
    """What the two files say."""
    entries = description["interventions"]
    places = [Location.parse(entry["location"]) for entry in entries]
    _check_model(description["model"], places, model, folder)
    modules = _subspaces(description, places, tensors, model, subspaces)
    at = [
        place if entry["subspace"] is None else replace(place, subspace=modules[entry["subspace"]])
        for place, entry in zip(places, entries, strict=True)
    ]
    positions, steps = (decoded(description[name], tensors) for name in ("positions", "steps"))
    if description["has_positions_of_each"]:
        positions = dict(zip(at, positions, strict=True))
    if entries[0]["operator"] is None:
        return Saved(tuple(at), positions, steps)
    ops = [decoded_operator(entry["operator"], place, tensors) for entry, place in zip(entries, places, strict=True)]
    return Saved(dict(zip(at, ops, strict=True)), positions, steps)


def _operators_of(
    interventions: Mapping[Location, Operator] | Iterable[Location] | Location,
) -> dict[Location, Operator | None]:
    if isinstance(interventions, Mapping):
        ops: dict[Location, Operator | None] = {as_location(place): op for place, op in interventions.items()}
    else:
        ops = dict.fromkeys(locations_of(interventions))
    if not ops:
        raise InterventionError("save was given no locations; write save(folder, {Location(3): op}, model=model).")
    return ops


def _positions_of(positions: Mapping[Location, Positions], ops: Mapping[Location, Any]) -> list[Positions]:
    """The positions of each location; None, all tokens, for one that is not named."""
    each = {as_location(place): value for place, value in positions.items()}
    if each.keys() - ops.keys():
        unused = next(iter(each.keys() - ops.keys()))
        raise InterventionError(f"positions for {unused} were given and nothing is written there; leave them out.")
    return [each.get(location) for location in ops]


def _subspaces(
    description: dict[str, Any],
    places: list[Location],
    tensors: Mapping[str, Tensor],
    model: Model,
    given: Mapping[str, nn.Module],
) -> list[nn.Module]:
    """The modules of the saved subspaces, with what was saved in them."""
    numbers = [entry["subspace"] for entry in description["interventions"]]
    own: dict[int, nn.Module] = {}
    for text, module in given.items():
        number = next((n for place, n in zip(places, numbers, strict=True) if place == as_location(text)), None)
        if number is None:
            raise InterventionError(f"subspaces names {text} and no subspace was saved there; leave it out.")
        if module in own.values():
            raise InterventionError(f"one {type(module).__name__} is given for two subspaces; make one for each.")
        own[number] = module
    modules = []
    for number, saved in enumerate(description["subspaces"]):
        place, prefix = places[numbers.index(number)], f"subspaces.{number}."
        state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        module = decoded_subspace(saved, state, own.get(number), place)
        nearby = chain(architecture(model).place(place).module.parameters(), module_of(model).parameters())
        modules.append(module.to(next((parameter.device for parameter in nearby), None)))
        _set_modes(module, saved)
    return modules


def _set_modes(module: nn.Module, saved: dict[str, Any]) -> None:
    """Train or eval mode, as they were saved, of a subspace and of those that it is within."""
    module.train(saved["training"])
    inner = getattr(module, "within", None)
    if isinstance(inner, nn.Module) and saved.get("within"):
        _set_modes(inner, saved["within"])


def _facts(model: Model) -> dict[str, Any]:
    """What a model is known by."""
    config = getattr(model, "config", None)
    sizes = {name: getattr(config, name, None) for name in ("hidden_size", "num_attention_heads")}
    return {
        "type": getattr(config, "model_type", None) or type(model).__name__,
        **{name: size if isinstance(size, int) else None for name, size in sizes.items()},
        "layers": {stack.name: len(stack.blocks) for stack in architecture(model).stacks},
    }


def _check_model(saved: dict[str, Any], places: list[Location], model: Model, folder: Path) -> None:
    here = _facts(model)
    for name, value in here.items():
        if saved[name] != value:
            raise InterventionError(
                f"{folder} does not fit this model: it was saved for one whose {name} is {saved[name]!r}, and that of "
                f"this one is {value!r}; load it into such a model."
            )
    for place in places:
        architecture(model).place(place)


def _check_free(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / DESCRIPTION).is_file():
        raise InterventionError(f"{folder} exists and holds no saved interventions; choose another folder.")
    if not overwrite:
        raise InterventionError(f"{folder} holds saved interventions; choose another, or write overwrite=True.")


def _write(folder: Path, description: Mapping[str, Any], tensors: bytes) -> None:
    """Both files into a folder beside, which then takes the name: what fails half way leaves the old folder."""
    checked = {**description, CHECKSUMS: {TENSORS: sha256(tensors).hexdigest(), DESCRIPTION: _checksum(description)}}
    text = json.dumps(checked, indent=2, ensure_ascii=False)
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=".saving-") as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        new.mkdir()
        (new / TENSORS).write_bytes(tensors)
        (new / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
        for file in new.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Both files, compared with their checksums; those of earlier versions have none, which is said."""
    if not (folder / DESCRIPTION).is_file():
        raise InterventionError(
            f"{folder} holds no saved interventions: there is no {DESCRIPTION}; write them with save(folder, …)."
        )
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        number = description["format"]
        newer = number > FORMAT
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise _damaged(folder / DESCRIPTION, error) from None
    if newer:
        raise InterventionError(
            f"{folder} is of format {number} and this version reads up to {FORMAT}; upgrade: pip install -U "
            "causal-distillation."
        )
    told = description.pop(CHECKSUMS, None)
    if told is None:
        warnings.warn(
            f"{folder / DESCRIPTION} was written by an earlier version, without checksums, and is not checked.",
            stacklevel=3,
        )
    elif not isinstance(told, dict) or told.get(DESCRIPTION) != _checksum(description):
        raise _damaged(folder / DESCRIPTION, "its content is not what was written: checksum")
    try:
        content = (folder / TENSORS).read_bytes()
        if told is not None and told.get(TENSORS) != sha256(content).hexdigest():
            raise _damaged(folder / TENSORS, "its content is not what was written: checksum")
        return description, safetensors.torch.load(content)
    except (OSError, safetensors.SafetensorError) as error:
        raise _damaged(folder / TENSORS, error) from None


def _damaged(file: Path, why: object) -> InterventionError:
    told = " ".join(f"{type(why).__name__}: {why}".split()) if isinstance(why, Exception) else why
    return InterventionError(f"{file} is damaged ({told}); save the interventions again: save(folder, …).")


def _checksum(description: Mapping[str, Any]) -> str:
    plain = {name: value for name, value in description.items() if name != CHECKSUMS}
    return sha256(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
