"""`bake`: interventions that are written into the weights of a copy of the model.

An operator that is affine in each vector, h ↦ A h + c, at the output of a linear module W x + b is the module with A W
and A b + c; at its input it is the module with W A and W c + b. A and c are read off the operator at the unit vectors.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from interventions.arguments import checked
from interventions.endings import without_gradients
from interventions.errors import InterventionError
from interventions.execution.fits import check_value
from interventions.execution.parts import replace_part, select_part
from interventions.execution.run import Inputs
from interventions.hooks.installation import user_hooks
from interventions.hooks.scopes import open_scopes
from interventions.interchanges import intervene
from interventions.locations import Location, as_location
from interventions.models.architectures import Architecture, architecture
from interventions.models.attentions import attention_of
from interventions.models.layers import is_norm
from interventions.models.modules import model_name
from interventions.models.places import Place
from interventions.models.wrappers import Model, is_traced, module_of
from interventions.operators import Operator
from interventions.runs import check_eval, run

RESIDUAL = ("block_input", "block_output", "embedding")
"""Sites that are sums of what several modules return."""
LINEAR = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Embedding)
"""Modules, of these classes exactly, whose output is linear in their weights."""
DRAWS = 8
"""Random vectors on which an operator is compared with its affine map."""


@dataclass(frozen=True, eq=False)
class Affine:
    """The map h ↦ A h + c.

    Attributes:
        matrix: A, `[dims, dims]`.
        shift: c, `[dims]`.
    """

    matrix: Tensor
    shift: Tensor

    def then(self, other: "Affine") -> "Affine":
        """Return the map that applies this one and then another."""
        return Affine(other.matrix @ self.matrix, other.matrix @ self.shift + other.shift)

    @property
    def linear(self) -> "Affine":
        """The map without its shift."""
        return Affine(self.matrix, torch.zeros_like(self.shift))

    @property
    def is_diagonal(self) -> bool:
        """True where each entry depends on itself alone."""
        return torch.allclose(self.matrix, self.matrix.diagonal().diag(), atol=1e-9)


@checked
def bake(model: Model, interventions: Mapping[Location, Operator], inputs: Inputs) -> nn.Module:
    """Return a copy of a model with interventions written into its weights, which needs no hooks.

    These are operators that are affine in each vector, at all tokens: zeroing heads, neurons or dims, writing a
    constant (`Mean(value)`), adding a vector, projecting out a direction or a subspace. Where a place is the output or
    the input of a linear module, that module is changed. Where it is the residual stream, a vector is added to the bias
    of a module that writes to it, and a projection of the embedding goes into the tables of embeddings.

    Args:
        model: a torch model in eval mode; it stays as it is.
        interventions: {location: operator}, as for `intervene`; those of one place are applied in their order.
        inputs: inputs on which the copy is compared with the hooked model, before it is returned.

    Returns:
        A model of the same class, whose answers to `inputs` are those of the hooked one to 1e-5 of the largest logit
        (in half precision to 1e-2). Weights that were tied to a changed one are no longer.

    Raises:
        InterventionError: an operator that is not affine, takes from a source or draws; a place that no weights can
            stand for; a copy that answers otherwise.

    >>> from interventions import Zero
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).eval()
    >>> pruned = bake(net, {Location(module="2", io="input", dims=[0]): Zero()}, torch.ones(1, 2))
    >>> pruned[2].weight[:, 0].item()
    0.0
    """
    if is_traced(model):
        raise InterventionError("bake writes into a torch model; pass the one that this model of nnsight wraps.")
    check_eval(model)
    network, ops = module_of(model), {as_location(at): op for at, op in interventions.items()}
    if not ops:
        raise InterventionError("interventions={} names nothing to write; pass {Location(3): Add(vector)}.")
    if open_scopes(network) or user_hooks(network):
        raise InterventionError(
            "the model has hooks, or is inside an intervene block, which a copy would carry along; remove them, or "
            "bake outside of the block."
        )
    with without_gradients():
        changed = copy.deepcopy(network)
        for module, side, mapped in _plan(network, ops, inputs):
            write_affine(changed, changed.get_submodule(module), side, mapped)
        error = _distance(network, ops, changed, inputs)
    if not error <= 1:
        raise InterventionError(
            f"with {', '.join(map(str, ops))} in the weights this {model_name(network)} answers otherwise than with "
            "hooks, as other modules stand in between; intervene instead: with intervene(model, interventions): …."
        )
    return changed


Part = tuple[str, str, "Affine"]
"""The path of a module, its side, and the map to write there."""


def _plan(network: nn.Module, ops: Mapping[Location, Operator], inputs: Inputs) -> list[Part]:
    """Return what is written where; maps of one side of one module are joined in their order.

    Raises:
        InterventionError: an operator that is not affine, or a place that no weights can stand for.
    """
    found = architecture(network)
    plan: dict[tuple[str, str], Affine] = {}
    for at, op in ops.items():
        place = found.place(at)
        if place.turn is not None:
            raise InterventionError(
                f"{at} is in a block that several layers share, so their weights are one; intervene instead."
            )
        if at.module is None and at.site in RESIDUAL:
            parts = _in_residual(found, at, op, inputs)
        else:
            module, side, heads = _target(found, at, place)
            parts = [(found.paths[module], side, affine_of(op, at, heads, width_of(module, side)))]
        for path, side, mapped in parts:
            before = plan.get((path, side))
            plan[path, side] = mapped if before is None else before.then(mapped)
    return [(path, side, mapped) for (path, side), mapped in plan.items()]


def affine_of(op: Operator, at: Location, heads: int | None, width: int) -> Affine:
    """Return the affine map that an operator is, in each vector of a location.

    Args:
        op: the operator.
        at: the location, whose heads, dims and subspace say which part of a vector it replaces.
        heads: the number of heads side by side in a vector; None where it has none.
        width: the width of the vector, all heads together.

    Raises:
        InterventionError: the operator takes from a source, or is not affine.
    """
    name = type(op).__name__
    if getattr(op, "needs_source", False):
        raise InterventionError(
            f"{name} at {at} takes from a source, which weights do not have; write a constant: Mean(vector)."
        )

    def applied(vectors: Tensor) -> Tensor:
        parted = vectors if heads is None else rearrange(vectors, "n (h d) -> n h d", h=heads)
        value = op(select_part(parted, at), None, torch.Generator().manual_seed(0))
        check_value(value, select_part(parted, at), op, at)
        return replace_part(parted, value, at).reshape(vectors.shape)

    shift = applied(torch.zeros(1, width, dtype=torch.double))[0]
    matrix = (applied(torch.eye(width, dtype=torch.double)) - shift).T
    draw = torch.randn(DRAWS, width, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    draw = draw * torch.logspace(-2, 3, DRAWS, dtype=torch.double)[:, None]
    expected = draw @ matrix.T + shift
    if not torch.allclose(applied(draw), expected, atol=1e-6, rtol=1e-6) or not matrix.isfinite().all():
        raise InterventionError(
            f"{name} at {at} is no affine function of each vector, so no weights can stand for it; bake Zero(), "
            "Mean(vector) or Add(vector), and intervene with the others."
        )
    return Affine(matrix, shift)


def _target(found: Architecture, at: Location, place: Place) -> tuple[nn.Module, str, int | None]:
    """Return the module into which a place is written, its side, and the number of heads in its vectors."""
    module, side, heads = place.module, place.io, place.heads
    if side == "attention_heads" and place.block is not None:
        attention = attention_of(place.block)
        if attention.projection is not None:
            module, side, heads = attention.projection, "input", attention.heads
    if side == "input" and type(module) in (nn.Linear, Conv1D):
        return module, side, heads
    if side == "output" and (type(module) in LINEAR or _scales(module)):
        return module, side, heads
    raise InterventionError(
        f"{at} is the {side} of {type(module).__name__}, which has no weights to write into; name the input or the "
        "output of a linear module there."
    )


def _scales(module: nn.Module) -> bool:
    """Return whether a module is a norm whose output has a scale and a bias of its own."""
    return is_norm(module) and all(getattr(module, name, None) is not None for name in ("weight", "bias"))


def width_of(module: nn.Module, side: str) -> int:
    """Return the width of the input of a linear module, or of the output of one that `LINEAR` names, or of a norm."""
    weight: Any = module.weight
    if isinstance(module, nn.Embedding):
        return weight.shape[1]
    return weight.shape[(side == "input") != isinstance(module, Conv1D)] if weight.ndim > 1 else len(weight)


def write_affine(model: nn.Module, module: nn.Module, side: str, mapped: Affine) -> None:
    """Write a map of the input or the output of a module into its weights, which become its own where they were tied.

    Raises:
        InterventionError: a norm, and a map in which entries depend on each other.
    """
    weight: Any = module.weight
    bias: Any = getattr(module, "bias", None)
    old = weight.double()
    matrix, shift = mapped.matrix.to(old.device), mapped.shift.to(old.device)
    old_bias = torch.zeros((), dtype=old.dtype, device=old.device) if bias is None else bias.double()
    if side == "input":
        across = old.T if isinstance(module, Conv1D) else old
        new, new_bias = across @ matrix, old_bias + across @ shift
        new = new.T if isinstance(module, Conv1D) else new
    elif isinstance(module, nn.Embedding):
        new, new_bias = old @ matrix.T + shift, None
    elif isinstance(module, Conv1D):
        new, new_bias = old @ matrix.T, old_bias @ matrix.T + shift if bias is not None else shift
    elif old.ndim == 1:
        new, new_bias = matrix.diagonal() * old, matrix @ old_bias + shift
    else:
        new = torch.tensordot(matrix, old, 1)
        new_bias = matrix @ old_bias + shift if bias is not None else shift
    tied = sum(each is weight for _, each in model.named_parameters(remove_duplicate=False)) > 1
    module.weight = _like(new, weight)
    if new_bias is not None and (bias is not None or new_bias.any()):
        module.bias = _like(new_bias, weight if bias is None else bias)
    config: Any = getattr(model, "config", None)
    if tied and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # else saving would drop one of the two


def _like(value: Tensor, parameter: Any) -> nn.Parameter:
    """Return a value as a parameter of the dtype of another one, and trained if that one is."""
    return nn.Parameter(value.to(parameter.dtype).contiguous(), requires_grad=parameter.requires_grad)


def _in_residual(found: Architecture, at: Location, op: Operator, inputs: Inputs) -> list[Part]:
    """Return the modules into which a write of the residual stream goes: the first for which the answers are the same.

    Raises:
        InterventionError: there are none.
    """
    width = run(found.model, inputs, [at.whole], resumable=False).vectors(at.whole).shape[-1]
    for paths in _writers(found, at, width):
        modules = [found.model.get_submodule(path) for path in paths]
        mapped = affine_of(op, at, None, width)
        if any(_scales(module) and not mapped.is_diagonal for module in modules):
            continue
        parts = [(path, "output", mapped if number == 0 else mapped.linear) for number, path in enumerate(paths)]
        trial = copy.deepcopy(found.model)
        for path, side, each in parts:
            write_affine(trial, trial.get_submodule(path), side, each)
        if _distance(found.model, {at: op}, trial, inputs) <= 1:
            return parts
    raise InterventionError(
        f"{type(op).__name__} at {at} fits into the weights of no module that writes there: the residual stream is a "
        "sum, of which all later blocks read every part; add a vector, or write at attention_output and mlp_output "
        "(everywhere(model, direction) does so for a direction)."
    )


def _writers(found: Architecture, at: Location, width: int) -> Iterator[list[str]]:
    """Yield the paths of the modules that may stand for a write of the residual stream, likely ones first."""

    def writes(path: str) -> bool:
        module = found.model.get_submodule(path)
        return (type(module) in LINEAR or _scales(module)) and width_of(module, "output") == width

    stack = found.stack_of(at)
    layer = 0 if at.layer is None else at.layer % len(stack.blocks)
    layer = layer if at.site == "block_output" else layer - 1
    if layer >= 0:
        around = found.paths[stack.blocks[layer]]
        inside = [path for path, _ in found.model.named_modules() if path.startswith(f"{around}.")]
        yield from ([path] for path in reversed(inside) if writes(path))
        return
    blocks = [f"{found.paths[block]}." for block in found.blocks]
    outside = [path for path, each in found.model.named_modules() if not any(f"{path}.".startswith(b) for b in blocks)]
    outside = [path for path in outside if writes(path)]
    tables = [path for path in outside if type(found.model.get_submodule(path)) is nn.Embedding]
    if tables:
        yield tables
    yield from ([path] for path in outside)


def _distance(model: nn.Module, ops: Mapping[Location, Operator], changed: nn.Module, inputs: Inputs) -> float:
    """Return how far the answers of a copy are from those of the hooked model, in units of what is allowed."""
    with intervene(model, ops):
        expected = run(model, inputs, resumable=False).logits
    found = run(changed, inputs, resumable=False).logits
    if not expected.numel():
        raise InterventionError("inputs hold no example, so nothing is compared; give at least one row.")
    share = 1e-5 if expected.dtype in (torch.float32, torch.float64) else 1e-2
    allowed = share * max(1.0, float(expected.abs().max()))
    return float((found - expected).abs().max()) / allowed
