"""Models of several families with data, and the sites at which they are interchanged, for the tests of `distill`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from distill import Rows
from interventions import Location
from interventions.locations import BLOCK_SITES, MODEL_SITES
from tests.distill.tiny_models import VOCABULARY, WIDTH, bert, gpt2_lm, images, llama, text, vit


def distilbert(layers: int = 4) -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    return DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=VOCABULARY, dim=WIDTH, n_layers=layers, n_heads=4, hidden_dim=24, num_labels=3,
                         max_position_embeddings=24, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0)
    )  # fmt: skip


def t5(layers: int = 4) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, num_layers=layers, num_decoder_layers=layers,
                 num_heads=2, d_ff=24, decoder_start_token_id=0, pad_token_id=0, eos_token_id=None, dropout_rate=0.0)
    )  # fmt: skip


def bart(layers: int = 4) -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    return BartForConditionalGeneration(
        BartConfig(vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=layers, decoder_layers=layers,
                   encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
                   max_position_embeddings=24, decoder_start_token_id=0, pad_token_id=0, bos_token_id=1,
                   eos_token_id=2, forced_eos_token_id=None, dropout=0.0)
    )  # fmt: skip


def sentences(rows: int = 12, *, even: bool = False) -> Rows:
    """Source and target tokens of ragged lengths, or of one."""
    draw = torch.Generator().manual_seed(1)
    source = text(rows, 6 if even else 3, 6 if even else 7, labels=False).table
    lengths = [4] * rows if even else torch.randint(2, 6, (rows,), generator=draw).tolist()
    targets = [torch.randint(5, VOCABULARY, (length,), generator=draw) for length in lengths]
    told = {"decoder_input_ids": targets, "decoder_attention_mask": [torch.ones_like(row) for row in targets]}
    return Rows({name: source[name] for name in ("input_ids", "attention_mask")} | told)


def pictures(rows: int = 12, *, even: bool = False) -> Rows:
    return images(rows)


def words(rows: int = 12, *, even: bool = False) -> Rows:
    return text(rows, 6 if even else 3, 6 if even else 8, labels=False)


@dataclass(frozen=True)
class Family:
    """How a model of some layers is made, what it reads, and where its blocks are."""

    make: Callable[[int], nn.Module]
    data: Callable[..., Rows]
    stack: str | None = None


FAMILIES = {
    "bert": Family(bert, words),
    "distilbert": Family(distilbert, words),
    "gpt2": Family(gpt2_lm, words),
    "llama": Family(llama, words),
    "vit": Family(vit, pictures),
    "t5": Family(t5, sentences),
    "bart encoder": Family(bart, sentences, "encoder"),
}
SITES = (*BLOCK_SITES, *MODEL_SITES)


def at(family: str, site: str, layer: int = 1, **part: object) -> Location:
    """A site of a family, of one of its layers where it has some."""
    stack = FAMILIES[family].stack if site != "logits" else None
    return Location(None if site in MODEL_SITES else layer, site, stack=stack, **part)


def exists(model: nn.Module, place: Location) -> bool:
    from interventions import InterventionError, architecture

    try:
        architecture(model).place(place)
    except InterventionError:
        return False
    return True
