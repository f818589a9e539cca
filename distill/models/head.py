"""The head of a model, its last linear layer: its input, the penultimate features, and runs that end before it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import mul
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.dropout import _DropoutNd

from distill.errors import DistillError
from distill.losses.chunked import LazyLogits
from distill.models.inputs import evaluating, innermost, network_of
from interventions import InterventionError, Location, Run, deferring_head, intervene, run

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


LARGE = 2**24
"""From so many logits on, tokens × classes, a run ends before the head: 64 MiB in single precision."""
EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}
"""How much the logits of a part may differ from those of the whole, over the largest; 0.02 in half precision."""
STRONG = 60.0
"""The size of the logits at which a scaling or a soft cap after the head shows."""

After = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Head:
    """The module that ends in the logits of a model, and what the model does with its output; None is nothing."""

    module: nn.Module
    after: After | None


@dataclass(frozen=True, eq=False)
class Heads:
    """Lets the runs of models end before their heads where their logits are large, so that losses make them in parts.

    A head is tried once, on one row: its output, or a scaling or soft cap of it that the configuration of the model
    names, has to be the logits, at their size and at a large one. Else the model runs to its end, as all others do.
    """

    _tried: dict[int, Head | None] = field(default_factory=dict)
    _found: dict[int, nn.Module | None] = field(default_factory=dict)

    @contextmanager
    def deferred(self, models: Iterable[tuple[nn.Module, Any]]) -> Iterator[None]:
        """Let the runs of models inside the block end before their heads, with inputs as large as these."""
        with ExitStack() as stack:
            for model, inputs in models:
                if id(model) not in self._found:
                    self._found[id(model)] = _head_module(model)
                module = self._found[id(model)]
                if module is None or _positions(inputs) * classes_of(module) < LARGE:
                    continue
                if id(model) not in self._tried:
                    self._tried[id(model)] = _tried_head(model, inputs, module)
                if (head := self._tried[id(model)]) is not None:
                    least = -(-LARGE // classes_of(module))
                    stack.enter_context(deferring_head(model, head.module, head.after, least=least))
            yield


def classes_of(head: Any) -> int:
    """Return the number of classes of a head; 0 if it is no linear layer."""
    weight = getattr(head, "weight", None)
    return int(getattr(head, "out_features", 0)) or (len(weight) if isinstance(weight, Tensor) and weight.ndim else 0)


def lazy_logits(ran: Run) -> LazyLogits | None:
    """Return the logits of a run that ended before its head, `[batch, token, classes]`; None of any other."""
    found = ran.deferred
    if found is None or found.states.ndim != 3:
        return None
    trained = {name: each for name, each in found.head.named_parameters() if each.requires_grad and found.graded}
    classes = min(classes_of(found.head), getattr(ran.answers, "classes", classes_of(found.head)))
    return LazyLogits(
        (found.states,), lambda rows, weights: found.answer(rows[0], weights)[..., :classes], trained, classes
    )


def _head_module(model: nn.Module) -> nn.Module | None:
    """Return the output embedding of a model; None if it has none that can be called part by part."""
    try:
        found = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return None
    if not isinstance(found, nn.Module) or all(each is not found for each in model.modules()):
        return None
    draws = any(isinstance(each, _DropoutNd) and each.p > 0 for each in found.modules())
    derived = any("parametrizations" in each._modules for each in found.modules())
    split = any(
        isinstance(each, DTensor) or each.is_meta or (each.requires_grad and type(each) is not nn.Parameter)
        for each in found.parameters()
    )
    return None if draws or derived or split or not classes_of(found) else found


def _positions(inputs: Any) -> int:
    """Return the number of positions of the largest of some inputs, over all examples."""
    given = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple) else (inputs,)
    tensors = [each for each in given if isinstance(each, Tensor) and each.ndim > 1]
    return max((each.shape[0] * each.shape[1] for each in tensors), default=0)


def _tried_head(model: nn.Module, inputs: Any, module: nn.Module) -> Head | None:
    """Return the head of a model with what follows it, by runs on one row; None if the logits are something else."""
    few = {name: each[:1] for name, each in inputs.items()} if isinstance(inputs, Mapping) else None
    states = None if few is None else next(_states_at(model, few, module), None)
    if few is None or states is None:
        return None
    path = next(path for path, each in model.named_modules() if each is module)
    with evaluating(model), torch.no_grad():
        size = float(states.answer(states.states).abs().max())
        if not 0 < size < float("inf"):
            return None
        fitting = dict(_candidates(model))
        for factor in (1.0, STRONG / size):
            with intervene(model, Location(module=path, io="input"), op=partial(_times, factor)):
                ran = run(model, few, resumable=False)
            fitting = {
                name: after for name, after in fitting.items() if _agree(states, factor, after, ran.logits, ran.answers)
            }
    return Head(module, next(iter(fitting.values()))) if len(fitting) == 1 else None


def _states_at(model: nn.Module, inputs: Any, module: nn.Module) -> Iterator[Any]:
    """Yield the output of a run that ends before a head, if one does so."""
    with evaluating(model), torch.no_grad(), deferring_head(model, module):
        found = run(model, inputs, resumable=False).deferred
    if found is not None and found.states.ndim == 3:
        yield found


def _times(factor: float, base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
    return base * factor


def _agree(found: Any, factor: float, after: After | None, logits: Tensor, rule: Any) -> bool:
    """Return whether the states of a head times a factor, in two parts, give the logits of the model, by its rule."""
    states = found.states * factor
    classes = min(classes_of(found.head), getattr(rule, "classes", classes_of(found.head)))
    if logits.shape != (*states.shape[:-1], classes):
        return False
    near = EXACT.get(logits.dtype, 0.02) * float(logits.abs().max())
    whole, rows = logits.flatten(0, -2), states.flatten(0, -2)
    cuts = [slice(0, len(rows) // 2), slice(len(rows) // 2, None)]
    parts = ((whole[cut], found.answer(rows[cut])[..., :classes]) for cut in cuts if len(rows[cut]))
    return all(bool(((part if after is None else after(part)) - there).abs().max() <= near) for there, part in parts)


def _candidates(model: nn.Module) -> Iterator[tuple[str, After | None]]:
    """Yield what may follow a head, by name: nothing, or what the configuration of the model names."""
    config: Any = getattr(innermost(model), "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    yield "nothing", None

    def named(name: str) -> float | None:
        value = getattr(config, name, None)
        return float(value) if isinstance(value, int | float) and value not in (0, 1) else None

    if (cap := named("final_logit_softcapping")) is not None:
        yield "cap", partial(_capped, cap)
    for name in ("logit_scale", "lm_head_multiplier", "logits_scaling"):
        if (scale := named(name)) is not None:
            yield f"times {name}", partial(mul, scale)
            yield f"over {name}", partial(_over, scale)


def _capped(cap: float, logits: Tensor) -> Tensor:
    """Return logits softly capped to −cap … cap, in the operations of the models of transformers."""
    return torch.tanh(logits / cap) * cap


def _over(scale: float, logits: Tensor) -> Tensor:
    return logits / scale
