"""The tokens that a server names by number or by text, and a look at whether its vocabulary is that of a tokenizer."""

import json
from collections.abc import Mapping
from functools import cached_property
from hashlib import blake2b
from typing import Any

from distill.errors import DistillError

PREFIX = "token_id:"
FEWEST = 8
"""Different tokens of which texts were compared before a vocabulary is taken for another one."""
MARKS = str.maketrans("", "", "▁ĠĊ \n\t\r\ufffd")
"""Signs that tokenizers put for spaces and ends of lines, which a server may write in another way."""


def fingerprint_of(tokenizer: Any) -> str | None:
    """Return a hash of the words of a tokenizer and their numbers; None if it has none."""
    words = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else None
    return None if not words else blake2b(json.dumps(sorted(words.items())).encode(), digest_size=16).hexdigest()


class TokenTexts:
    """Tokens by the names that a server gives them.

    Args:
        tokenizer: that of the model of the server.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._alike: dict[int, bool] = {}

    def number_of(self, name: str, text: Any, address: str, *, numbered: bool) -> int:
        """Return the number of a token.

        Args:
            name: its number, its number after "token_id:", or its text.
            text: its text as the server says beside the number, None if it does not.
            address: of the server.
            numbered: whether the name is a number, with or without "token_id:".

        Raises:
            DistillError: a text of no token or of several, or texts of another vocabulary.
        """
        plain = name.removeprefix(PREFIX)
        if not numbered and plain == name:
            return self._number_of_text(name, address)
        if not (plain.isascii() and plain.isdecimal()):
            raise DistillError(f"{address} names a token by {name!r}, where the number of a token is needed.")
        number = int(plain)
        if isinstance(text, str):
            self._compare(number, text, address)
        return number

    def _compare(self, number: int, text: str, address: str) -> None:
        """Raise DistillError once most of the texts that were seen are those of other tokens."""
        plain = text.translate(MARKS)
        if number in self._alike or not plain or not 0 <= number < len(self.tokenizer):
            return
        own = str(self.tokenizer.decode([number])), str(self.tokenizer.convert_ids_to_tokens(number))
        self._alike[number] = plain in [each.translate(MARKS) for each in own]
        if len(self._alike) >= FEWEST and sum(self._alike.values()) < len(self._alike) / 2:
            raise DistillError(
                f"{address} has another vocabulary than the tokenizer: there token {number} is {text!r}, here "
                f"{own[0]!r}; give the tokenizer of its model: Served(…, tokenizer='FOLDER_OR_NAME')."
            )

    def _number_of_text(self, text: str, address: str) -> int:
        numbers = self._by_text.get(text, ())
        if len(numbers) != 1:
            which = "of none" if not numbers else f"of {len(numbers)} tokens"
            raise DistillError(
                f"{address} names a token by the text {text!r}, which is the text {which} of the tokenizer; serve the "
                "model so that it names tokens by number: vLLM with prompt_logprobs."
            )
        return next(iter(numbers))

    @cached_property
    def _by_text(self) -> Mapping[str, frozenset[int]]:
        """The numbers of the tokens that have each text, as it is in the vocabulary or in a text."""
        found = dict[str, set[int]]()
        for word, number in self.tokenizer.get_vocab().items():
            found.setdefault(word, set()).add(number)
            found.setdefault(str(self.tokenizer.decode([number])), set()).add(number)
        return {text: frozenset(numbers) for text, numbers in found.items()}
