"""`save` and `load`: interventions as one folder of JSON and safetensors, without pickle and without code.

`interventions.json` lists the locations with their operators, positions and steps, and what the model is known by;
`tensors.safetensors` holds the tensors of operators (`operators.i.field`), positions and subspaces
(`subspaces.i.parameter`).
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
    decode,
    decode_operator,
    decode_subspace,
    encode,
    encode_operator,
    encode_subspace,
)
from interventions.steps import Steps, parse_steps

FORMAT = 1
DESCRIPTION, TENSORS, CHECKSUMS = "interventions.json", "tensors.safetensors", "checksums"


@dataclass(frozen=True, eq=False)
class Saved:
    """Loaded interventions, under the names of the arguments of `intervene`.

    Attributes:
        at: {Location: operator}, or the locations alone if they were saved without operators.
        positions: the positions that were passed to `save`.
        steps: the steps that were passed to `save`.
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
    """Write interventions to a new folder, completely or not at all.

    Args:
        folder: the folder to create; its parents are created too.
        interventions: {Location: operator}, or locations alone, e.g. to save their learned subspaces.
        model: the model that they belong to. Its type, depth and width are saved, and `load` compares them.
        positions: which tokens to write, as in `intervene`, or {Location: positions}.
        steps: which steps of a generation, as in `intervene`.
        overwrite: replace what an earlier `save` wrote to this folder.

    Returns:
        The folder.

    Raises:
        InterventionError: the folder exists, a location is not in the model, or an operator or subspace is code of
            the user's own.

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
    by_location = _positions_of(positions, ops) if isinstance(positions, Mapping) else [positions]
    for each in by_location:
        check_positions(each)
    steps = tuple(steps) if isinstance(steps, Iterator) else steps
    parse_steps(steps)
    description = {
        "format": FORMAT,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
        "model": _facts(model),
        "positions": encode(by_location if isinstance(positions, Mapping) else positions, "positions", tensors),
        "has_positions_of_each": isinstance(positions, Mapping),
        "steps": encode(steps, "steps", tensors),
        "subspaces": [encode_subspace(module, f"subspaces.{i}", tensors) for i, module in enumerate(modules)],
        "interventions": [
            {
                "location": str(replace(location, subspace=None)),
                "subspace": None if location.subspace is None else modules.index(location.subspace),
                "operator": None if op is None else encode_operator(op, location, f"operators.{i}", tensors),
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
    """Return the interventions that `save` wrote, for a model of the same type, depth and width.

    Subspaces are in the mode (train or eval) in which they were saved, on the device of their location.

    Args:
        folder: the folder that was passed to `save`.
        model: the model, or another of its type, depth and width.
        subspaces: modules for the subspaces that hold code (a `SparseCoder`, or a class of one's own), by the text of
            one of their locations: `{"mlp_output.1": SparseCoder(encode, decode)}`. The saved state is loaded into
            them.

    Returns:
        `Saved`, whose fields are arguments of `intervene`; the example of `save` shows it.

    Raises:
        InterventionError: no such folder, a damaged file, a newer format, a model that does not fit, or a class that
            does not exist here.
    """
    folder = Path(folder)
    description, tensors = _read(folder)
    try:
        return _build(folder, description, tensors, model, subspaces or {})
    except InterventionError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise _damaged(folder / DESCRIPTION, error) from None


def _build(
    folder: Path,
    description: dict[str, Any],
    tensors: Mapping[str, Tensor],
    model: Model,
    subspaces: Mapping[str, nn.Module],
) -> Saved:
    """Build what the contents of the two files describe."""
    entries = description["interventions"]
    places = [Location.parse(entry["location"]) for entry in entries]
    _check_model(description["model"], places, model, folder)
    modules = _subspaces(description, places, tensors, model, subspaces)
    at = [
        place if entry["subspace"] is None else replace(place, subspace=modules[entry["subspace"]])
        for place, entry in zip(places, entries, strict=True)
    ]
    positions, steps = (decode(description[name], tensors) for name in ("positions", "steps"))
    if description["has_positions_of_each"]:
        positions = dict(zip(at, positions, strict=True))
    if entries[0]["operator"] is None:
        return Saved(tuple(at), positions, steps)
    ops = [decode_operator(entry["operator"], place, tensors) for entry, place in zip(entries, places, strict=True)]
    return Saved(dict(zip(at, ops, strict=True)), positions, steps)


def _operators_of(
    interventions: Mapping[Location, Operator] | Iterable[Location] | Location,
) -> dict[Location, Operator | None]:
    """Return {location: operator}, with None for locations that were passed alone."""
    if isinstance(interventions, Mapping):
        ops: dict[Location, Operator | None] = {as_location(place): op for place, op in interventions.items()}
    else:
        ops = dict.fromkeys(locations_of(interventions))
    if not ops:
        raise InterventionError("save was given no locations; write save(folder, {Location(3): op}, model=model).")
    return ops


def _positions_of(positions: Mapping[Location, Positions], ops: Mapping[Location, Any]) -> list[Positions]:
    """Return the positions of each location in order; None, all tokens, for locations that are not named."""
    named = {as_location(place): value for place, value in positions.items()}
    if named.keys() - ops.keys():
        unused = next(iter(named.keys() - ops.keys()))
        raise InterventionError(f"positions for {unused} were given and nothing is written there; leave them out.")
    return [named.get(location) for location in ops]


def _subspaces(
    description: dict[str, Any],
    places: list[Location],
    tensors: Mapping[str, Tensor],
    model: Model,
    given: Mapping[str, nn.Module],
) -> list[nn.Module]:
    """Return the saved subspaces as modules with their state, in the order of the file."""
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
        module = decode_subspace(saved, state, own.get(number), place)
        nearby = chain(architecture(model).place(place).module.parameters(), module_of(model).parameters())
        modules.append(module.to(next((parameter.device for parameter in nearby), None)))
        _set_modes(module, saved)
    return modules


def _set_modes(module: nn.Module, saved: dict[str, Any]) -> None:
    """Set the saved mode, train or eval, of a subspace and of those that it is within."""
    module.train(saved["training"])
    inner = getattr(module, "within", None)
    if isinstance(inner, nn.Module) and saved.get("within"):
        _set_modes(inner, saved["within"])


def _facts(model: Model) -> dict[str, Any]:
    """Return what identifies a model: its type, widths and numbers of blocks."""
    config = getattr(model, "config", None)
    sizes = {name: getattr(config, name, None) for name in ("hidden_size", "num_attention_heads")}
    return {
        "type": getattr(config, "model_type", None) or type(model).__name__,
        **{name: size if isinstance(size, int) else None for name, size in sizes.items()},
        "layers": {stack.name: len(stack.blocks) for stack in architecture(model).stacks},
    }


def _check_model(saved: dict[str, Any], places: list[Location], model: Model, folder: Path) -> None:
    """Raise InterventionError for a model that differs from the saved one, or lacks one of the places."""
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
    """Raise InterventionError if the folder holds anything that may not be replaced."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / DESCRIPTION).is_file():
        raise InterventionError(f"{folder} exists and holds no saved interventions; choose another folder.")
    if not overwrite:
        raise InterventionError(f"{folder} holds saved interventions; choose another, or write overwrite=True.")


def _write(folder: Path, description: Mapping[str, Any], tensors: bytes) -> None:
    """Write both files to a folder beside the target and rename it, so that a failure leaves the old folder."""
    checksums = {TENSORS: sha256(tensors).hexdigest(), DESCRIPTION: _checksum(description)}
    text = json.dumps({**description, CHECKSUMS: checksums}, indent=2, ensure_ascii=False)
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
    """Read both files and compare their checksums, or warn if an earlier version wrote them, without any.

    Raises:
        InterventionError: the folder holds no interventions, a newer format, or a file whose content has changed.
    """
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
    checksums = description.pop(CHECKSUMS, None)
    if checksums is None:
        warnings.warn(
            f"{folder / DESCRIPTION} was written by an earlier version, without checksums, and is not checked.",
            stacklevel=3,
        )
    elif not isinstance(checksums, dict) or checksums.get(DESCRIPTION) != _checksum(description):
        raise _damaged(folder / DESCRIPTION, "its content is not what was written: checksum")
    try:
        content = (folder / TENSORS).read_bytes()
        if checksums is not None and checksums.get(TENSORS) != sha256(content).hexdigest():
            raise _damaged(folder / TENSORS, "its content is not what was written: checksum")
        return description, safetensors.torch.load(content)
    except (OSError, safetensors.SafetensorError) as error:
        raise _damaged(folder / TENSORS, error) from None


def _damaged(file: Path, why: object) -> InterventionError:
    """Return the error for a file that cannot be read; `why` is an exception or a reason."""
    reason = " ".join(f"{type(why).__name__}: {why}".split()) if isinstance(why, Exception) else why
    return InterventionError(f"{file} is damaged ({reason}); save the interventions again: save(folder, …).")


def _checksum(description: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the description without its checksums."""
    plain = {name: value for name, value in description.items() if name != CHECKSUMS}
    return sha256(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
