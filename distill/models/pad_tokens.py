"""The padding token of a model: classifiers of decoders answer at the last token that is no padding, so need one."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import DistillError
from interventions import on_host

POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions", "max_source_positions")


def counts_padding(network: nn.Module) -> bool:
    """Return whether a model recognizes padding by its token: to answer at the last other one, or to number others."""
    return type(network).__name__.endswith("ForSequenceClassification") or numbers_by_padding(network)


def numbers_by_padding(network: nn.Module) -> bool:
    """Return whether a model numbers its tokens itself, without padding, as RoBERTa does."""
    return any(
        getattr(module, "padding_idx", None) is not None and "position" in name.rpartition(".")[2]
        for name, module in network.named_modules()
    )


def pad_token_of(network: nn.Module) -> int | None:
    """Return the padding token of a model, by its configuration; None if it names none."""
    pad = getattr(_config_of(network), "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 else None


def longest_input(network: nn.Module) -> int | None:
    """Return the number of tokens in a network's table of positions; None without a table or a stated size."""
    config = _config_of(network)
    known = [size for name in POSITIONS if isinstance(size := getattr(config, name, None), int) and size > 0]
    tables = (name for name, module in network.named_modules() if isinstance(module, nn.Embedding))
    if not known or not any("pos" in name or name.endswith("wpe") for name in tables):
        return None
    return min(known) - (1 + (pad_token_of(network) or 0) if numbers_by_padding(network) else 0)


@contextmanager
def pad_token_named(network: nn.Module) -> Iterator[None]:
    """Let a classifier without a padding token pad with its end token inside a block, with a warning."""
    token = _end_token_of(network) if _lacks_pad_token(network) else None
    if token is None:
        yield
        return
    config = _config_of(network)
    warnings.warn(
        f"{type(network).__name__} has no padding token, so texts are padded with its end token {token}; a student "
        f"keeps that, other models are unchanged afterwards. To choose: model.config.pad_token_id = {token}.",
        stacklevel=1,
    )
    config.pad_token_id = token
    try:
        yield
    finally:
        config.pad_token_id = None


def keep_pad_token(network: nn.Module) -> None:
    """Set the padding token of a classifier without one to its end token, permanently."""
    if _lacks_pad_token(network):
        _config_of(network).pad_token_id = _end_token_of(network)


def padded_as_known(network: nn.Module, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the columns of a batch, padded with the padding token of the model.

    Raises:
        DistillError: several texts for a classifier without a padding token and without an end token.
    """
    ids, mask = columns.get("input_ids"), columns.get("attention_mask")
    if ids is not None and len(ids) > 1 and _lacks_pad_token(network) and _end_token_of(network) is None:
        raise DistillError(
            f"{type(network).__name__} answers at the last token that is no padding, and has no padding token: "
            "config.pad_token_id=None; name one: model.config.pad_token_id = …."
        )
    if ids is None or mask is None or mask.shape != ids.shape or bool(on_host(mask).bool().all()):
        return dict(columns)
    pad = pad_token_of(network)
    if pad is None or not counts_padding(network):
        return dict(columns)
    return {**columns, "input_ids": torch.where(mask.bool(), ids, pad)}


def _lacks_pad_token(network: nn.Module) -> bool:
    """Return whether a model classifies texts by their last token and has no padding token."""
    if not type(network).__name__.endswith("ForSequenceClassification"):
        return False
    config = _config_of(network)
    return (
        hasattr(config, "pad_token_id")
        and config.pad_token_id is None
        and getattr(config, "vocab_size", None) is not None
        and not getattr(config, "is_encoder_decoder", False)
    )


def _end_token_of(network: nn.Module) -> int | None:
    end = getattr(_config_of(network), "eos_token_id", None)
    return next(iter(end), None) if isinstance(end, list | tuple) else end


def _config_of(network: nn.Module) -> Any:
    """Return the configuration of a model, or of its text part."""
    config: Any = getattr(network, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
