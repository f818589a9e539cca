"""What a traced model is called with: what a plain one is, or text, where it has a tokenizer."""

from collections.abc import Mapping
from typing import Any

from interventions.execution.run import Inputs, check_inputs
from interventions.tracing import vllm


def prepared(model: Any, inputs: Any) -> Inputs:
    """The inputs as tensors: text as the model itself tokenises it.

    Raises:
        InterventionError: inputs that are none, or text for a model without a tokenizer.
    """
    texts = [inputs] if isinstance(inputs, str) else inputs
    is_text = isinstance(texts, list | tuple) and bool(texts) and all(isinstance(text, str) for text in texts)
    if is_text and getattr(model, "tokenizer", None) is not None:
        _, named = model._batch([((list(texts),), {})], model.trace)
        return dict(named)
    check_inputs(inputs)
    return inputs


def called_with(inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """Positional and named arguments: a mapping names them, a tuple or list gives them in order."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def load(model: Any) -> None:
    """Load the weights of a model that has none yet, so that it is in the mode in which it will run."""
    if getattr(model, "dispatched", True) is False and not vllm.is_engine(model):
        model.dispatch()
