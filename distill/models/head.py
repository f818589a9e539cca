"""The penultimate features of a model: the input of its last linear layer, its head."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from distill.errors import DistillError
from distill.models.inputs import evaluating, network_of
from interventions import InterventionError, Location, Run, run

WAY_OUT = "say where its features are, e.g. at=Location(-1) or at=Location(module='…', io='input')"


def penultimate(model: nn.Module, inputs: object = None) -> Location:
    """Return the location of the input of a model's head, its last linear layer.

    Without inputs the head is the linear layer that is registered last. With inputs, as `interventions.run` takes them,
    the model runs on them, and the head is the last registered layer whose output is the answer (or, for GPT-2's
    classifier, holds it at one position of each example); if there is none, because something is computed from the
    output of the head, it is the last registered layer that ran.

    Raises:
        DistillError: no linear layer, none that ran, or the last one belongs to the last of several equal blocks.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2), nn.LogSoftmax(-1))
    >>> penultimate(net)
    Location(module='2', io='input')
    """
    paths = [path for path, _ in _linears(network_of(model))][::-1]
    if not paths:
        raise DistillError(f"{type(model).__name__} has no linear layer, so it has no known head; {WAY_OUT}.")
    chosen = paths[0] if inputs is None else _find_head(model, inputs, paths)
    if _is_repeated(network_of(model), chosen):
        raise DistillError(
            f"{type(model).__name__} ends in blocks and has no head after them (its last linear layer is {chosen!r}); "
            f"{WAY_OUT}."
        )
    return Location(module=chosen, io="input")


def _linears(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the linear layers in the order of registration; those inside another, as in adapters, belong to it."""
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        if _is_linear(getattr(child, "base_layer", child)):
            yield child_path, child
        # The output projection of torch's attention is of a linear class but is never called.
        elif not isinstance(child, nn.MultiheadAttention):
            yield from _linears(child, child_path)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # as GPT-2 has it


def _find_head(model: nn.Module, inputs: object, paths: list[str]) -> str:
    """Return the first of these layers that gives the answer, else the first that ran on these inputs."""
    ran = []
    with evaluating(model), torch.no_grad():
        for path in paths:
            at = Location(module=path)
            try:
                found = run(model, inputs, at, resumable=False)
            except InterventionError as error:
                if "never ran" not in str(error):
                    raise
                continue
            if _answers(found, at):
                return path
            ran.append(path)
    if not ran:
        raise DistillError(f"no linear layer of {type(model).__name__} ran on these inputs; {WAY_OUT}.")
    return ran[0]


def _answers(found: Run, at: Location) -> bool:
    """Return whether the output of a layer is the answer, or holds the answer of each example at one position."""
    try:
        logits = found.logits
    except InterventionError:  # not a model with logits
        return False
    last: Tensor = found.activations.calls(at)[-1]  # type: ignore[union-attr]
    if last.shape == logits.shape:
        return torch.equal(last, logits)
    if last.ndim != 3 or logits.ndim != 2 or (len(last), last.shape[-1]) != tuple(logits.shape):
        return False
    return bool((last == logits[:, None]).all(-1).any(1).all())


def _is_repeated(model: nn.Module, path: str) -> bool:
    """Return whether the block before that of the layer has an equal layer at the same place."""
    parts, layer = path.split("."), model.get_submodule(path)
    for i, part in enumerate(parts[:-1]):
        if part.isdigit() and part != "0":
            before = ".".join([*parts[:i], str(int(part) - 1), *parts[i + 1 :]])
            try:
                other = model.get_submodule(before)
            except AttributeError:
                continue
            if _shapes(other) == _shapes(layer):
                return True
    return False


def _shapes(module: nn.Module) -> list[torch.Size]:
    return [parameter.shape for parameter in module.parameters()]
