"""Interventions in files: JSON and safetensors in one folder, no pickle and no code.

`interventions.json` says what is written where, and in which model; `tensors.safetensors` holds the tensors of
operators (`operators.i.field`) and subspaces (`subspaces.i.parameter`).
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from interventions import operators
from interventions.architectures import Architecture, architecture
from interventions.errors import InterventionError
from interventions.locations import Location, as_location
from interventions.operators import Operator
from interventions.positions import Positions
from interventions.steps import Steps
from interventions.subspaces import PCA, BoundlessRotation, Mask, Rotation, SparseCoder, Subspace

FORMAT = 1
DESCRIPTION, TENSORS = "interventions.json", "tensors.safetensors"
OPERATORS: dict[str, Any] = {
    name: kind for name, kind in vars(operators).items() if isinstance(kind, type) and is_dataclass(kind)
}
SUBSPACES: dict[str, Any] = {kind.__name__: kind for kind in (Rotation, BoundlessRotation, Mask, PCA)}


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


def save(
    folder: str | Path,
    interventions: Mapping[Location, Operator] | Iterable[Location] | Location,
    *,
    model: nn.Module,
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

    >>> import tempfile
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
    each = _by_location(positions, ops)
    found, tensors = architecture(model), dict[str, Tensor]()
    modules: list[Any] = list(dict.fromkeys(location.subspace for location in ops if location.subspace is not None))
    description = {
        "format": FORMAT,
        "versions": {name: _version(name) for name in ("causal-distillation", "torch", "transformers")},
        "model": _facts(model),
        "positions": None if each is not None else _encoded(positions, "positions", tensors),
        "steps": _encoded(steps, "steps", tensors),
        "subspaces": [_encoded_subspace(module, f"subspaces.{i}", tensors) for i, module in enumerate(modules)],
        "interventions": [
            {
                "location": str(replace(location, subspace=None)),
                "layers": _layers(found, location),
                "subspace": None if location.subspace is None else modules.index(location.subspace),
                "width": getattr(location.subspace, "width", None),
                "operator": None if op is None else _encoded_operator(op, location, f"operators.{i}", tensors),
                **({} if each is None else {"positions": _encoded(each[location], f"positions.{i}", tensors)}),
            }
            for i, (location, op) in enumerate(ops.items())
        ],
    }
    _write(folder, json.dumps(description, indent=2, ensure_ascii=False), tensors)
    return folder


def load(folder: str | Path, model: nn.Module, *, subspaces: Mapping[str, nn.Module] | None = None) -> Saved:
    """What `save` wrote, for a model of the same type and shape; subspaces in eval mode, on the device of their place.

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
    found, entries = architecture(model), description["interventions"]
    _check_model(description["model"], model, folder)
    places = [Location.parse(entry["location"]) for entry in entries]
    for place, entry in zip(places, entries, strict=True):
        _check_place(place, entry["layers"], found, folder)
    given = {as_location(text): module for text, module in (subspaces or {}).items()}
    spanned = [place for place, entry in zip(places, entries, strict=True) if entry["subspace"] is not None]
    if given.keys() - set(spanned):
        raise InterventionError(
            f"subspaces names {next(iter(given.keys() - set(spanned)))} and {folder} has a subspace at "
            f"{', '.join(map(str, spanned)) or 'no location'}; name one of those."
        )
    modules: list[nn.Module] = []
    for i, saved in enumerate(description["subspaces"]):
        at = [place for place, entry in zip(places, entries, strict=True) if entry["subspace"] == i]
        chosen = next((given[place] for place in at if place in given), None)
        if chosen is not None and chosen in modules:
            raise InterventionError(f"one {type(chosen).__name__} is given for two subspaces; make one for each.")
        module = _decoded_subspace(saved, _below(tensors, f"subspaces.{i}."), chosen, at[0])
        modules.append(module.to(_device(found, at[0])).eval())
    locations = [
        place if entry["subspace"] is None else replace(place, subspace=modules[entry["subspace"]])
        for place, entry in zip(places, entries, strict=True)
    ]
    positions, steps = (_decoded(description[name], tensors) for name in ("positions", "steps"))
    if "positions" in entries[0]:
        values = [_decoded(entry["positions"], tensors) for entry in entries]
        positions = dict(zip(locations, values, strict=True))
    if entries[0]["operator"] is None:
        return Saved(tuple(locations), positions, steps)
    ops = [_decoded_operator(entry, tensors) for entry in entries]
    return Saved(dict(zip(locations, ops, strict=True)), positions, steps)


