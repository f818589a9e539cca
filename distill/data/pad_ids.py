"""The id of the token that pads texts, for tokenizers with and without a padding token."""

from typing import Any


def pad_id_of(tokenizer: Any) -> int:
    """Return the id of a tokenizer's padding token, else of its end token, else 0; attention masks hide it.

    >>> from types import SimpleNamespace
    >>> pad_id_of(SimpleNamespace(pad_token_id=None, eos_token_id=2))
    2
    """
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in known if token is not None)
