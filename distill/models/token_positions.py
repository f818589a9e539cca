"""Positions of tokens in their text: counted from the first real token, in packed rows from that of each document.

Without `position_ids` most models count from the start of the row, so that padding on the left moves every token.

Packed documents are kept apart in one of two ways. Models of transformers with masks of its own find them by their
`position_ids`, if they get neither an attention mask nor a cache. Others take an attention mask over pairs of tokens,
`[batch, 1, token, token]`. A trial run shows which way leads to the answers that a document has alone.
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
from interventions import InterventionError, architecture, on_host

_FIRST: "WeakKeyDictionary[nn.Module, int | None]" = WeakKeyDictionary()
_PARAMETERS: "WeakKeyDictionary[Any, Mapping[str, Parameter]]" = WeakKeyDictionary()
_SEPARATES: "WeakKeyDictionary[nn.Module, str | None]" = WeakKeyDictionary()
BY_POSITIONS, BY_PAIRS = "positions", "pairs"
"""How a model keeps packed documents apart."""


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
        return _packed(network, columns, batch)
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


def _packed(network: nn.Module, columns: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the columns with what keeps documents apart in a model; each token of padding becomes a document.

    Raises:
        DistillError: a model that lets documents see each other.
    """
    way = _separation(network) if {"position_ids", "attention_mask"} & parameters_of(network).keys() else None
    if way is None:
        raise DistillError(
            f"the rows are packed (position_ids begin anew within a row), and {type(network).__name__} lets the tokens "
            "of one document see those of another; give each document a row of its own."
        )
    positions, mask = batch["position_ids"], batch.get("attention_mask")
    real = torch.ones_like(positions).bool() if mask is None or mask.shape != positions.shape else mask.bool()
    others = {name: value for name, value in columns.items() if name not in ("attention_mask", "position_ids")}
    return {**others, **_apart(network, positions.masked_fill(~real, 0), way)}


def _apart(network: nn.Module, positions: Int[Tensor, "batch token"], way: str) -> dict[str, Tensor]:
    """Return the inputs by which a model keeps documents apart."""
    found = {}
    if "position_ids" in parameters_of(network):
        found["position_ids"] = positions + (_first_number(network) or 0)
    if way == BY_PAIRS:
        dtype = next((each.dtype for each in network.parameters() if each.is_floating_point()), torch.float32)
        begins = torch.ones_like(positions).bool()
        begins[:, 1:] = positions.diff(dim=1) != 1
        document = begins.cumsum(1)
        pairs = rearrange(document, "row token -> row 1 token 1") == rearrange(document, "row token -> row 1 1 token")
        hidden = ~pairs.tril()
        found["attention_mask"] = torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill(
            hidden, torch.finfo(dtype).min
        )
    return found


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


def _separation(network: nn.Module) -> str | None:
    """Return how a model keeps documents apart, by trial runs; None if it lets them see each other."""
    if network not in _SEPARATES:
        ways = (way for way in (BY_POSITIONS, BY_PAIRS) if _try_two_documents(network, way))
        _SEPARATES[network] = next(ways, None)
    return _SEPARATES[network]


def _try_two_documents(network: nn.Module, way: str) -> bool:
    """Return whether the second document of a row has the answers that it has alone, whatever the first one is."""
    ids = _tokens(network)
    positions = torch.tensor([[0, 1, 0, 1]] * 2, device=ids.device)
    answers, alone = (
        _try(network, {"input_ids": tokens, **_apart(network, places, way)}, as_runs_are=True)
        for tokens, places in ((ids, positions), (ids[:1, 2:], positions[:1, 2:]))
    )
    if answers is None or alone is None or answers.ndim != 3 or answers.shape[:2] != ids.shape:
        return False
    one, other = answers[:, 2:]
    plain = _try(network, {"input_ids": ids[:1, 2:]})
    size = one.abs().max()
    return (
        bool((one - other).abs().max() <= 1e-6 * size)
        and bool((one - alone[0]).abs().max() <= 1e-4 * size)
        and (plain is None or bool((one - plain[0]).abs().max() <= 1e-4 * size))
    )


def _tokens(network: Any) -> Int[Tensor, "2 4"]:
    """Return two rows of tokens with the same second half."""
    ids = torch.tensor([[12, 13, 14, 15], [16, 17, 14, 15]], device=next(network.parameters()).device)
    try:
        known = getattr(network.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):
        known = None
    known = known or getattr(getattr(network, "config", None), "vocab_size", None)
    return ids % known if isinstance(known, int) and known else ids


def _try(network: Any, given: Mapping[str, Tensor], *, as_runs_are: bool = False) -> Tensor | None:
    """Return the answers of a model in eval mode, without a graph; None if the call fails.

    Args:
        network: the model.
        given: its inputs.
        as_runs_are: whether a cache is used where runs have one, as a cache may change what sees what; else there is
            none.
    """
    takes = parameters_of(network).keys()
    has_none = {"use_cache", "kwargs"} & takes and not (as_runs_are and _keeps_cache(network))
    settings = {"use_cache": False} if has_none else {}
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


def _keeps_cache(network: nn.Module) -> bool:
    """Return whether runs of a model have a cache: those of models that cannot be resumed from a block."""
    try:
        return not architecture(network).resumes
    except InterventionError:
        return True
