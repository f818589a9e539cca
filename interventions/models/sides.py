"""Tell to which input the tokens at a place belong: the text of the call, the text of an encoder, or an image."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from interventions.models.attentions import CROSS
from interventions.models.calls import parameters_of
from interventions.models.overrides import exception_for
from interventions.models.wrappers import unwrapped

_BESIDE = re.compile(
    "vision|visual|image|pixel|video|audio|speech|protein|perceiver|resampler|q_?former|projector|connector", re.I
)
_MASKS = {  # words of a path → those of the argument that masks it
    "vision|visual|image|pixel": "pixel|visual|vision|image",
    "video": "video",
    "audio|speech": "feature|audio|speech",
    "protein": "protein",
    "q_?former": "q_?former",
}
_SIDE = re.compile(r"(?:.*_)?(encoder|decoder)")
_FRONT = re.compile("shared|embed", re.I)
_LENGTHS = ("_get_feat_extract_output_lengths", "_get_subsampling_output_length")


@dataclass(frozen=True)
class Side:
    """The input to which the tokens in a part of a model belong.

    Attributes:
        mask: the argument of the model that masks its padding; "" if none does.
        encodes: whether all its tokens are there from the start and none is generated, so that past, prompt and steps
            of the call do not apply to them.
        beside: whether it is something else than the text, or the one input, that the model reads: an image, a sound,
            or a number of learned queries.
        supposed: whether the name of the mask is a mere convention, and no argument of the model has it.
    """

    mask: str
    encodes: bool = False
    beside: bool = False
    supposed: bool = False


NOWHERE = Side("")


def side_of(model: nn.Module, path: str, *, sided: bool, block: str | None = None, io: str = "output") -> Side:
    """Return the input to which the tokens in the module at `path` belong.

    In a model that reads text beside something else, the names on the path and the configurations of the parts decide;
    where these mislead, `interventions.models.overrides` does.

    Args:
        sided: whether the model has an encoder and a decoder.
        block: the path of the block around the module, if there is one.
        io: the side of the module; "key" and "value" of a cross-attention belong to the input attended to.
    """
    takes = parameters_of(unwrapped(model)[-1])
    crosses = io in ("key", "value") and CROSS.search(path if block is None else path.removeprefix(block)) is not None
    exception = exception_for(model)
    stated = exception.masks if exception is not None else {}
    for part, mask in stated.items():
        if part and f".{part}." in f".{path}." and not crosses:
            return Side(mask, encodes=True, beside=not mask)
    if _is_beside(model, path):
        return Side("" if crosses else _mask_beside(path, takes), encodes=True, beside=True)
    if crosses:
        mask = "attention_mask" if sided else "encoder_attention_mask"
        return Side(mask if mask in takes else "", encodes=True)
    kind = _kind_of(path) if sided else ""
    encodes = sided and (kind == "encoder" or (not kind and _FRONT.search(path) is not None))
    if "" in stated and not sided:
        return Side(stated[""])
    reads = {"decoder_input_ids", "decoder_attention_mask"} & set(takes)  # else both sides are of one text
    mask = "decoder_attention_mask" if sided and reads and not encodes else "attention_mask"
    return Side(mask, encodes, supposed=mask not in takes)


def has_sides(model: nn.Module, stacks: Mapping[str, str]) -> bool:
    """Return whether a model has an encoder and a decoder, by the names and paths of its stacks."""
    if {"encoder", "decoder"} <= stacks.keys():
        return True
    if "decoder_input_ids" not in parameters_of(unwrapped(model)[-1]):
        return False
    return {"encoder", "decoder"} <= {_kind_of(path) for path in stacks.values() if not _is_beside(model, path)}


def _kind_of(path: str) -> str:
    """Return "encoder" or "decoder", as the outermost name on a path says; "" if none does."""
    return next((found[1] for found in map(_SIDE.fullmatch, path.split(".")) if found is not None), "")


def _is_beside(model: nn.Module, path: str) -> bool:
    """Return whether a part of a model that reads text reads something else."""
    if "input_ids" not in parameters_of(unwrapped(model)[-1]):
        return False
    return _BESIDE.search(path) is not None or _is_another_part(model, path)


def _mask_beside(path: str, takes: Mapping[str, object]) -> str:
    """Return the argument that masks the input of a tower (images, sounds, …), by its name; "" if none does."""
    for path_words, argument_words in _MASKS.items():
        if re.search(path_words, path, re.I):
            fits = (name for name in takes if name.endswith("mask") and re.search(argument_words, name, re.I))
            return next(fits, "")
    return ""


def _is_another_part(model: nn.Module, path: str) -> bool:
    """Return whether the innermost part with a configuration around a module has another one than the text."""
    config = getattr(unwrapped(model)[-1], "config", None)
    names = getattr(config, "sub_configs", {})
    if "text_config" not in names:
        return False
    parts = {name: getattr(config, name, None) for name in names}
    for module in reversed(list(_around(model, path))):
        own = getattr(module, "config", None)
        fitting = [name for name, part in parts.items() if own is part]
        fitting = fitting or [name for name, part in parts.items() if own is not None and type(own) is type(part)]
        if len(fitting) == 1 and own is not config:
            return fitting[0] != "text_config"
    return False


def _around(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """Yield the model and the modules on the way to the one at `path`, that one included."""
    module = model
    yield module
    for name in path.split(".") if path else ():
        module = module.get_submodule(name)
        yield module


def lengths_at(model: nn.Module, path: str, side: Side) -> nn.Module | None:
    """Return the part of a model that counts the tokens its convolutions make of frames; None for a text."""
    if not side.encodes and "input_ids" in parameters_of(unwrapped(model)[-1]):
        return None
    for module in reversed(list(_around(model, path))):
        for part in (module, *module.children()):
            if any(hasattr(type(part), name) for name in _LENGTHS):
                return part
    return None


def token_lengths(part: nn.Module, frames: Tensor, whole: int, width: int) -> Tensor | None:
    """Return how many tokens the convolutions of `part` make of so many frames.

    Args:
        frames: the numbers of real frames, `[batch]`.
        whole: the number of all frames.
        width: the number of tokens at the place.

    Returns:
        The numbers of tokens `[batch]`; None if the convolutions do not make `width` tokens of `whole` frames.
    """
    counts: list[Callable[..., Any]] = [getattr(part, name) for name in _LENGTHS if hasattr(part, name)]
    for count in counts:
        for settings in ({"add_adapter": False}, {}):
            try:
                counted = count(frames.new_tensor([*frames.tolist(), whole]), **settings)
            except TypeError:  # it has no adapter
                continue
            for lengths in counted if isinstance(counted, tuple) else (counted,):
                if int(lengths[-1]) == width:
                    return lengths[:-1]
    return None
