"""A language model behind an address: a server with OpenAI's `/v1/completions`, as vLLM.

The texts of a step are sent as token ids, and one token more is requested, so that there is an answer at every token
of a text: the most probable next tokens with their log-probabilities. They are logits of the model, up to a number that
all logits of a token share. The probability that is left is spread evenly among the other classes:
ℓ = log( (1 − Σ_{j ≤ k} p_j) / (V − k) ), so temperature 1 is the one at which all of it is exact.
"""

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from distill.errors import DistillError
from distill.models.pretrained import hide_progress_bars, load_tokenizer
from distill.models.token_positions import counted, starts
from distill.teachers.endpoints.completions import Completions
from distill.teachers.endpoints.token_texts import TokenTexts, fingerprint_of
from distill.teachers.top_k import Kept

LEAST = 1e-9
"""The least probability that all other classes have together; below it the printed digits of the largest decide."""


def endpoint_of(
    address: str, model: Any, tokenizer: Any, *, top_k: int | None, key: str | None, timeout: float
) -> "Endpoint":
    """Return a model of a server, the arguments of which are those of `Served`.

    Raises:
        DistillError: no name of a model, no tokenizer, or more tokens than it has.
    """
    if not isinstance(model, str) or not model:
        raise DistillError(
            f"Served({address!r}) names no model of the server; give its name there: model='…' (vLLM lists them at "
            "/v1/models)."
        )
    try:
        reads = (
            tokenizer
            if tokenizer is not None and not isinstance(tokenizer, str)
            else load_tokenizer(tokenizer or model)
        )
    except DistillError as error:
        raise DistillError(
            f"Served({address!r}) needs the tokenizer of {model!r}, by which token ids are compared: {error} Give it: "
            "tokenizer=…, the tokenizer or its folder."
        ) from error
    if fingerprint_of(reads) is None:
        raise DistillError(
            f"tokenizer={type(reads).__name__} has no vocabulary; give that of the model: "
            "AutoTokenizer.from_pretrained(…)."
        )
    classes = _classes_of(reads)
    return Endpoint(
        Completions(address, model, TokenTexts(reads), key, timeout), classes, min(top_k or classes, classes)
    )


def _classes_of(tokenizer: Any) -> int:
    """Return the number of token ids of the model beside a tokenizer, else of the tokenizer."""
    from transformers import AutoConfig

    try:
        with hide_progress_bars():
            config = AutoConfig.from_pretrained(tokenizer.name_or_path, trust_remote_code=False)
        return max(len(tokenizer), int(config.get_text_config().vocab_size))
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return len(tokenizer)


class Endpoint(nn.Module):
    """A causal language model that answers over HTTP with its most probable tokens, and computes nothing here.

    Attributes:
        repo_id: the name of the model, which a cache holds in place of the address.

    Args:
        completions: sends the texts.
        classes: the number of token ids.
        k: how many of the most probable tokens are requested.
    """

    def __init__(self, completions: Completions, classes: int, k: int) -> None:
        super().__init__()
        self.completions, self.classes, self.k, self.repo_id = completions, classes, k, completions.model
        self._embeddings = nn.Embedding(classes, 0)  # says how many token ids there are

    def get_input_embeddings(self) -> nn.Module:
        """Return a table of embeddings without dims: one for each token id."""
        return self._embeddings

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> NoReturn:
        """Raise DistillError: there is nothing here to run."""
        raise DistillError(
            f"{self.completions.address} gives answers and nothing that is computed inside; train on these: "
            "objective=KD(temperature=1.0), mapping={}."
        )

    def columns_of(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return token ids, their mask, and their positions in their texts, from the columns of a batch."""
        if "input_ids" not in batch:
            raise DistillError(
                f"{self.completions.address} reads token ids, and the data has {', '.join(batch)}; give it 'input_ids'."
            )
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids))
        return {"input_ids": ids, "attention_mask": mask, "position_ids": batch.get("position_ids", counted(mask))}

    def answers(self, columns: Mapping[str, Tensor]) -> Kept:
        """Return the answers to all rows as they are kept; 0 at padding. Each document of a packed row is a text.

        Raises:
            DistillError: a server that refuses, or does not answer as it must.
            OSError: one that is not reached.
        """
        ids, mask = columns["input_ids"].cpu(), columns["attention_mask"].cpu().bool()
        begins = starts({name: column.cpu() for name, column in columns.items()})
        places, texts = [], []
        for row in range(len(ids)):
            real = mask[row].nonzero()[:, 0]
            cuts = begins[row, real].clone()
            cuts[:1] = True
            for place in real.tensor_split(cuts.nonzero()[1:, 0].tolist()) if len(real) else ():
                places.append((row, place))
                texts.append(ids[row, place].tolist())
        answered = self.completions.most_probable(texts, self.k, self.classes)
        shape = (*ids.shape, self.k)
        indices, values = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.float64)
        for (row, place), (tokens, logarithms) in zip(places, answered, strict=True):
            indices[row, place] = torch.tensor(tokens, dtype=torch.int32)
            values[row, place] = torch.tensor(logarithms, dtype=torch.float64)
        return self._kept(indices, values, mask)

    def _kept(self, indices: Tensor, values: Tensor, mask: Tensor) -> Kept:
        if self.k == self.classes:
            logits = torch.zeros_like(values).scatter(-1, indices.long(), values)
            return {"logits": logits.masked_fill(~mask[..., None], 0).float()}
        others = self.classes - self.k
        rest = (1 - values.exp().sum(-1, keepdim=True)).clamp(min=LEAST)
        level = torch.minimum((rest / others).log(), values[..., -1:]).masked_fill(~mask[..., None], 0)
        classes = torch.tensor(self.classes, dtype=torch.int32)
        return {"values": values.float(), "indices": indices, "level": level.float(), "classes": classes}
