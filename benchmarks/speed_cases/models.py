"""Random models of the cases, and how their blocks are called by hand."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

VOCABULARY = 1000
HEADS = 4
Writes = Mapping[int, Callable[[Tensor], Tensor]]


def gpt2(layers: int, width: int, device: torch.device, heads: int = HEADS, seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    sizes = dict(vocab_size=VOCABULARY, n_embd=width, n_layer=layers, n_head=heads, use_cache=False)
    return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **sizes)).eval().to(device)


def tokens(rows: int, length: int, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(1, VOCABULARY, (rows, length), generator=drawn).to(device)}


def state_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def hooked(hooks: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Forward hooks on modules inside the block, as one writes them by hand."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def writing(source: Tensor, position: int | slice) -> Callable[..., Any]:
    """A hook that swaps positions of an output."""

    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        new = state_of(output).clone()
        new[:, position] = source[:, position]
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return hook


def keeping(kept: dict[nn.Module, Tensor]) -> Callable[..., None]:
    """A hook that keeps an output."""

    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        kept[module] = state_of(output)

    return hook


def rest_of(model: GPT2LMHeadModel, state: Tensor, after: int) -> Tensor:
    """Return the logits that the blocks after one make of its output, without padding."""
    for block in model.transformer.h[after + 1 :]:
        state = block(state)
    return model.lm_head(model.transformer.ln_f(state))


def bert(layers: int, width: int, seed: int, labels: int = 4, heads: int = HEADS) -> BertForSequenceClassification:
    """A classifier without dropout."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads)
    rates = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = BertConfig(intermediate_size=4 * width, max_position_embeddings=64, num_labels=labels, **sizes, **rates)
    return BertForSequenceClassification(config)


@dataclass(frozen=True)
class Parts:
    """A BERT classifier by its parts, for texts without padding."""

    model: BertForSequenceClassification

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.bert.encoder.layer)

    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model.bert.embeddings(input_ids=batch["input_ids"])

    def up(self, state: Tensor, first: int = 0, end: int | None = None, writes: Writes | None = None) -> list[Tensor]:
        """Return the outputs of the blocks from one to another, each after what is written into it."""
        states = []
        for number, block in list(enumerate(self.blocks))[first:end]:
            state = state_of(block(state))
            state = state if writes is None or number not in writes else writes[number](state)
            states.append(state)
        return states

    def head(self, state: Tensor) -> Tensor:
        return self.model.classifier(self.model.dropout(self.model.bert.pooler(state)))
