"""Prompts from templates: their tokens, the positions of the words in their slots, and the tokens of answers."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from string import Formatter
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.data.pad_ids import pad_id_of
from distill.errors import DistillError, checked

ROWS = 50_000
"""The number of tokenized prompts to keep."""
OPENING = ("(", "[", "{", "“", "‘", "«")
"""Characters that a word follows without a space."""

Key = tuple[int, ...]
"""A prompt: the number of its template, and the number of the filler of each of its slots."""


class _Row(NamedTuple):
    """A tokenized prompt: its ids, the first and last token of each slot, the last token and word of the text."""

    ids: list[int]
    spans: dict[str, tuple[int, int]]
    end: int
    last_word: str


@checked
class Prompts:
    """Templates with named slots, the words that fill them, and the tokenizer of the network that reads them.

    A batch of prompts is `numbers`: for `"template"` (optional if there is only one) and each slot a tensor `[batch]`
    of places in `templates` and in `fillers[slot]`. Positions are counted over real tokens, as those of `CausalModel`.
    They are right for every fast tokenizer, because they come from its character offsets: added tokens, words of
    several tokens, and punctuation in one token with a word are all allowed. The position of a slot that occurs twice
    in a template is that of its first occurrence.

    A prompt is tokenized once and kept, up to 50,000 of them.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({"?": 0, "The": 1, "dog": 2, "cat": 3, "is": 4, "big": 5}, unk_token="?"))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    >>> prompts = Prompts(["The {animal} is", "The big {animal} is"], {"animal": ("dog", "cat")}, tokenizer)
    >>> numbers = {"template": torch.tensor([0, 1]), "animal": torch.tensor([1, 0])}
    >>> prompts.texts(numbers), prompts.encode(numbers)["input_ids"].tolist()
    (['The cat is', 'The big dog is'], [[1, 3, 4, 0], [1, 5, 2, 4]])
    >>> prompts.last("animal", numbers), prompts.answer_ids(["big"], numbers)
    (tensor([1, 2]), tensor([[5], [5]]))
    """

    def __init__(self, templates: Sequence[str], fillers: Mapping[str, Sequence[str]], tokenizer: Any) -> None:
        """Read the templates.

        Args:
            templates: texts as `str.format` writes them, "The {subject} near the {attractor}".
            fillers: for each slot the words that may fill it.
            tokenizer: a fast one; batches are padded on its padding side, and its settings are not changed.

        Raises:
            DistillError: a slow tokenizer, no template, or a slot without fillers.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise DistillError(
                f"prompts need a tokenizer that says where its tokens stand in the text, a fast one: "
                f"{type(tokenizer).__name__} is none; pass AutoTokenizer.from_pretrained(NAME, use_fast=True)."
            )
        if isinstance(templates, str) or not templates:
            raise DistillError(
                f"templates must be a list of texts: {templates!r}; give templates=['The {{noun}} was']."
            )
        self.templates, self.tokenizer = tuple(templates), tokenizer
        self.fillers = {slot: tuple(words) for slot, words in fillers.items()}
        self._parts = [_split_template(template, self.fillers) for template in templates]
        self._seen: dict[Key, _Row] = {}
        self._continued: dict[tuple[str, ...], dict[str, Tensor]] = {}

    @checked
    def texts(self, numbers: Mapping[str, Tensor]) -> list[str]:
        """Return the text of each prompt."""
        return [self._write(key)[0] for key in self._keys(numbers)]

    @checked
    def encode(self, numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask`, both `[batch, token]`, padded on the tokenizer's side.

        The token that pads is that of `distill.data.pad_ids.pad_id_of`.
        """
        rows, device = self._rows(numbers), _device(numbers)
        ids = self._pad([row.ids for row in rows], pad_id_of(self.tokenizer))
        mask = self._pad([[1] * len(row.ids) for row in rows], 0)
        return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}

    @checked
    def first(self, slot: str, numbers: Mapping[str, Tensor]) -> Int[Tensor, " batch"]:
        """Return the position of the first token of the filler of a slot.

        Raises:
            DistillError: a template without the slot.
        """
        return self._spans(slot, numbers)[:, 0]

    @checked
    def last(self, slot: str, numbers: Mapping[str, Tensor]) -> Int[Tensor, " batch"]:
        """Return the position of the last token of the filler of a slot, the first position that sees all of it.

        Raises:
            DistillError: a template without the slot.
        """
        return self._spans(slot, numbers)[:, 1]

    @checked
    def end(self, numbers: Mapping[str, Tensor]) -> Int[Tensor, " batch"]:
        """Return the position of the last token of the text; a token that the tokenizer adds at the end is ignored."""
        return torch.tensor([row.end for row in self._rows(numbers)], device=_device(numbers))

    @checked
    def answer_ids(self, answers: Sequence[str], numbers: Mapping[str, Tensor]) -> Int[Tensor, "batch answers"]:
        """Return the first token of each answer as it continues each prompt, after a space unless the prompt has one.

        A prompt is tokenized with each answer, once for all prompts that end with the same word: the text before that
        word is assumed not to matter.

        Raises:
            DistillError: answers that share their first token, or that change the tokens of the prompt; a tokenizer
                that adds a token at the end of prompts.
        """
        return self._answer_ids(answers, numbers).to(_device(numbers))

    @checked
    def read(
        self, logits: Float[Tensor, "batch token vocabulary"], answers: Sequence[str], numbers: Mapping[str, Tensor]
    ) -> Float[Tensor, "batch answers"]:
        """Return the logits of the answers' first tokens at the last token of each prompt.

        Args:
            logits: the logits of a run on `encode(numbers)`.
            answers: words that may continue the prompts.
            numbers: the prompts.

        Raises:
            DistillError: as `answer_ids`; or logits of other tokens, or of a smaller vocabulary.
        """
        lengths = [len(row.ids) for row in self._rows(numbers)]
        width, rows = max(lengths), torch.arange(len(lengths), device=logits.device)
        ids = self._answer_ids(answers, numbers)
        if logits.shape[:2] != (len(lengths), width) or int(ids.max()) >= logits.shape[2]:
            raise DistillError(
                f"the answers are tokens up to {int(ids.max())} after {len(lengths)} prompts of {width} tokens, and "
                f"the logits are {list(logits.shape)}; give those of a language model of this tokenizer for all "
                "tokens, as model(**prompts.encode(numbers)).logits."
            )
        left = self.tokenizer.padding_side == "left"
        column = torch.tensor([width - 1 if left else length - 1 for length in lengths], device=logits.device)
        return logits[rows, column].gather(1, ids.to(logits.device))

    def _answer_ids(self, answers: Sequence[str], numbers: Mapping[str, Tensor]) -> Tensor:
        known = self._continued.setdefault(tuple(answers), {})
        if not answers:
            raise DistillError("no answers were named; give the words that may continue the prompts: answers=['was'].")
        keys = self._keys(numbers)
        words = [row.last_word for row in self._tokenized_rows(keys)]
        for word, key in dict(zip(words, keys, strict=True)).items():
            if word not in known:
                known[word] = torch.tensor(self._first_ids(key, answers))
        return torch.stack([known[word] for word in words])

    def _first_ids(self, key: Key, answers: Sequence[str]) -> list[int]:
        text, row = self._write(key)[0], self._tokenized_rows([key])[0]
        if row.end < len(row.ids) - 1:
            raise DistillError(
                f"nothing can continue {_short(text)}: the tokenizer ends it with "
                f"{self.tokenizer.decode(row.ids[row.end + 1 :])!r}; pass the tokenizer of a causal language model, as "
                "AutoTokenizer.from_pretrained(NAME, add_eos_token=False)."
            )
        joined = text[-1:].isspace() or text.endswith(OPENING)
        whole = self.tokenizer([text + ("" if joined or each[:1].isspace() else " ") + each for each in answers])
        for answer, ids in zip(answers, whole["input_ids"], strict=True):
            if ids[: len(row.ids)] != row.ids or len(ids) == len(row.ids):
                raise DistillError(
                    f"the answer {answer!r} changes the tokens of the prompt that it continues: {_short(text)}; end "
                    "the template with a whole word and no space, as template.rstrip()."
                )
        first = [ids[len(row.ids)] for ids in whole["input_ids"]]
        self._refuse_shared(answers, first, text)
        return first

    def _refuse_shared(self, answers: Sequence[str], first: list[int], text: str) -> None:
        shared = [i for i, token in enumerate(first) if first.index(token) < i]
        if not shared:
            return
        one, other = first.index(first[shared[0]]), shared[0]
        token = self.tokenizer.decode([first[one]]).strip()
        way_out = f"leave out {sorted({answers[i] for i in shared})}"
        if not token and len(set(first)) == 1:
            way_out = "the space is a separate token, so end the template with it, as template + ' '"
        raise DistillError(
            f"the answers {answers[one]!r} and {answers[other]!r} share their first token {token or ' '!r} after "
            f"{_short(text)}; {way_out}."
        )

    def _spans(self, slot: str, numbers: Mapping[str, Tensor]) -> Tensor:
        """Return the first and last position of a slot, `[batch, 2]`."""
        keys = self._keys(numbers)
        rows = self._tokenized_rows(keys)
        for key, row in zip(keys, rows, strict=True):
            if slot not in row.spans:
                raise DistillError(
                    f"the template {self.templates[key[0]]!r} has no {{{slot}}}, it has "
                    f"{', '.join(row.spans) or 'no slots'}; leave it out of templates=[...]."
                )
        return torch.tensor([row.spans[slot] for row in rows], device=_device(numbers))

    def _rows(self, numbers: Mapping[str, Tensor]) -> list[_Row]:
        return self._tokenized_rows(self._keys(numbers))

    def _tokenized_rows(self, keys: Sequence[Key]) -> list[_Row]:
        """Return the rows of these prompts; new ones are tokenized together, and the oldest are dropped."""
        new = [key for key in dict.fromkeys(keys) if key not in self._seen]
        self._seen.update(zip(new, self._tokenize(new), strict=True))
        rows = [self._seen[key] for key in keys]
        for key in list(islice(self._seen, max(0, len(self._seen) - ROWS))):
            del self._seen[key]
        return rows

    def _tokenize(self, keys: Sequence[Key]) -> Iterator[_Row]:
        written = [self._write(key) for key in keys]
        if not written:
            return
        texts = [text for text, _ in written]
        encoded = self.tokenizer(texts, return_offsets_mapping=True, return_special_tokens_mask=True)
        columns = ("input_ids", "offset_mapping", "special_tokens_mask")
        for ids, offsets, added, (text, places) in zip(*(encoded[name] for name in columns), written, strict=True):
            spans = {slot: _span(slot, place, offsets, text) for slot, place in places.items()}
            end = max((i for i, special in enumerate(added) if not special), default=0)
            yield _Row(list(ids), spans, end, text[len(text.rstrip().rpartition(" ")[0]) :])

    def _write(self, key: Key) -> tuple[str, dict[str, tuple[int, int]]]:
        """Return the text of a prompt, and the places of the characters of each slot."""
        text, places, parts = "", dict[str, tuple[int, int]](), self._parts[key[0]]
        chosen = dict(zip(_slots(parts), key[1:], strict=True))
        for literal, slot in parts:
            text += literal
            if slot is not None:
                word = self.fillers[slot][chosen[slot]]
                places.setdefault(slot, (len(text), len(text) + len(word)))
                text += word
        return text, places

    def _keys(self, numbers: Mapping[str, Tensor]) -> list[Key]:
        odd = next((name for name, value in numbers.items() if not _counts_rows(value)), None)
        lengths = {len(value) for value in numbers.values()} if odd is None else set()
        if len(lengths) != 1:
            found = {name: (str(value.dtype).removeprefix("torch."), *value.shape) for name, value in numbers.items()}
            raise DistillError(
                f"the numbers of prompts are {found}; give a tensor [batch] of whole numbers for each slot, as "
                "numbers={'noun': torch.tensor([0, 1])}."
            )
        rows = lengths.pop()
        columns = {"template": [0] * rows} if len(self.templates) == 1 else {}
        columns |= {name: value.tolist() for name, value in numbers.items()}
        for name, choices in {"template": self.templates, **self.fillers}.items():
            if name not in columns:
                raise DistillError(
                    f"the numbers of prompts lack {name!r}: they have {', '.join(numbers)}; give numbers={{{name!r}: "
                    "torch.tensor([...]), ...}."
                )
            outside = next((number for number in columns[name] if not 0 <= number < len(choices)), None)
            if outside is not None:
                raise DistillError(
                    f"{name!r} has no number {outside!r}: there are {len(choices)}; give whole numbers 0 to "
                    f"{len(choices) - 1}, counted in the list, as range({len(choices)})."
                )
        slots = [[columns[slot] for slot in _slots(parts)] for parts in self._parts]
        return [(t, *(column[row] for column in slots[t])) for row, t in enumerate(columns["template"])]

    def _pad(self, rows: list[list[int]], blank: int) -> list[list[int]]:
        width, left = max(map(len, rows)), self.tokenizer.padding_side == "left"
        blanks = [[blank] * (width - len(row)) for row in rows]
        return [fill + row if left else row + fill for row, fill in zip(rows, blanks, strict=True)]


def _split_template(template: str, fillers: Mapping[str, Sequence[str]]) -> list[tuple[str, str | None]]:
    """Return the pieces of a template: each a text, and the slot that follows it."""
    parts = [(text, slot) for text, slot, *_ in Formatter().parse(template)]
    for slot in _slots(parts):
        if not fillers.get(slot):
            raise DistillError(
                f"the slot {{{slot}}} of {template!r} has no fillers: fillers has {', '.join(fillers) or 'none'}; give "
                f"fillers={{{slot!r}: [...], ...}}, or write {{{{ and }}}} for braces."
            )
    return parts


def _slots(parts: list[tuple[str, str | None]]) -> list[str]:
    return list(dict.fromkeys(slot for _, slot in parts if slot is not None))


def _span(slot: str, place: tuple[int, int], offsets: Sequence[Sequence[int]], text: str) -> tuple[int, int]:
    """Return the first and last token that hold a character of a slot."""
    start, end = place
    inside = [i for i, (low, high) in enumerate(offsets) if low < high and low < end and high > start]
    if not inside:
        raise DistillError(
            f"no token holds {{{slot}}}={text[start:end]!r} of {_short(text)}; give it another filler, which the "
            "tokenizer does not drop: tokenizer.tokenize(filler) != []."
        )
    return inside[0], inside[-1]


def _counts_rows(numbers: Tensor) -> bool:
    """Return whether a tensor can hold the numbers of the fillers of a slot, one a prompt."""
    return numbers.ndim == 1 and len(numbers) > 0 and not numbers.is_floating_point() and not numbers.is_complex()


def _device(numbers: Mapping[str, Tensor]) -> torch.device:
    return next(iter(numbers.values())).device


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else "…" + text[-59:])
