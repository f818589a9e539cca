"""Tiny models that write, prompts for them, and trainings on what they write."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill import Rows
from tests.distill.tiny_models import VOCABULARY, WIDTH, gpt2_lm, llama, spread, t5

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]
COMPLETIONS = [[16, 17], [18, 19, 20], [21], [22, 23, 24, 25]]


def bart_decoder() -> nn.Module:
    """Return a decoder that counts positions from the start of the row, so that padding before a prompt moves it."""
    from transformers import BartConfig, BartForCausalLM

    return BartForCausalLM(
        BartConfig(vocab_size=VOCABULARY, d_model=WIDTH, decoder_layers=2, encoder_layers=2, pad_token_id=0,
                   encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
                   max_position_embeddings=64, is_decoder=True, is_encoder_decoder=False, eos_token_id=2,
                   forced_eos_token_id=None)
    )  # fmt: skip


WRITERS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: spread(gpt2_lm(2)),
    "llama": lambda: spread(llama(2)),
    "t5": lambda: spread(t5(2)),
    "bart decoder": lambda: spread(bart_decoder()),
}


def tensors(rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return rows of tokens as tensors."""
    return [torch.tensor(row) for row in rows]


def prompts(rows: Sequence[Sequence[int]] = PROMPTS) -> Rows:
    """Return rows that are prompts alone."""
    ids = tensors(rows)
    return Rows({"input_ids": ids, "attention_mask": [torch.ones_like(each) for each in ids]})


def pairs(by_encoder: bool = False) -> Rows:
    """Return prompts with completions."""
    if by_encoder:
        return Rows({**prompts().table, "labels": tensors(COMPLETIONS)})
    ids = [one + other for one, other in zip(PROMPTS, COMPLETIONS, strict=True)]
    labels = [[-100] * len(one) + other for one, other in zip(PROMPTS, COMPLETIONS, strict=True)]
    return Rows({**prompts(ids).table, "labels": tensors(labels)})


def taught(make: Callable[[], nn.Module] = lambda: gpt2_lm(2)) -> tuple[Any, Any]:
    """Return a teacher and a student that answer differently, in float64."""
    return spread(make()).double(), spread(make(), 1).double()
