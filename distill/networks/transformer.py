"""Transformers for text: every token attends to all others, or to those before it.

A block adds attention and a feed-forward part to the states h, with the norms before them (pre-norm),

    h ← h + Attention(LayerNorm(h)),    h ← h + MLP(LayerNorm(h)),    Attention = softmax(q kᵀ / √d) v, head by head.

Vaswani et al. 2017 (arXiv:1706.03762), section 3; as the network without a recurrent bias: Abnar, Dehghani, Zuidema
2020 (arXiv:2006.00555), section 3.
"""

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from distill.errors import DistillError, checked
from distill.networks.sizes import check_sizes
from distill.networks.tokens import find_first, find_real, number_tokens, select_states


@checked
class TransformerClassifier(nn.Module):
    """Embeddings, blocks in which every token attends to all, and a linear layer on the first real token.

    Vaswani et al. 2017 (arXiv:1706.03762), section 3, with the norms before attention and feed-forward part; a
    classifier on the first token as in Devlin et al. 2018 (arXiv:1810.04805). `layer` i is block i.

    Args:
        vocabulary: the number of token ids.
        classes: the number of classes.
        width: that of the embeddings and of every block.
        layers: the number of blocks.
        heads: the number of attention heads of a block, which share the width.
        longest: the largest number of tokens of a row.
        dropout: the share of the embeddings, and of the outputs of attention and feed-forward part, that is dropped.

    Raises:
        DistillError: no layers, or a width that the heads cannot share; longer rows; a row of padding alone.
    """

    def __init__(
        self,
        vocabulary: int,
        classes: int,
        *,
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        longest: int = 128,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        check_sizes(
            "TransformerClassifier",
            dropout,
            vocabulary=vocabulary,
            width=width,
            classes=classes,
            longest=longest,
        )
        self.body = Transformer(vocabulary, width, layers, heads=heads, longest=longest, dropout=dropout)
        self.classifier = nn.Linear(width, classes)

    @checked
    def forward(
        self, input_ids: Int[Tensor, "batch token"], attention_mask: Tensor | None = None
    ) -> Float[Tensor, "batch classes"]:
        """Return the logits; padding, on whichever side, changes nothing."""
        mask = find_real(input_ids, attention_mask, self.body.embedding.num_embeddings)
        return self.classifier(select_states(self.body(input_ids, mask), find_first(mask)))

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embeddings of tokens, as models of the library transformers do."""
        return self.body.embedding


@checked
class TransformerLanguageModel(nn.Module):
    """Embeddings, blocks in which a token attends to those before it and itself, the logits of the token that follows.

    Vaswani et al. 2017 (arXiv:1706.03762), section 3, the decoder. Arguments as for `TransformerClassifier`.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        longest: int = 128,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        check_sizes(
            "TransformerLanguageModel",
            dropout,
            vocabulary=vocabulary,
            width=width,
            longest=longest,
        )
        self.body = Transformer(vocabulary, width, layers, heads=heads, longest=longest, dropout=dropout)
        self.head = nn.Linear(width, vocabulary)

    @checked
    def forward(
        self, input_ids: Int[Tensor, "batch token"], attention_mask: Tensor | None = None
    ) -> Float[Tensor, "batch token vocabulary"]:
        """Return the logits; those at padding mean nothing."""
        return self.head(
            self.body(input_ids, find_real(input_ids, attention_mask, self.body.embedding.num_embeddings), causal=True)
        )

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embeddings of tokens, as models of the library transformers do."""
        return self.body.embedding


class Transformer(nn.Module):
    """The part of the transformers before the last linear layer: embeddings of tokens and positions, blocks, a norm."""

    def __init__(self, vocabulary: int, width: int, layers: int, *, heads: int, longest: int, dropout: float) -> None:
        super().__init__()
        if layers < 1 or heads < 1 or width % heads:
            raise DistillError(
                f"layers={layers}, width={width}, heads={heads} make no transformer: it needs a layer, and a width "
                "that the heads share evenly; use e.g. layers=2, width=128, heads=4."
            )
        self.embedding = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(longest, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(
        self, input_ids: Int[Tensor, "batch token"], mask: Bool[Tensor, "batch token"], *, causal: bool = False
    ) -> Float[Tensor, "batch token width"]:
        """Return the states of all tokens after the last norm."""
        number = number_tokens(mask)
        if int(number.max()) >= self.places.num_embeddings:
            raise DistillError(
                f"a row has {int(number.max()) + 1} tokens and this transformer has {self.places.num_embeddings} "
                f"positions; truncate the rows, or make it longer: longest={int(number.max()) + 1}."
            )
        attended = _attention_mask(mask, causal=causal)
        states = self.dropout(self.embedding(input_ids) + self.places(number))
        for block in self.blocks:
            states = block(states, attended)
        return self.norm(states)


class TransformerBlock(nn.Module):
    """Attention and a feed-forward part four times as wide, each after a norm and added to its input."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, states: Float[Tensor, "batch token width"], attended: Bool[Tensor, "batch 1 token token"]
    ) -> Float[Tensor, "batch token width"]:
        """Return the states after this block."""
        states = states + self.dropout(self.attention(self.attention_norm(states), attended))
        return states + self.dropout(self.mlp(self.mlp_norm(states)))


class SelfAttention(nn.Module):
    """Multi-head scaled dot-product attention of a sequence to itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)

    def forward(
        self, states: Float[Tensor, "batch token width"], attended: Bool[Tensor, "batch 1 token token"]
    ) -> Float[Tensor, "batch token width"]:
        """Return the outputs of all heads, mixed by the output projection."""
        query, key, value = (
            rearrange(project(states), "batch token (heads dims) -> batch heads token dims", heads=self.num_heads)
            for project in (self.query, self.key, self.value)
        )
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=attended)
        return self.output(rearrange(mixed, "batch heads token dims -> batch token (heads dims)"))


def _attention_mask(mask: Bool[Tensor, "batch token"], *, causal: bool) -> Bool[Tensor, "batch 1 token token"]:
    """Return which tokens (last axis) each token attends to: real ones, and itself, so that no softmax is empty."""
    tokens = mask.shape[1]
    itself = torch.eye(tokens, dtype=torch.bool, device=mask.device)
    reach = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device)
    reach = reach.tril() if causal else reach
    return rearrange(mask, "batch token -> batch 1 1 token") & reach | itself
