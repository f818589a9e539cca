"""Encodings of values, operators and subspaces: JSON, with the tensors collected under names beside it."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from interventions import operators
from interventions.errors import InterventionError
from interventions.locations import Location
from interventions.operators import Operator
from interventions.subspaces import PCA, BoundlessRotation, Mask, Rotation, SparseCoder, Subspace

OPERATORS: dict[str, Any] = {
    name: kind for name, kind in vars(operators).items() if isinstance(kind, type) and is_dataclass(kind)
}
IN_FILES = {"renormalize": "renormalise"}
"""{field of an operator: its name in files of format 1}, where the two differ."""
SUBSPACES: dict[str, Any] = {kind.__name__: kind for kind in (Rotation, BoundlessRotation, Mask, PCA)}


def encode(value: object, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return `value` as JSON, and put its tensors into `tensors` under `name`.

    Raises:
        InterventionError: `value` is no number, text, list, slice, range or tensor.
    """
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
        return [encode(entry, f"{name}.{i}", tensors) for i, entry in enumerate(value)]
    if hasattr(value, "__index__"):
        return value.__index__()
    raise InterventionError(f"{name} cannot be saved: {value!r}; give numbers, lists, slices or tensors.")


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the value whose JSON `encode` made."""
    if isinstance(value, list):
        return [decode(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    return tensors[content] if kind == "tensor" else {"slice": slice, "range": range}[kind](*content)


def encode_operator(op: object, location: Location, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the class and the fields of an operator as JSON, and put its tensors into `tensors` under `name`.

    Raises:
        InterventionError: a function or a class of the user's own.
    """
    if type(op) not in OPERATORS.values():
        raise InterventionError(
            f"{op!r} at {location} cannot be saved: it is code, and files hold none; use one of "
            f"{', '.join(OPERATORS)}, or save the locations alone: save(folder, list(interventions), model=model)."
        )
    names = [field.name for field in fields(op)]  # type: ignore[arg-type]
    values = {IN_FILES.get(name, name): getattr(op, name) for name in names}
    return {
        "class": type(op).__name__,
        "fields": {key: encode(value, f"{name}.{key}", tensors) for key, value in values.items()},
    }


def decode_operator(saved: dict[str, Any], location: Location, tensors: Mapping[str, Tensor]) -> Operator:
    """Build the operator that `encode_operator` described.

    Raises:
        InterventionError: no operator of that name exists.
    """
    name = saved["class"]
    if name not in OPERATORS:
        raise InterventionError(
            f"operator {name!r} at {location} is not known here: the operators are {', '.join(OPERATORS)}; upgrade, or "
            "write the intervention anew."
        )
    names = {in_file: name for name, in_file in IN_FILES.items()}
    return OPERATORS[name](**{names.get(key, key): decode(value, tensors) for key, value in saved["fields"].items()})


def encode_subspace(module: object, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the class and settings of a subspace as JSON, and put its state dict into `tensors` under `name`.

    Raises:
        InterventionError: it is no module, or a SparseCoder of functions, whose tensors are not known.
    """
    if not isinstance(module, nn.Module):
        raise InterventionError(f"subspace {module!r} cannot be saved: it is no nn.Module; make it one.")
    for part in module.modules():
        if isinstance(part, SparseCoder):
            _check_savable(part)
    tensors |= {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
    return _describe(module)


def decode_subspace(
    saved: dict[str, Any], state: dict[str, Tensor], given: nn.Module | None, location: Location
) -> nn.Module:
    """Return the subspace that `encode_subspace` described, with its state: built anew, or loaded into `given`.

    Raises:
        InterventionError: `given` is another subspace than was saved, or is None for one that holds code.
    """
    if saved["class"] == "PCA" and not saved["settings"]:  # files from before PCA had settings
        saved = {**saved, "settings": dict(zip(("dims", "width"), state["components"].shape, strict=True))}
    if given is None:
        _check_known(saved, location)
        built = _build(saved)
        built.load_state_dict(state, assign=True)
        return built
    _check_same(saved, given, location)
    try:
        given.load_state_dict(state)
    except RuntimeError as error:
        raise InterventionError(
            f"the {saved['class']} given for {location} does not fit what was saved: {error}; build it as it was."
        ) from error
    return given


def _describe(module: nn.Module) -> dict[str, Any]:
    """Return the class, the settings and the mode of a subspace, and those of the one that a mask is within."""
    kind = type(module)
    known = SUBSPACES.get(kind.__name__) is kind or kind is SparseCoder
    description = {
        "class": kind.__name__ if known else f"{kind.__module__}.{kind.__qualname__}",
        "settings": json.loads(json.dumps(module.settings)) if isinstance(module, Subspace) else {},
        "training": module.training,
    }
    within = module.within if isinstance(module, Mask) else None
    return description if within is None else {**description, "within": _describe(within)}


def _build(saved: dict[str, Any]) -> nn.Module:
    """Build the subspace of a description, without its state."""
    within = {"within": _build(saved["within"])} if "within" in saved else {}
    return SUBSPACES[saved["class"]](**saved["settings"], **within)


def _levels(description: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a description and those of the subspaces that it is within, outermost first."""
    return [description, *(_levels(description["within"]) if "within" in description else [])]


def _check_known(saved: dict[str, Any], location: Location) -> None:
    """Raise InterventionError for a subspace that holds code, and so cannot be built from the file alone."""
    names = [level["class"] for level in _levels(saved)]
    if not SUBSPACES.keys() >= set(names):
        call = "(within=".join(name.rpartition(".")[2] for name in names) + "(…" + ")" * len(names)
        raise InterventionError(
            f"the subspace of {location} is a {' within a '.join(names)}, which holds code, and files hold none; build "
            f"it and pass load(folder, model, subspaces={{{str(location)!r}: {call}}})."
        )


def _check_same(saved: dict[str, Any], given: nn.Module, location: Location) -> None:
    """Raise InterventionError if the class or the settings of `given` differ, but for those in the state dict."""
    here = _describe(given)
    if _identity(saved) != _identity(here):
        raise InterventionError(
            f"the subspace saved for {location} is a {_title(saved)} and a {_title(here)} was given; build it as it "
            "was."
        )


def _identity(description: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return class names and settings, without the temperature, which is in the state dict."""
    return [
        (
            level["class"].rpartition(".")[2],
            {name: value for name, value in level["settings"].items() if name != "temperature"},
        )
        for level in _levels(description)
    ]


def _title(description: dict[str, Any]) -> str:
    return " within a ".join(f"{level['class']} with {level['settings']}" for level in _levels(description))


def _check_savable(coder: SparseCoder) -> None:
    """Raise InterventionError for an encoder or decoder that is neither a module nor a method of one."""
    for function in (coder.encode, coder.decode):
        if not isinstance(function, nn.Module) and not isinstance(getattr(function, "__self__", None), nn.Module):
            raise InterventionError(
                f"SparseCoder with the function {getattr(function, '__name__', function)!r} cannot be saved: it "
                "may hold tensors that no file would; make it an nn.Module, or a method of one."
            )
