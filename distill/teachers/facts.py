"""The facts by which a cache of answers knows its teacher."""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from distill.models.inputs import network_of
from distill.teachers.cache import digest, weights_of
from distill.teachers.endpoints.token_texts import fingerprint_of
from distill.teachers.top_k import TopK
from distill.teachers.without_adapters import WithoutAdapters

_ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters")
"""Settings of layers of PEFT: which adapters they apply."""


def facts_of(model: Any, remote: bool | str, keep: TopK, answers: Any, tokenizer: Any) -> dict[str, Any]:
    """Return what an answer depends on beside its sample, by name.

    The address of a server is none of it: a model may be served elsewhere when a run is resumed.

    Args:
        model: as it is served.
        remote: where it runs; weights are known here alone.
        keep: how many of the largest logits are kept.
        answers: the rule for its answers.
        tokenizer: that of the model, None where it is not known.
    """
    network, words, is_here = network_of(model), fingerprint_of(tokenizer), remote in (False, "local")
    config = getattr(network, "config", None)
    settings = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    settings = {name: value for name, value in settings.items() if name != "transformers_version"}
    return {
        "model": getattr(model, "repo_id", None) or type(network).__name__,
        "revision": getattr(model, "revision", None),
        "configuration": digest(repr(sorted(settings.items(), key=str))),
        "weights": weights_of(state_of(network)) if is_here else None,
        "top_k": keep.k,
        "temperature": None if keep.k is None else keep.temperature,
        **({} if answers is None else {"answers": _rule(answers)}),
        **({} if words is None else {"tokenizer": words}),
        **({"modules": modules_of(network)} if is_here else {}),
    }


def state_of(network: nn.Module) -> Mapping[str, Tensor]:
    """Return the weights that the answers of a network depend on: not those of adapters that it runs without."""
    return network.own_state() if isinstance(network, WithoutAdapters) else network.state_dict()


def modules_of(network: nn.Module) -> str:
    """Return a hash of the modules of a network, their settings, and numbers of each row and column of its weights.

    So a network with another activation, another adapter in use, or one row of a matrix pruned is another one.
    """
    state = {name: (tuple(value.shape), _at_rows_and_columns(value)) for name, value in state_of(network).items()}
    if isinstance(network, WithoutAdapters):  # whose layers are those of the student, with its adapters
        return digest(state)
    modules = [(path, type(part).__qualname__, _settings_of(part)) for path, part in network.named_modules()]
    return digest(modules, state)


def _settings_of(part: nn.Module) -> list[str]:
    """Return the printed settings of a module, without addresses, and which adapters it applies."""
    printed = re.sub(r"\bat 0x[0-9a-fA-F]+", "", part.extra_repr())
    return [printed, *(str(vars(part)[name]) for name in _ADAPTERS if name in vars(part))]


def _at_rows_and_columns(value: Tensor) -> Tensor:
    """Return a sample of the numbers of a tensor that meets each row and each column of a matrix."""
    columns = value.shape[-1] if value.ndim else 1
    step = max(1, min(math.prod(value.shape[:-1]), columns) - 1)
    while math.gcd(step, columns) > 1:
        step -= 1
    return value.detach().flatten()[::step]


def _rule(answers: Any) -> str:
    """Return a rule for answers as text; a function by its name."""
    return repr(answers) if isinstance(answers, str | int) else getattr(answers, "__qualname__", type(answers).__name__)
