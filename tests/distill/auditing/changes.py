"""Compressed models whose changes are known, for the tests of the audit."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from distill import Rows
from tests.distill.tiny_models import VOCABULARY, bert, gpt2_lm, llama, spread, t5, text, vit

HEADS = {
    bert: ("bert.encoder.layer.{}.attention.self.value.weight", 0),
    vit: ("vit.layers.{}.attention.v_proj.weight", 0),
    gpt2_lm: ("transformer.h.{}.attn.c_attn.weight", 1),
    llama: ("model.layers.{}.self_attn.q_proj.weight", 0),
    t5: ("decoder.block.{}.layer.0.SelfAttention.v.weight", 0),
}
"""Of each model a weight of its attentions, and the axis along which its heads lie."""


def written(rows: int = 12) -> Rows:
    """Rows of an encoder–decoder, with the tokens that its decoder reads."""
    draw = torch.Generator().manual_seed(1)
    table = text(rows, labels=False).table
    return Rows({**table, "decoder_input_ids": torch.randint(5, VOCABULARY, (rows, 4), generator=draw)})


def changed(model: nn.Module, path: str, change: Callable[[Tensor], None]) -> nn.Module:
    """A copy of a model with one parameter changed in place."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        change(copied.get_parameter(path))
    return copied


def with_changed_head(make: Callable[[], nn.Module], layer: int, head: int, size: float = 0.5) -> nn.Module:
    """The spread model of `make` with one head of one layer changed."""
    path, axis = HEADS[make]
    model = spread(make())
    width = 4 if make is llama else 8
    start = head * width + (32 if make is gpt2_lm else 0)  # query, key and value of GPT-2 lie side by side

    def change(weight: Tensor) -> None:
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)) * size
        part = [slice(None)] * 2
        part[axis] = slice(start, start + width)
        weight[tuple(part)] += noise[tuple(part)]

    return changed(model, path.format(layer), change)


def noisy(weight: Tensor) -> None:
    weight += 0.5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
