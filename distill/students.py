"""A smaller model from a teacher's layers."""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from distill.errors import DistillError
from distill.mapping import depth
from interventions import Location, architecture

_PER_LAYER = ("layer_types", "mlp_layer_types")


def spread(count: int, of: int) -> tuple[int, ...]:
    """`count` layers of a teacher with `of`, evenly spread from the first to the last.

    >>> spread(6, 12)  # as DistilBERT: Sanh et al. 2019 (arXiv:1910.01108)
    (0, 2, 4, 7, 9, 11)
    """
    return tuple(round(i * (of - 1) / max(count - 1, 1)) for i in range(count))


def from_layers(teacher: nn.Module, layers: int | Sequence[int]) -> nn.Module:
    """A student like the teacher with some of its layers, and the teacher's weights in them and everywhere else.

    Args:
        teacher: a transformers model.
        layers: which of its layers, in order, −1 is the last; or how many, spread evenly from the first to the last.
        For
            encoder–decoders, those of the decoder.

    Returns:
        A model of the same class, in the mode of the teacher, on its device; nothing is shared with the teacher.

    Raises:
        DistillError: a model without a transformers configuration, or a layer that does not exist.
    """
    deep = depth(teacher)
    chosen = _chosen(layers, deep)
    if not hasattr(teacher, "config") or not hasattr(teacher, "save_pretrained"):
        raise DistillError(
            f"{type(teacher).__name__} has no transformers configuration to build a smaller model from; build the "
            "student "
            "yourself and pass it to distill.fit(teacher, student, ...)."
        )
    config = copy.deepcopy(teacher.config)
    for name in _PER_LAYER:
        if getattr(config, name, None):
            setattr(config, name, [getattr(config, name)[layer] for layer in chosen])
    setattr(config, _count_name(config), len(chosen))
    parameter = next(teacher.parameters())
    with torch.random.fork_rng(devices=[]):
        student = type(teacher)(config).to(parameter.device, parameter.dtype)
    _copy(teacher, student, chosen)
    for name in ("task_specific_params", "generation_config"):
        if getattr(teacher, name, None) is not None:
            setattr(student, name, copy.deepcopy(getattr(teacher, name)))
    return student.train(teacher.training)


def _chosen(layers: int | Sequence[int], deep: int) -> tuple[int, ...]:
    if isinstance(layers, int):
        if not 1 <= layers <= deep:
            raise DistillError(
                f"a student of {layers} layers cannot be made from a teacher of {deep}; choose 1 to {deep}."
            )
        return spread(layers, deep)
    wrong = [layer for layer in layers if not -deep <= layer < deep]
    if wrong or not layers:
        raise DistillError(
            f"layers={list(layers)} cannot be taken from a teacher of {deep} layers (0 to {deep - 1}); name at "
            "least one that exists."
        )
    return tuple(layer % deep for layer in layers)


def _count_name(config: object) -> str:
    if getattr(config, "is_encoder_decoder", False):
        names = ("decoder_layers", "num_decoder_layers")
        return next(name for name in names if hasattr(config, name))
    return "num_hidden_layers"


def _copy(teacher: nn.Module, student: nn.Module, chosen: tuple[int, ...]) -> None:
    if depth(student) != len(chosen):
        raise DistillError(
            f"the configuration of {type(teacher).__name__} does not decide its number of layers ({depth(student)} "
            "were built, "
            f"{len(chosen)} asked for); build the student yourself and pass it to distill.fit(teacher, student, ...)."
        )
    stack = architecture(teacher).place(Location(0)).path.rsplit(".", 1)[0]
    weights = teacher.state_dict()
    with torch.no_grad():
        for name, target in student.state_dict().items():
            source = name
            if name.startswith(f"{stack}."):
                index, _, rest = name.removeprefix(f"{stack}.").partition(".")
                source = f"{stack}.{chosen[int(index)]}.{rest}"
            # T5 keeps its relative positions in the first block alone: the first of the student gets them.
            target.copy_(weights[source if source in weights else name])
