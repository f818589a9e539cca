"""LSTMs for text: recurrent networks that read from left to right and keep one state.

The state after a token depends on that token and on the state before it, h_t = LSTM(x_t, h_{t−1}); a classifier
answers from the state after the last token, a language model from the state after each.

Abnar, Dehghani, Zuidema 2020 (arXiv:2006.00555), section 3.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from distill.errors import checked
from distill.networks.sizes import check_sizes
from distill.networks.tokens import find_last, find_real, order_real_first, reorder, select_states


@checked
class LSTMClassifier(nn.Module):
    """Embeddings, LSTM layers, and a linear layer on the state after the last real token. `layer` i is LSTM layer i.

    Abnar, Dehghani, Zuidema 2020 (arXiv:2006.00555), section 3.

    Args:
        vocabulary: the number of token ids.
        classes: the number of classes.
        width: that of the embeddings and of every layer.
        layers: the number of layers.
        dropout: the share of the embeddings, and of the states that every layer returns, that is dropped.

    Raises:
        DistillError: no layers; a row of padding alone.
    """

    def __init__(
        self, vocabulary: int, classes: int, *, width: int = 128, layers: int = 2, dropout: float = 0.1
    ) -> None:
        super().__init__()
        check_sizes("LSTMClassifier", dropout, vocabulary=vocabulary, width=width, layers=layers, classes=classes)
        self.body = Recurrent(vocabulary, width, layers, dropout)
        self.classifier = nn.Linear(width, classes)

    @checked
    def forward(
        self, input_ids: Int[Tensor, "batch token"], attention_mask: Tensor | None = None
    ) -> Float[Tensor, "batch classes"]:
        """Return the logits; padding, on whichever side, changes nothing."""
        mask = find_real(input_ids, attention_mask, self.body.embedding.num_embeddings)
        return self.classifier(select_states(self.body(input_ids, mask), find_last(mask)))

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embeddings of tokens, as models of the library transformers do."""
        return self.body.embedding


@checked
class LSTMLanguageModel(nn.Module):
    """Embeddings, LSTM layers, and a linear layer on the state after each token: the logits of the token that follows.

    Abnar, Dehghani, Zuidema 2020 (arXiv:2006.00555), section 3. Arguments as for `LSTMClassifier`.
    """

    def __init__(self, vocabulary: int, *, width: int = 128, layers: int = 2, dropout: float = 0.1) -> None:
        super().__init__()
        check_sizes("LSTMLanguageModel", dropout, vocabulary=vocabulary, width=width, layers=layers)
        self.body = Recurrent(vocabulary, width, layers, dropout)
        self.head = nn.Linear(width, vocabulary)

    @checked
    def forward(
        self, input_ids: Int[Tensor, "batch token"], attention_mask: Tensor | None = None
    ) -> Float[Tensor, "batch token vocabulary"]:
        """Return the logits; those at padding mean nothing."""
        return self.head(self.body(input_ids, find_real(input_ids, attention_mask, self.body.embedding.num_embeddings)))

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embeddings of tokens, as models of the library transformers do."""
        return self.body.embedding


class Recurrent(nn.Module):
    """The part of the LSTM networks before the last linear layer: embeddings and LSTM layers."""

    def __init__(self, vocabulary: int, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(RecurrentBlock(width, dropout) for _ in range(layers))

    def forward(
        self, input_ids: Int[Tensor, "batch token"], mask: Bool[Tensor, "batch token"]
    ) -> Float[Tensor, "batch token width"]:
        """Return the state of the last layer after each token."""
        states = self.dropout(self.embedding(input_ids))
        for block in self.blocks:
            states = block(states, mask)
        return states


class RecurrentBlock(nn.Module):
    """One LSTM layer and dropout."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, states: Float[Tensor, "batch token width"], mask: Bool[Tensor, "batch token"]
    ) -> Float[Tensor, "batch token width"]:
        """Return the state after each token, in the order of the tokens; padding influences no real token."""
        # No PackedSequence: a block gives [batch, token, dims], so that positions in it can be read and written.
        order = order_real_first(mask)
        after, _ = self.lstm(reorder(states, order))
        return self.dropout(reorder(after, order.argsort(dim=1)))
