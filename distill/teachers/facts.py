"""The facts by which a cache of answers knows its teacher."""

from typing import Any

from distill.models.inputs import network_of
from distill.teachers.cache import digest, weights_of
from distill.teachers.endpoints.token_texts import fingerprint_of
from distill.teachers.top_k import TopK


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
    network, words = network_of(model), fingerprint_of(tokenizer)
    config = getattr(network, "config", None)
    settings = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    settings = {name: value for name, value in settings.items() if name != "transformers_version"}
    return {
        "model": getattr(model, "repo_id", None) or type(network).__name__,
        "revision": getattr(model, "revision", None),
        "configuration": digest(repr(sorted(settings.items(), key=str))),
        "weights": weights_of(network) if remote in (False, "local") else None,
        "top_k": keep.k,
        "temperature": None if keep.k is None else keep.temperature,
        **({} if answers is None else {"answers": _rule(answers)}),
        **({} if words is None else {"tokenizer": words}),
    }


def _rule(answers: Any) -> str:
    """Return a rule for answers as text; a function by its name."""
    return repr(answers) if isinstance(answers, str | int) else getattr(answers, "__qualname__", type(answers).__name__)
