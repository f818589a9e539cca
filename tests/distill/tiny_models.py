"""Tiny random teachers, students and data, for the tests of `distill`. Nothing is downloaded."""

from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from distill import Rows

VOCABULARY, WIDTH, CLASSES = 40, 16, 3
QUIET = Console(quiet=True)


def bert_with(head: str, layers: int = 4, width: int = WIDTH, dropout: float = 0.0, **settings: Any) -> nn.Module:
    """Return a BERT of the class `BertFor…`; `settings` of its configuration take the place of those written here."""
    import transformers

    sizes = dict(vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2,
                 intermediate_size=24, max_position_embeddings=24, hidden_dropout_prob=dropout,
                 attention_probs_dropout_prob=dropout)  # fmt: skip
    return getattr(transformers, f"BertFor{head}")(transformers.BertConfig(**{**sizes, **settings}))


def bert(
    layers: int = 4, width: int = WIDTH, dropout: float = 0.0, labels: int = CLASSES, **settings: Any
) -> nn.Module:
    return bert_with("SequenceClassification", layers, width, dropout, num_labels=labels, **settings)


def masked_lm(layers: int = 4) -> nn.Module:
    return bert_with("MaskedLM", layers)


def vit(layers: int = 4, width: int = WIDTH, dropout: float = 0.0) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(image_size=8, patch_size=4, num_channels=1, hidden_size=width, num_hidden_layers=layers,
                  num_attention_heads=2, intermediate_size=24, num_labels=CLASSES, hidden_dropout_prob=dropout,
                  attention_probs_dropout_prob=dropout)
    )  # fmt: skip


def _gpt2(kind: str, layers: int, width: int, dropout: float) -> nn.Module:
    import transformers

    return getattr(transformers, kind)(
        transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=width, n_layer=layers, n_head=2, n_positions=24,
                                bos_token_id=0, eos_token_id=None, pad_token_id=0, num_labels=CLASSES,
                                resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)
    )  # fmt: skip


def gpt2(layers: int = 4, width: int = WIDTH, dropout: float = 0.0) -> nn.Module:
    return _gpt2("GPT2ForSequenceClassification", layers, width, dropout)


def gpt2_lm(layers: int = 4, width: int = WIDTH, dropout: float = 0.0) -> nn.Module:
    return _gpt2("GPT2LMHeadModel", layers, width, dropout)


def llama(layers: int = 4) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=4,
                    num_key_value_heads=2, intermediate_size=24)
    )  # fmt: skip


def t5(layers: int = 4) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, num_layers=3, num_decoder_layers=layers, num_heads=2,
                 d_ff=24, decoder_start_token_id=0, pad_token_id=0, eos_token_id=None, dropout_rate=0.0)
    )  # fmt: skip


def mlp(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, CLASSES))


class CNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.drop, self.fc = nn.Dropout(0.2), nn.Linear(6, CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.bn1(self.conv1(pixel_values)).tanh()
        x = self.bn2(self.conv2(x)).tanh()
        return self.fc(self.drop(x.mean((2, 3))))


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 6)
        self.lstm = nn.LSTM(6, 8, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(input_ids))[0][:, -1])


def spread(model: nn.Module, seed: int = 0, scale: float = 0.3) -> nn.Module:
    """The model in eval mode, its weights spread wide enough that every layer matters."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=draw)
            centre = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0  # of a normalisation
            parameter.copy_(centre + drawn * (scale if parameter.ndim > 1 else 0.02))
    return model.eval()


def text(
    rows: int = 24, shortest: int = 3, longest: int = 9, *, labels: bool = True, side: str = "right", seed: int = 0
) -> Rows:
    """Ragged token ids with a special token (1) at both ends, their masks, and labels."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (rows,), generator=draw).tolist()
    ids = [torch.randint(5, VOCABULARY, (length,), generator=draw) for length in lengths]
    for row in ids:
        row[0] = row[-1] = 1
    table = {
        "input_ids": ids,
        "attention_mask": [torch.ones_like(row) for row in ids],
        "special_tokens_mask": [(row == 1).long() for row in ids],
    }
    if labels:
        table["labels"] = torch.randint(CLASSES, (rows,), generator=draw)
    return Rows(table, padding_side=side)


def images(rows: int = 24, seed: int = 0) -> Rows:
    draw = torch.Generator().manual_seed(seed)
    return Rows(
        {
            "pixel_values": torch.randn(rows, 1, 8, 8, generator=draw),
            "labels": torch.randint(CLASSES, (rows,), generator=draw),
        }
    )


def vectors(rows: int = 24, seed: int = 0) -> Rows:
    draw = torch.Generator().manual_seed(seed)
    return Rows(
        {"inputs": torch.randn(rows, 6, generator=draw), "labels": torch.randint(CLASSES, (rows,), generator=draw)}
    )


def batch_of(make: Callable[[], nn.Module], rows: int = 3) -> dict[str, Tensor]:
    """Return a batch for the models that `make` builds; with tokens that an encoder-decoder is to write."""
    if make in (vit, CNN):
        return images(rows).batch(range(rows))
    if make is mlp:
        return vectors(rows).batch(range(rows))
    draw = torch.Generator().manual_seed(0)
    written = torch.randint(5, VOCABULARY, (rows, 4), generator=draw)
    return {**text(rows).batch(range(rows)), "decoder_input_ids": written}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
