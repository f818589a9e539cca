"""The checks of a served teacher: its settings, its answers, and whether a cache holds answers of the same teacher."""

from collections.abc import Mapping
from math import inf
from typing import Any

from torch import Tensor, nn

from distill.errors import DistillError
from distill.models.inputs import network_of, refuse_valueless
from distill.teachers.endpoints.endpoint import Endpoint
from distill.teachers.top_k import Kept, dense
from interventions import Location


def check_counts(**counts: int | None) -> None:
    """Raise DistillError for settings of `Served` that must be 1 or more, or None."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise DistillError(f"Served({name}={count}) keeps nothing; use 1 or more, or None for no limit.")


def check_settings(model: Any, remote: bool | str, temperature: float | None) -> None:
    """Raise DistillError for settings of `Served` that cannot be.

    Args:
        model: a model of nnsight or a torch model.
        remote: where it runs.
        temperature: must be above 0 and finite.
    """
    network_of(model)
    if remote and isinstance(model, nn.Module):
        raise DistillError(
            f"remote={remote!r} asks another machine for the model, and this {type(model).__name__} is here; pass a "
            "model of nnsight: Served(TransformersModel(name), remote=True)."
        )
    if remote == "":
        raise DistillError("Served(remote='') names no host; use its address, True, or False for one of this process.")
    if temperature is not None and not 0 < temperature < inf:
        raise DistillError(f"Served(temperature={temperature}) softens nothing; use one above 0, as KD has.")


def refuse_for_models(served: Any, model: Any, key: str | None) -> None:
    """Raise DistillError for two models or none, a name without an address, and a key without a server."""
    if served is not None and model is not None:
        raise DistillError("Served(…, model=…) was given two models; give one, or an address and the model's name.")
    if isinstance(model, str) or (served is None and model is None):
        name = "no model" if model is None else f"the model {model!r} and no address"
        raise DistillError(f"Served names {name}; write Served(model), or Served('http://host:8000', model='name').")
    if key is not None:
        raise DistillError("Served(api_key=…) is the key of a server, and the model is none; leave it out.")


def refuse_for_endpoints(address: str, *, remote: bool | str, answers: Any, temperature: float | None) -> None:
    """Raise DistillError for settings that a model behind an address does not have."""
    if remote:
        raise DistillError(f"Served({address!r}, remote={remote!r}) names two hosts; leave remote out.")
    if answers is not None:
        raise DistillError(f"Served({address!r}, answers=…) reads an output, and a server gives none; leave it out.")
    if temperature not in (None, 1.0):
        raise DistillError(
            f"Served({address!r}, temperature={temperature}): a server gives the probabilities of temperature 1, by "
            "which those of the other tokens are known together; leave it out, and use KD(temperature=1.0)."
        )


def refuse_inside(model: Any) -> None:
    """Raise DistillError for activations and counterfactuals of a model behind an address."""
    if isinstance(model, Endpoint):
        model.forward(Tensor())


def check_answer(kept: Kept, rows: int, network: nn.Module, top_k: int | None) -> None:
    """Raise DistillError for an answer that cannot be kept.

    Args:
        kept: the logits of the answer, or their largest.
        rows: the number of samples in the request.
        network: the teacher; its configuration names its kind of problem.
        top_k: how many of the largest logits are kept; None is all.
    """
    problem = getattr(getattr(network, "config", None), "problem_type", None)
    if "values" in kept and problem in ("multi_label_classification", "regression"):
        raise DistillError(
            f"top_k={top_k} keeps the most probable of classes that exclude each other, and this teacher is one of "
            f"{problem}; leave top_k out."
        )
    answers = kept.get("logits", kept.get("values"))
    if answers is None or not answers.ndim or len(answers) != rows:
        raise DistillError(
            f"the teacher answers {rows} samples with logits of shape "
            f"{None if answers is None else list(answers.shape)}; it must return one row for each."
        )
    wrong = int(answers.isnan().flatten(1).any(1).sum())
    if wrong:
        raise DistillError(
            f"the teacher answers NaN to {wrong} of {rows} samples, and no such answer is kept; see whether its "
            "inputs are: data[name].isfinite().all(), and its weights."
        )


def agree(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> bool:
    """Return whether two answers to one sample are those of one teacher, up to rounding on another machine.

    That is, whether their mean squared difference is at most 1 % of the variance of the earlier logits (of their mean
    square, if there is one logit).
    """
    old, new = dense(dict(before)).float(), dense({name: value.cpu() for name, value in now.items()}).float()
    scale = old.square().mean() if old.shape[-1] == 1 else old.var(correction=0)
    return old.shape == new.shape and bool((old - new).square().mean() <= 0.01 * scale + 1e-6)


def load_weights(model: Any) -> None:
    """Load the weights of a model of nnsight, which delays that until their first use; refuse one that has none."""
    if getattr(model, "dispatched", True) is False:
        model.dispatch()
    refuse_valueless(network_of(model), "Served")


def recorded_at(activations: Mapping[Location, Tensor], location: Location) -> Tensor:
    """Return the activation at a location that was fetched with a counterfactual run, or raise DistillError."""
    if location not in activations:
        raise DistillError(
            f"{location} of the served teacher was not fetched with its counterfactual run; this is an error in an "
            "objective, which must name it in `reads`."
        )
    return activations[location]