def _operators_of(
    interventions: Mapping[Location, Operator] | Iterable[Location] | Location,
) -> dict[Location, Operator | None]:
    if isinstance(interventions, Mapping):
        ops: dict[Location, Operator | None] = {as_location(place): op for place, op in interventions.items()}
    else:
        places = [interventions] if isinstance(interventions, Location | str) else interventions
        ops = dict.fromkeys(map(as_location, places))
    if not ops:
        raise InterventionError("save was given no locations; write save(folder, {Location(3): op}, model=model).")
    return ops


def _by_location(positions: object, ops: Mapping[Location, Any]) -> dict[Location, Any] | None:
    """The positions of each location, where each has its own."""
    if not isinstance(positions, Mapping):
        return None
    each = {as_location(place): value for place, value in positions.items()}
    if each.keys() != ops.keys():
        odd = next(iter(each.keys() ^ ops.keys()))
        raise InterventionError(
            f"positions and interventions do not name the same locations: {odd} is in one of them; give positions for "
            "each location, None for all tokens."
        )
    return each


# What a model is known by.


def _facts(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None) or type(model).__name__
    sizes = {name: getattr(config, name, None) for name in ("hidden_size", "num_attention_heads")}
    return {
        "type": kind,
        "class": type(model).__name__,
        **{k: v if isinstance(v, int) else None for k, v in sizes.items()},
    }


def _layers(found: Architecture, location: Location) -> int | None:
    """How many blocks the stack has that `location` is in."""
    block = found.place(location).block
    return next((len(stack.blocks) for stack in found.stacks if block in stack.blocks), None)


def _check_model(saved: dict[str, Any], model: nn.Module, folder: Path) -> None:
    here = _facts(model)
    for name, what in [("type", "of type"), ("hidden_size", "of hidden size"), ("num_attention_heads", "with heads")]:
        if None not in (saved.get(name), here[name]) and saved[name] != here[name]:
            raise InterventionError(
                f"{folder} does not fit this model: it was saved for a model {what} {saved[name]!r} "
                f"({saved['class']}), and this one has {here[name]!r} ({here['class']}); load it into such a model."
            )


def _check_place(place: Location, layers: int | None, found: Architecture, folder: Path) -> None:
    try:
        here = _layers(found, place)
    except InterventionError as error:
        raise InterventionError(f"{folder} does not fit this model: {error}") from error
    if here != layers:
        raise InterventionError(
            f"{folder} does not fit this model: {place} was saved for {layers} layers and this model has {here}; load "
            "it into such a model, or write the location anew."
        )


def _device(found: Architecture, location: Location) -> torch.device:
    place = found.place(location)
    modules = [module for module in (place.module, place.block, found.model) if module is not None]
    return next((p.device for module in modules for p in module.parameters()), torch.device("cpu"))


# Values, operators and subspaces as JSON, their tensors under a name.


def _encoded(value: object, name: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, Iterable):
        return [_encoded(entry, f"{name}.{i}", tensors) for i, entry in enumerate(value)]
    if hasattr(value, "__index__"):
        return value.__index__()
    raise InterventionError(f"{name} cannot be saved: {value!r}; give numbers, lists, slices or tensors.")


