"""Whose tokens those at a place are: of the text that a call reads, of an encoder, or of an image beside it."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from interventions.models.calls import parameters_of
from interventions.models.overrides import exception_for
from interventions.models.sites import CROSS
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
    """Whose tokens those of a part of a model are.

    Attributes:
        mask: the argument of the model that says which of them are real; "" if none does.
        encodes: whether all of them are there from the start, and none is generated: past, prompt and steps of the
            call are not theirs.
        beside: whether they are no tokens of the text, or of the one input, that the model reads: of an image, of a
            sound, or queries of a number of their own.
        supposed: whether the mask is called so by convention alone: the model names no argument so.
    """

    mask: str
    encodes: bool = False
    beside: bool = False
    supposed: bool = False


NOWHERE = Side("")


def side_of(model: nn.Module, path: str, *, sided: bool, block: str | None = None, io: str = "output") -> Side:
    """Whose tokens those of the module at `path` are.

    It is told by the names on the path and by the configuration of the parts, in a model that reads text beside
    something else; `interventions.models.overrides` says it where these mislead.

    Args:
        sided: whether the model has an encoder and a decoder.
        block: the path of the block around the module, if there is one.
        io: "key" and "value" of a cross-attention are of what is attended to.
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
    """Whether a model has an encoder and a decoder, by the names and paths of its stacks."""
    if {"encoder", "decoder"} <= stacks.keys():
        return True
    if "decoder_input_ids" not in parameters_of(unwrapped(model)[-1]):
        return False
    return {"encoder", "decoder"} <= {_kind_of(path) for path in stacks.values() if not _is_beside(model, path)}


def _kind_of(path: str) -> str:
    """Return "encoder" or "decoder", as the outermost name on a path says; "" if none does."""
    return next((found[1] for found in map(_SIDE.fullmatch, path.split(".")) if found is not None), "")


def _is_beside(model: nn.Module, path: str) -> bool:
    """Whether a part of a model that reads text is none of what reads it."""
    if "input_ids" not in parameters_of(unwrapped(model)[-1]):
        return False
    return _BESIDE.search(path) is not None or _is_another_part(model, path)


def _mask_beside(path: str, takes: Mapping[str, object]) -> str:
    """The argument that masks what a tower reads, by its name."""
    for words, named in _MASKS.items():
        if re.search(words, path, re.I):
            fits = (name for name in takes if name.endswith("mask") and re.search(named, name, re.I))
            return next(fits, "")
    return ""


def _is_another_part(model: nn.Module, path: str) -> bool:
    """Whether the configuration of the innermost part around a module is one beside that of the text."""
    config = getattr(unwrapped(model)[-1], "config", None)
    names = getattr(config, "sub_configs", {})
    if "text_config" not in names:
        return False
    parts = {name: getattr(config, name, None) for name in names}
    for module in reversed(list(_around(model, path))):
        own = getattr(module, "config", None)
        mine = [name for name, part in parts.items() if own is part]
        mine = mine or [name for name, part in parts.items() if own is not None and type(own) is type(part)]
        if len(mine) == 1 and own is not config:
            return mine[0] != "text_config"
    return False


def _around(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The model and what is on the way to the module at `path`, with it."""
    module = model
    yield module
    for name in path.split(".") if path else ():
        module = module.get_submodule(name)
        yield module


def lengths_at(model: nn.Module, path: str, side: Side) -> nn.Module | None:
    """The part of a model that says how many tokens its convolutions make of so many frames; of a text none."""
    if not side.encodes and "input_ids" in parameters_of(unwrapped(model)[-1]):
        return None
    for module in reversed(list(_around(model, path))):
        for part in (module, *module.children()):
            if any(hasattr(type(part), name) for name in _LENGTHS):
                return part
    return None


def token_lengths(part: nn.Module, frames: Tensor, whole: int, width: int) -> Tensor | None:
    """How many tokens the convolutions of `part` make of so many frames, `[batch]`; None if not `width` of `whole`."""
    counts: list[Callable[..., Any]] = [getattr(part, name) for name in _LENGTHS if hasattr(part, name)]
    for count in counts:
        for settings in ({"add_adapter": False}, {}):
            try:
                made = count(frames.new_tensor([*frames.tolist(), whole]), **settings)
            except TypeError:  # it has no adapter
                continue
            for lengths in made if isinstance(made, tuple) else (made,):
                if int(lengths[-1]) == width:
                    return lengths[:-1]
    return None
