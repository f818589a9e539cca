"""Samples of text: what a teacher and its students write after the beginning of a few held-out texts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.data.missing import IGNORED
from distill.data.rows import Rows
from distill.models.inputs import device_of, evaluating
from interventions import plain_data

PROMPTS, NEW_TOKENS, SHOWN_OF_TEXT = 3, 40, 16


@dataclass(frozen=True)
class Sample:
    """The beginning of a text, and how each model continues it.

    Attributes:
        prompt: the beginning.
        written: {name of the model: what it writes, greedily}.
    """

    prompt: str
    written: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return the sample as plain data, for JSON."""
        return {"prompt": self.prompt, "written": plain_data(dict(self.written))}


def samples_of(models: Mapping[str, nn.Module], rows: Rows, tokenizer: Any) -> tuple[Sample, ...]:
    """Return how each model continues the prompts of the first rows, or their first tokens where they have no prompt.

    Args:
        models: {name: language model}.
        rows: tokens with labels, −100 in prompts.
        tokenizer: of all models.
    """
    prompts = [prompt_of(rows[number]) for number in range(min(PROMPTS, len(rows)))]
    texts = [tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts]
    written = {name: [_continued(model, each, tokenizer) for each in prompts] for name, model in models.items()}
    return tuple(
        Sample(text, {name: each[number] for name, each in written.items()}) for number, text in enumerate(texts)
    )


def prompt_of(row: Mapping[str, Tensor]) -> Tensor:
    """Return the tokens before the first that is learned, or the first ones where all are learned.

    >>> row = {"input_ids": torch.arange(5), "labels": torch.tensor([-100, -100, 2, 3, 4])}
    >>> prompt_of(row).tolist(), prompt_of({**row, "labels": torch.arange(5)}).tolist()
    ([0, 1], [0, 1])
    """
    ids, labels = row["input_ids"], row["labels"]
    learned = (labels != IGNORED).nonzero()[:, 0].tolist()
    first = learned[0] if learned else len(ids)
    return ids[: first if first > 1 else max(1, min(SHOWN_OF_TEXT, len(ids) // 2))]


def _continued(model: nn.Module, prompt: Tensor, tokenizer: Any) -> str:
    """Return what a model writes after a prompt, its most likely tokens."""
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None) or len(prompt) + NEW_TOKENS
    room = min(NEW_TOKENS, longest - len(prompt))
    if room < 1:
        return ""
    ids = prompt[None].to(device_of(model))
    writer: Any = model
    with evaluating(model), torch.no_grad():
        found = writer.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, do_sample=False, temperature=None,
            top_p=None, top_k=None, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )  # fmt: skip
    return str(tokenizer.decode(found[0, len(prompt) :], skip_special_tokens=True))