def _decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decoded(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    return tensors[content] if kind == "tensor" else {"slice": slice, "range": range}[kind](*content)


def _encoded_operator(op: object, location: Location, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if type(op) not in OPERATORS.values():
        raise InterventionError(
            f"{op!r} at {location} cannot be saved: it is code, and files hold none; use one of "
            f"{', '.join(OPERATORS)}, or save the locations alone: save(folder, list(interventions), model=model)."
        )
    values = {field.name: getattr(op, field.name) for field in fields(op)}  # type: ignore[arg-type]
    return {
        "class": type(op).__name__,
        "fields": {key: _encoded(value, f"{name}.{key}", tensors) for key, value in values.items()},
    }


def _decoded_operator(entry: dict[str, Any], tensors: Mapping[str, Tensor]) -> Operator:
    name = entry["operator"]["class"]
    if name not in OPERATORS:
        raise InterventionError(
            f"operator {name!r} at {entry['location']} is not known here: the operators are {', '.join(OPERATORS)}; "
            "upgrade, or write the intervention anew."
        )
    values = {key: _decoded(value, tensors) for key, value in entry["operator"]["fields"].items()}
    unknown = values.keys() - {field.name for field in fields(OPERATORS[name])}
    if unknown:
        raise InterventionError(
            f"operator {name} at {entry['location']} was saved with {', '.join(sorted(unknown))}, which it has not "
            "here; upgrade, or write the intervention anew."
        )
    return OPERATORS[name](**values)


def _encoded_subspace(module: object, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    kind = type(module)
    if not isinstance(module, nn.Module):
        raise InterventionError(f"subspace {module!r} cannot be saved: it is no nn.Module; make it one.")
    if isinstance(module, SparseCoder):
        for function in (module.encode, module.decode):
            if not isinstance(function, nn.Module) and not isinstance(getattr(function, "__self__", None), nn.Module):
                raise InterventionError(
                    f"SparseCoder with the function {getattr(function, '__name__', function)!r} cannot be saved: it "
                    "may hold tensors that no file would; make it an nn.Module, or a method of one."
                )
    tensors |= {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
    settings = module.settings if isinstance(module, Subspace) else {}
    known = SUBSPACES.get(kind.__name__) is kind or kind is SparseCoder
    return {"class": kind.__name__ if known else f"{kind.__module__}.{kind.__qualname__}", "settings": settings}


def _decoded_subspace(
    saved: dict[str, Any], state: dict[str, Tensor], given: nn.Module | None, location: Location
) -> nn.Module:
    name = saved["class"]
    if given is not None:
        if name.rpartition(".")[2] != type(given).__name__:
            raise InterventionError(
                f"the subspace of {location} is a {name} and a {type(given).__name__} was given; give a {name}."
            )
        # Of a class known here the state says it all, but for the features of a coder.
        compared = isinstance(given, Subspace) and name not in SUBSPACES
        settings = json.loads(json.dumps(given.settings)) if compared else {}
        odd = [key for key, value in settings.items() if saved["settings"].get(key) != value]
        if odd:
            raise InterventionError(
                f"the {name} given for {location} has {odd[0]}={settings[odd[0]]} and the saved one "
                f"{odd[0]}={saved['settings'].get(odd[0])}; build it as it was."
            )
        try:
            given.load_state_dict(state)
        except RuntimeError as error:
            raise InterventionError(
                f"the {name} given for {location} does not fit what was saved: {error}; build it as it was."
            ) from error
        return given
    if name not in SUBSPACES:
        raise InterventionError(
            f"the subspace of {location} is a {name}, which holds code, and files hold none; build it and pass "
            f"load(folder, model, subspaces={{{str(location)!r}: {name.rpartition('.')[2]}(…)}})."
        )
    kind = SUBSPACES[name]
    # Arguments that are tensors are also in the state.
    module = kind(**saved["settings"], **(state if kind is PCA else {}))
    module.load_state_dict(state, assign=True)
    return module


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


# Files.


def _check_free(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / DESCRIPTION).is_file():
        raise InterventionError(f"{folder} exists and holds no saved interventions; choose another folder.")
    if not overwrite:
        raise InterventionError(f"{folder} holds saved interventions; choose another, or write overwrite=True.")


def _write(folder: Path, description: str, tensors: Mapping[str, Tensor]) -> None:
    """Both files into a folder beside, which then takes the name: a crash leaves the old folder or the new one."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = (folder.with_name(f".{folder.name}.{uuid4().hex}") for _ in range(2))
    new.mkdir()
    try:
        (new / DESCRIPTION).write_text(description + "\n", encoding="utf-8")
        # Copies, as safetensors refuses tensors that share memory.
        copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(copies, new / TENSORS)
        if folder.exists():
            os.rename(folder, old)
        try:
            os.rename(new, folder)
        except BaseException:
            if old.exists():
                os.rename(old, folder)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not (folder / DESCRIPTION).is_file():
        raise InterventionError(
            f"{folder} holds no saved interventions: there is no {DESCRIPTION}; write them with save(folder, …)."
        )
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        version, writer = description["format"], description["versions"]["causal-distillation"]
        if version > FORMAT:
            raise InterventionError(
                f"{folder} is of format {version} (written by version {writer}) and this version reads up to "
                f"{FORMAT}; upgrade: pip install -U causal-distillation."
            )
        # Copies, as the file may be overwritten while they live.
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / TENSORS).items()}
    except InterventionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InterventionError(f"{folder} cannot be read: {type(error).__name__}: {error}; save it again.") from error
    return description, tensors


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
