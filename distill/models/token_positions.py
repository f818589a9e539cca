"""Positions of tokens in their text: counted from the first real token, in packed rows from that of each document.

Without `position_ids` most models count from the start of the row, so that padding on the left moves every token; and
transformers separates packed documents by their `position_ids` only if it gets no attention mask.
"""

from collections.abc import Iterable, Mapping
from inspect import Parameter, signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from einops import rearrange
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn

from distill.errors import DistillError
from distill.models.host_copies import host_columns
from distill.models.modes import in_eval_mode
from interventions import on_host

_FIRST: "WeakKeyDictionary[nn.Module, int | None]" = WeakKeyDictionary()
_PARAMETERS: "WeakKeyDictionary[Any, Mapping[str, Parameter]]" = WeakKeyDictionary()
_SEPARATES: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


def placed(network: nn.Module, columns: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs of a model with `position_ids` that count from the start of each text, if it needs them.

    Args:
        network: a model whose `forward` names its arguments.
        columns: the columns of the batch that it names.
        batch: all columns.

    Raises:
        DistillError: packed rows for a model that does not separate documents.
    """
    if is_packed(batch):
        return _packed(network, columns)
    mask, tokens = columns.get("attention_mask"), columns.get("input_ids", columns.get("inputs_embeds"))
    if mask is None or tokens is None or mask.ndim != 2 or mask.shape != tokens.shape[:2] or "position_ids" in columns:
        return dict(columns)
    if "position_ids" not in parameters_of(network) or bool(on_host(mask)[:, 0].all()):
        return dict(columns)
    first = _first_number(network)
    return dict(columns) if first is None else {**columns, "position_ids": counted(mask) + first}


def without_usual_positions(network: nn.Module, sample: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the columns of one text without its `position_ids`, if they are those that the model counts by itself.

    So a text is the same one in batches with and without padding on the left, which alone need `position_ids`.
    """
    positions = sample.get("position_ids")
    if positions is None or positions.ndim != 1 or "attention_mask" not in sample:
        return dict(sample)
    first = _first_number(network)
    usual = None if first is None else torch.arange(len(positions), device=positions.device) + first
    if usual is None or not torch.equal(positions, usual.to(positions.dtype)):
        return dict(sample)
    return {name: column for name, column in sample.items() if name != "position_ids"}


def parameters_of(network: nn.Module) -> Mapping[str, Parameter]:
    """Return the parameters of a model's `forward`, which are found once for each function."""
    forward = network.forward
    function = getattr(forward, "__func__", forward)
    if function not in _PARAMETERS:
        _PARAMETERS[function] = signature(forward).parameters
    return _PARAMETERS[function]


def counted(mask: Shaped[Tensor, "batch token"]) -> Int[Tensor, "batch token"]:
    """Return the position of each token, counted from the first real one of its row; padding before it has 0 too.

    >>> counted(torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]))
    tensor([[0, 0, 0, 1, 2],
            [0, 1, 2, 3, 4]])
    """
    before = rearrange(mask.bool().int().argmax(1), "row -> row 1")
    return (torch.arange(mask.shape[1], device=mask.device) - before).clamp(min=0)


def is_packed(batch: Mapping[str, Tensor]) -> bool:
    """Return whether a row holds several documents: its `position_ids` begin anew among its real tokens."""
    return "position_ids" in batch and bool(starts(host_columns(batch))[:, 1:].any())


def starts(batch: Mapping[str, Tensor]) -> Bool[Tensor, "batch token"]:
    """Return which real tokens are the first of a document, by `position_ids`.

    The first token of a row with padding on the left is not among them.
    """
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
    """Return the columns without the mask; each token of padding becomes a document."""
    name = type(network).__name__
    if "position_ids" not in columns or not _separates_documents(network):
        raise DistillError(
            f"the rows are packed (position_ids begin anew within a row), and {name} lets the tokens of one document "
            "see those of another; give each document a row of its own."
        )
    positions, mask = columns["position_ids"], columns.get("attention_mask")
    if mask is not None and mask.shape == positions.shape:
        positions = positions.masked_fill(~mask.bool(), 0)
    return {**{name: value for name, value in columns.items() if name != "attention_mask"}, "position_ids": positions}


def _first_number(network: nn.Module) -> int | None:
    """Return the number of the first position of a model, found by trial runs; None if it numbers in another way."""
    if network not in _FIRST:
        numbers = [0, *(int(b.flatten()[0]) for name, b in network.named_buffers() if _last(name) == "position_ids")]
        tables = [module for name, module in network.named_modules() if "position" in _last(name)]
        numbers += [pad + 1 for each in tables if isinstance(pad := getattr(each, "padding_idx", None), int)]
        axes = any(hasattr(module, "get_rope_index") for module in network.modules())
        _FIRST[network] = None if axes else _try_first_numbers(network, dict.fromkeys(numbers))
    return _FIRST[network]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _try_first_numbers(network: nn.Module, numbers: Iterable[int]) -> int | None:
    """Return the first of these numbers that gives the answers that the model gives without `position_ids`."""
    given = {"input_ids": _tokens(network)[:1], "attention_mask": torch.ones_like(_tokens(network)[:1])}
    wanted = _try(network, given)
    if wanted is None:
        return None
    for number in numbers:
        found = _try(network, {**given, "position_ids": number + torch.arange(4, device=wanted.device)[None]})
        if found is not None and bool((found - wanted).abs().max() <= 1e-4 * wanted.abs().max()):
            return number
    return None


def _separates_documents(network: nn.Module) -> bool:
    """Return whether the answers to a document are independent of the one before it in its row, by a trial run."""
    if network not in _SEPARATES:
        _SEPARATES[network] = _try_two_documents(network)
    return _SEPARATES[network]


def _try_two_documents(network: nn.Module) -> bool:
    """Return whether two rows with the same second document have the same answers to it."""
    ids = _tokens(network)
    answers = _try(network, {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 0, 1]] * 2, device=ids.device)})
    if answers is None or answers.ndim != 3 or answers.shape[:2] != ids.shape:
        return False
    one, other = answers[:, 2:]
    return bool((one - other).abs().max() <= 1e-6 * one.abs().max())


def _tokens(network: Any) -> Int[Tensor, "2 4"]:
    """Return two rows of tokens with the same second half."""
    ids = torch.tensor([[12, 13, 14, 15], [16, 17, 14, 15]], device=next(network.parameters()).device)
    try:
        known = getattr(network.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):
        known = None
    known = known or getattr(getattr(network, "config", None), "vocab_size", None)
    return ids % known if isinstance(known, int) and known else ids


def _try(network: Any, given: Mapping[str, Tensor]) -> Tensor | None:
    """Return the answers of a model in eval mode, without a cache or a graph; None if the call fails."""
    takes = parameters_of(network).keys()
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
