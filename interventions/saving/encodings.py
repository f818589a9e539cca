"""Values, operators and subspaces as JSON, and their tensors under a name beside it."""

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
"""What fields of operators are called in files of format 1, where that is not their name."""
SUBSPACES: dict[str, Any] = {kind.__name__: kind for kind in (Rotation, BoundlessRotation, Mask, PCA)}


def encoded(value: object, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON; its tensors go into `tensors`, under `name`."""
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
        return [encoded(entry, f"{name}.{i}", tensors) for i, entry in enumerate(value)]
    if hasattr(value, "__index__"):
        return value.__index__()
    raise InterventionError(f"{name} cannot be saved: {value!r}; give numbers, lists, slices or tensors.")


def decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `encoded` gave as JSON."""
    if isinstance(value, list):
        return [decoded(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    return tensors[content] if kind == "tensor" else {"slice": slice, "range": range}[kind](*content)


def encoded_operator(op: object, location: Location, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The class and the fields of an operator."""
    if type(op) not in OPERATORS.values():
        raise InterventionError(
            f"{op!r} at {location} cannot be saved: it is code, and files hold none; use one of "
            f"{', '.join(OPERATORS)}, or save the locations alone: save(folder, list(interventions), model=model)."
        )
    names = [field.name for field in fields(op)]  # type: ignore[arg-type]
    values = {IN_FILES.get(name, name): getattr(op, name) for name in names}
    return {
        "class": type(op).__name__,
        "fields": {key: encoded(value, f"{name}.{key}", tensors) for key, value in values.items()},
    }


def decoded_operator(saved: dict[str, Any], location: Location, tensors: Mapping[str, Tensor]) -> Operator:
    """The operator that `encoded_operator` described."""
    name = saved["class"]
    if name not in OPERATORS:
        raise InterventionError(
            f"operator {name!r} at {location} is not known here: the operators are {', '.join(OPERATORS)}; upgrade, or "
            "write the intervention anew."
        )
    names = {in_file: name for name, in_file in IN_FILES.items()}
    return OPERATORS[name](**{names.get(key, key): decoded(value, tensors) for key, value in saved["fields"].items()})


def encoded_subspace(module: object, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The class and the settings of a subspace; its state dict goes into `tensors`, under `name`."""
    if not isinstance(module, nn.Module):
        raise InterventionError(f"subspace {module!r} cannot be saved: it is no nn.Module; make it one.")
    for part in module.modules():
        if isinstance(part, SparseCoder):
            _check_savable(part)
    tensors |= {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
    return _described(module)


def decoded_subspace(
    saved: dict[str, Any], state: dict[str, Tensor], given: nn.Module | None, location: Location
) -> nn.Module:
    """The subspace that `encoded_subspace` described: made anew, or the one given, with the saved state loaded."""
    if saved["class"] == "PCA" and not saved["settings"]:  # as they were saved before PCA had settings
        saved = {**saved, "settings": dict(zip(("dims", "width"), state["components"].shape, strict=True))}
    if given is None:
        _check_known(saved, location)
        made = _made(saved)
        made.load_state_dict(state, assign=True)
        return made
    _check_same(saved, given, location)
    try:
        given.load_state_dict(state)
    except RuntimeError as error:
        raise InterventionError(
            f"the {saved['class']} given for {location} does not fit what was saved: {error}; build it as it was."
        ) from error
    return given


def _described(module: nn.Module) -> dict[str, Any]:
    """The class, the settings and the mode; the same of what a mask is within."""
    kind = type(module)
    known = SUBSPACES.get(kind.__name__) is kind or kind is SparseCoder
    description = {
        "class": kind.__name__ if known else f"{kind.__module__}.{kind.__qualname__}",
        "settings": json.loads(json.dumps(module.settings)) if isinstance(module, Subspace) else {},
        "training": module.training,
    }
    within = module.within if isinstance(module, Mask) else None
    return description if within is None else {**description, "within": _described(within)}


def _made(saved: dict[str, Any]) -> nn.Module:
    within = {"within": _made(saved["within"])} if "within" in saved else {}
    return SUBSPACES[saved["class"]](**saved["settings"], **within)


def _levels(description: dict[str, Any]) -> list[dict[str, Any]]:
    """The description and those of what it is within, the outermost first."""
    return [description, *(_levels(description["within"]) if "within" in description else [])]


def _check_known(saved: dict[str, Any], location: Location) -> None:
    names = [level["class"] for level in _levels(saved)]
    if not SUBSPACES.keys() >= set(names):
        call = "(within=".join(name.rpartition(".")[2] for name in names) + "(…" + ")" * len(names)
        raise InterventionError(
            f"the subspace of {location} is a {' within a '.join(names)}, which holds code, and files hold none; build "
            f"it and pass load(folder, model, subspaces={{{str(location)!r}: {call}}})."
        )


def _check_same(saved: dict[str, Any], given: nn.Module, location: Location) -> None:
    """Raise where the class and the settings of `given` are others, but for those that the state holds."""
    here = _described(given)
    if _identity(saved) != _identity(here):
        raise InterventionError(
            f"the subspace saved for {location} is a {_title(saved)} and a {_title(here)} was given; build it as it "
            "was."
        )


def _identity(description: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
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
    for function in (coder.encode, coder.decode):
        if not isinstance(function, nn.Module) and not isinstance(getattr(function, "__self__", None), nn.Module):
            raise InterventionError(
                f"SparseCoder with the function {getattr(function, '__name__', function)!r} cannot be saved: it "
                "may hold tensors that no file would; make it an nn.Module, or a method of one."
            )
