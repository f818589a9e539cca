"""Inputs of a traced model: those of a plain model, or text if it has a tokenizer."""

from collections.abc import Mapping
from typing import Any

from interventions.execution.run import Inputs, check_inputs
from interventions.tracing import vllm


def to_tensors(model: Any, inputs: Any) -> Inputs:
    """Return the inputs as tensors, with text tokenised as the model itself does it.

    Raises:
        InterventionError: inputs without examples, or text for a model without a tokenizer.
    """
    texts = [inputs] if isinstance(inputs, str) else inputs
    is_text = isinstance(texts, list | tuple) and bool(texts) and all(isinstance(text, str) for text in texts)
    if is_text and getattr(model, "tokenizer", None) is not None:
        _, named = model._batch([((list(texts),), {})], model.trace)
        return dict(named)
    check_inputs(inputs)
    return inputs


def called_with(inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """Return inputs as positional and named arguments: a mapping names them, a tuple or list holds them in order."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def load(model: Any) -> None:
    """Load the weights of a model that has none yet; only then its mode, train or eval, is the one it will run in."""
    if getattr(model, "dispatched", True) is False and not vllm.is_engine(model):
        model.dispatch()
