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
    values = {field.name: getattr(op, field.name) for field in fields(op)}  # type: ignore[arg-type]
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
    return OPERATORS[name](**{key: decoded(value, tensors) for key, value in saved["fields"].items()})


def encoded_subspace(module: object, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The class and the settings of a subspace; its state dict goes into `tensors`, under `name`."""
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
    name = kind.__name__ if known else f"{kind.__module__}.{kind.__qualname__}"
    return {"class": name, "settings": settings, "training": module.training}


def decoded_subspace(
    saved: dict[str, Any], state: dict[str, Tensor], given: nn.Module | None, location: Location
) -> nn.Module:
    """The subspace that `encoded_subspace` described: made anew, or the one given, with the saved state loaded."""
    name = saved["class"]
    if given is None and name not in SUBSPACES:
        raise InterventionError(
            f"the subspace of {location} is a {name}, which holds code, and files hold none; build it and pass "
            f"load(folder, model, subspaces={{{str(location)!r}: {name.rpartition('.')[2]}(…)}})."
        )
    if given is None:
        # Arguments that are tensors are also in the state.
        given = SUBSPACES[name](**saved["settings"], **(state if name == "PCA" else {}))
        given.load_state_dict(state, assign=True)
        return given
    settings = json.loads(json.dumps(given.settings)) if isinstance(given, Subspace) else {}
    if type(given).__name__ != name.rpartition(".")[2] or settings != saved["settings"]:
        raise InterventionError(
            f"the subspace saved for {location} is a {name} with {saved['settings']} and a {type(given).__name__} with "
            f"{settings} was given; build it as it was."
        )
    try:
        given.load_state_dict(state)
    except RuntimeError as error:
        raise InterventionError(
            f"the {name} given for {location} does not fit what was saved: {error}; build it as it was."
        ) from error
    return given
