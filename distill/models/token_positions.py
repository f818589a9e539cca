"""Where in its text a token stands: counted from the first real token, in packed rows from that of each document.

Without `position_ids` most models count from the start of the row, so that padding on the left moves every token; and
transformers keeps packed documents apart by their `position_ids` only where it is given no attention mask.
"""

from collections.abc import Iterable, Mapping
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from einops import rearrange
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn

from distill.errors import DistillError
from distill.models.modes import in_eval_mode

_FIRST: "WeakKeyDictionary[nn.Module, int | None]" = WeakKeyDictionary()
_APART: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


def placed(network: nn.Module, columns: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model is called with, so that its tokens stand where they stand in their texts.

    Args:
        network: whose `forward` names its arguments.
        columns: those of the batch that it names.
        batch: all columns.

    Raises:
        DistillError: packed rows for a model that does not keep documents apart.
    """
    if is_packed(batch):
        return _packed(network, columns)
    mask, tokens = columns.get("attention_mask"), columns.get("input_ids", columns.get("inputs_embeds"))
    if mask is None or tokens is None or mask.ndim != 2 or mask.shape != tokens.shape[:2] or "position_ids" in columns:
        return dict(columns)
    if "position_ids" not in signature(network.forward).parameters or bool(mask[:, 0].all()):
        return dict(columns)
    first = _first_number(network)
    return dict(columns) if first is None else {**columns, "position_ids": counted(mask) + first}


def counted(mask: Shaped[Tensor, "batch token"]) -> Int[Tensor, "batch token"]:
    """The place of each token after the first real one of its row; padding before it is at 0 too.

    >>> counted(torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]))
    tensor([[0, 0, 0, 1, 2],
            [0, 1, 2, 3, 4]])
    """
    before = rearrange(mask.bool().int().argmax(1), "row -> row 1")
    return (torch.arange(mask.shape[1], device=mask.device) - before).clamp(min=0)


def is_packed(batch: Mapping[str, Tensor]) -> bool:
    """Whether a row holds several documents: its `position_ids` begin anew among its real tokens."""
    return "position_ids" in batch and bool(starts(batch)[:, 1:].any())


def starts(batch: Mapping[str, Tensor]) -> Bool[Tensor, "batch token"]:
    """Which real tokens are the first of a document, by `position_ids`; of the first of all only where it says so."""
    positions, mask = batch["position_ids"], batch.get("attention_mask")
    if positions.ndim != 2:
        return torch.zeros(len(positions), 2, dtype=torch.bool, device=positions.device)
    real = torch.ones_like(positions).bool()
    if mask is not None and mask.shape == positions.shape:
        real = mask.bool()
    begins = torch.ones_like(real)
    begins[:, 1:] = (positions.diff(dim=1) != 1) & real[:, :-1]
    return begins & real


def _packed(network: nn.Module, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The columns without the mask; padding is a document of its own, one a token."""
    name = type(network).__name__
    if "position_ids" not in columns or not _keeps_apart(network):
        raise DistillError(
            f"the rows are packed (position_ids begin anew within a row), and {name} lets the tokens of one document "
            "see those of another; give each document a row of its own."
        )
    positions, mask = columns["position_ids"], columns.get("attention_mask")
    if mask is not None and mask.shape == positions.shape:
        positions = positions.masked_fill(~mask.bool(), 0)
    return {**{name: value for name, value in columns.items() if name != "attention_mask"}, "position_ids": positions}


def _first_number(network: nn.Module) -> int | None:
    """The number that a model gives to the first token of a row, tried out; None where it makes them in its own way."""
    if network not in _FIRST:
        numbers = [0, *(int(b.flatten()[0]) for name, b in network.named_buffers() if _last(name) == "position_ids")]
        tables = [module for name, module in network.named_modules() if "position" in _last(name)]
        numbers += [pad + 1 for each in tables if isinstance(pad := getattr(each, "padding_idx", None), int)]
        axes = any(hasattr(module, "get_rope_index") for module in network.modules())
        _FIRST[network] = None if axes else _tried_first(network, dict.fromkeys(numbers))
    return _FIRST[network]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _tried_first(network: nn.Module, numbers: Iterable[int]) -> int | None:
    given = {"input_ids": _tokens(network)[:1], "attention_mask": torch.ones_like(_tokens(network)[:1])}
    wanted = _tried(network, given)
    if wanted is None:
        return None
    for number in numbers:
        found = _tried(network, {**given, "position_ids": number + torch.arange(4, device=wanted.device)[None]})
        if found is not None and bool((found - wanted).abs().max() <= 1e-4 * wanted.abs().max()):
            return number
    return None


def _keeps_apart(network: nn.Module) -> bool:
    """Whether a document of a packed row is answered alike whatever stands before it, tried out on four tokens."""
    if network not in _APART:
        _APART[network] = _tried_apart(network)
    return _APART[network]


def _tried_apart(network: nn.Module) -> bool:
    ids = _tokens(network)
    answers = _tried(network, {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 0, 1]] * 2, device=ids.device)})
    if answers is None or answers.ndim != 3 or answers.shape[:2] != ids.shape:
        return False
    one, other = answers[:, 2:]
    return bool((one - other).abs().max() <= 1e-6 * one.abs().max())


def _tokens(network: Any) -> Int[Tensor, "2 4"]:
    """Two rows of tokens that end alike."""
    ids = torch.tensor([[12, 13, 14, 15], [16, 17, 14, 15]], device=next(network.parameters()).device)
    try:
        known = getattr(network.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):
        known = None
    known = known or getattr(getattr(network, "config", None), "vocab_size", None)
    return ids % known if isinstance(known, int) and known else ids


def _tried(network: Any, given: Mapping[str, Tensor]) -> Tensor | None:
    """What a model answers, in eval mode, without a cache or a graph; None where it cannot be called so."""
    takes = signature(network.forward).parameters.keys()
    settings = {"use_cache": False} if {"use_cache", "kwargs"} & takes else {}
    device = next(iter(given.values())).device
    try:
        with in_eval_mode(network), torch.no_grad(), torch.autocast(device.type, enabled=False):
            output = network(**given, **settings)
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None
    named = output if isinstance(output, Mapping) else {}
    parts = [named.get("logits"), named.get("last_hidden_state"), *(named.values() or output)]
    found = (each for each in parts if isinstance(each, Tensor) and each.is_floating_point())
    return next((each.float() for each in found), None)
