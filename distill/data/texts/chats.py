"""Rows of text as texts whose characters are marked: those of the completion, which a language model learns to write.

A chat becomes a text by the tokenizer's own chat template. Templates with `{% generation %}` marks say which characters
an assistant wrote. Of others the text before a turn, with the prompt for an answer, and the text up to its end must
both be the beginnings of the text of the whole chat; what lies between is the answer.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill.errors import DistillError
from interventions import shown

ASSISTANT = "assistant"
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
CHAT, SHARED, PROMPT, TEXT = ("messages",), ("conversations",), ("prompt", "completion"), ("text",)
CHATS = (CHAT, SHARED)
"""The columns of whole chats; `conversations` is that of ShareGPT."""
SENDERS = {"human": "user", "gpt": "assistant"}
"""The roles of ShareGPT's messages, `{"from": "human", "value": "…"}`, that have other names in chat templates."""
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class MarkedText:
    """A text of a row.

    Attributes:
        text: the text.
        spans: first character, and the one after the last, of each part that is learned; None for the whole text.
        is_chat: whether the text has the special tokens of a chat template, so that none are added.
    """

    text: str
    spans: tuple[tuple[int, int], ...] | None = None
    is_chat: bool = False


def marked_texts(rows: Iterable[Mapping[str, Any]], tokenizer: Any, names: Iterable[str]) -> Iterator[MarkedText]:
    """Yield the text of each row.

    Args:
        rows: each with `messages`, or `conversations` as ShareGPT has them, or `prompt` and `completion` (texts or
            lists of messages), or a column of texts; a column `tools` is given to the chat template.
        tokenizer: has the chat template.
        names: what errors call each row.

    Raises:
        DistillError: a chat for a tokenizer without a template, or one that its template refuses or whose answers it
            does not let one find; a value that is no text.
    """
    for row, name in zip(rows, names, strict=False):
        column = next((chat for (chat,) in CHATS if chat in row), None)
        if column is not None:
            yield _chat(tokenizer, messages_of(row[column], name, column), row.get("tools"), 0, name)
        elif PROMPT[0] in row:
            yield _prompted(tokenizer, row, name)
        else:
            (column, value), *_ = row.items()
            yield MarkedText(text_of(value, name, column))


def prompt_text(value: Any, tokenizer: Any, row: str) -> MarkedText:
    """Return a prompt without a completion: a text as it is, a list of messages with the prompt for an answer.

    Args:
        value: the text or the messages.
        tokenizer: has the chat template.
        row: what errors call the row.

    Raises:
        DistillError: neither, or messages for a tokenizer without a template.
    """
    if isinstance(value, str):
        return MarkedText(text_of(value, row, "prompt"))
    messages = messages_of(value, row, "prompt")
    return MarkedText(_template_of(tokenizer, None, row).text(messages, add_generation_prompt=True), is_chat=True)


def text_of(value: Any, row: str, column: str) -> str:
    """Return a value that is a text.

    Raises:
        DistillError: any other value, or half of a character.
    """
    if not isinstance(value, str) or any("\ud800" <= character <= "\udfff" for character in value):
        raise DistillError(
            f"{row} has {shown(value)} as {column!r}, which is no text; write it as one, in whole characters, or leave "
            "the row out."
        )
    return value


def messages_of(value: Any, row: str, column: str) -> list[Mapping[str, Any]]:
    """Return a value that is a list of messages, those of ShareGPT by the names of chat templates.

    Raises:
        DistillError: an empty list, or one of anything else.
    """
    given = (
        list(map(_message, value)) if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str) else []
    )
    odd = next((each for each in given if not isinstance(each, Mapping) or "role" not in each), None)
    if not given or odd is not None:
        raise DistillError(
            f"{row} has {shown(value if odd is None else odd)} in {column!r}, which is no message; write "
            f"{{'{column}': [{{'role': 'user', 'content': '…'}}, {{'role': 'assistant', 'content': '…'}}]}}."
        )
    return given


def _message(value: Any) -> Any:
    """Return a message of ShareGPT as one of a chat template; others as they are."""
    if not isinstance(value, Mapping) or "role" in value or not {"from", "value"} <= set(value):
        return value
    return {"role": SENDERS.get(value["from"], value["from"]), "content": value["value"]}


def _prompted(tokenizer: Any, row: Mapping[str, Any], name: str) -> MarkedText:
    """Return the text of a prompt and its completion."""
    prompt, completion = (row.get(column) for column in PROMPT)
    if isinstance(prompt, str):
        before = text_of(prompt, name, "prompt")
        after = text_of(completion, name, "completion")
        return MarkedText(before + after, ((len(before), len(before) + len(after)),))
    before_it = messages_of(prompt, name, "prompt")
    written = [{"role": ASSISTANT, "content": completion}] if isinstance(completion, str) else completion
    messages = [*before_it, *messages_of(written, name, "completion")]
    return _chat(tokenizer, messages, row.get("tools"), len(before_it), name)


def _chat(tokenizer: Any, messages: Messages, tools: Any, first: int, row: str) -> MarkedText:
    """Return a chat as a text, with the answers from a message on marked."""
    template = _template_of(tokenizer, tools, row)
    turns = [number for number, each in enumerate(messages) if each["role"] == ASSISTANT and number >= first]
    whole = template.text(messages)
    spans = template.spans(messages) if template.has_marks else None
    if spans is None:
        return MarkedText(whole, tuple(template.span(messages, turn, whole) for turn in turns), is_chat=True)
    if first and turns and len(spans) < len(turns):
        raise DistillError(
            f"{row} has {len(turns)} answers and its chat template marks {len(spans)}, so which belong to the "
            "completion is not known; give the whole chat as 'messages'."
        )
    kept = spans if not first else spans[len(spans) - len(turns) :]
    return MarkedText(whole, tuple(kept), is_chat=True)


def _template_of(tokenizer: Any, tools: Any, row: str) -> "_Template":
    """Return the chat template of a tokenizer for a row, or raise DistillError if it has none."""
    if not getattr(tokenizer, "chat_template", None):
        raise DistillError(
            f"{row} is a chat, and the tokenizer ({type(tokenizer).__name__}) has no chat template; give it one, "
            "tokenizer.chat_template = '…', or write rows of texts: {'prompt': '…', 'completion': '…'}."
        )
    return _Template(tokenizer, json.loads(tools) if isinstance(tools, str) else tools or None, row)


@dataclass(frozen=True)
class _Template:
    """The chat template of a tokenizer, for one row.

    Attributes:
        tokenizer: has the template.
        tools: the tools that the template shows, if any.
        row: what errors call the row.
    """

    tokenizer: Any
    tools: Any
    row: str

    @property
    def _source(self) -> str:
        """The template, that for tools where there are several."""
        return self.tokenizer.get_chat_template(None, self.tools)

    @property
    def has_marks(self) -> bool:
        """True for a template that marks what an assistant wrote."""
        return MARKS.search(self._source) is not None

    def text(self, messages: Messages, **settings: Any) -> str:
        """Return messages as a text.

        Raises:
            DistillError: messages that the template refuses.
        """
        from jinja2.exceptions import TemplateError

        try:
            return self.tokenizer.apply_chat_template(list(messages), tools=self.tools, tokenize=False, **settings)
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise DistillError(
                f"{self.row} is refused by the chat template ({type(error).__name__}: {reason}); correct its messages: "
                f"{shown([each.get('role') for each in messages])}."
            ) from error

    def spans(self, messages: Messages) -> list[tuple[int, int]]:
        """Return the characters inside of the marks of the template."""
        from transformers.utils.chat_template_utils import render_jinja_template

        plain = [{name: value for name, value in each.items() if value is not None} for each in messages]
        found: Any = render_jinja_template(
            [plain],
            tools=self.tools,
            chat_template=self._source,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        return [(int(start), int(end)) for start, end in found[1][0]]

    def span(self, messages: Messages, turn: int, whole: str) -> tuple[int, int]:
        """Return the characters of a turn, by the texts before it and up to its end.

        Raises:
            DistillError: one of these is not the beginning of the whole text, or nothing stands before the turn.
        """
        if not turn:
            raise DistillError(
                f"{self.row} begins with a message of the assistant, and the chat template does not mark what it "
                "wrote; begin with a message of the user or the system, or put {% generation %} … {% endgeneration %} "
                "around the answers in tokenizer.chat_template."
            )
        before = self.text(messages[:turn], add_generation_prompt=True)
        after = whole if turn == len(messages) - 1 else self.text(messages[: turn + 1])
        if not (whole.startswith(before) and whole.startswith(after) and len(before) <= len(after)):
            raise DistillError(
                f"{self.row}: the chat template writes what stands before and in message {turn} otherwise once more "
                "follows, so where the answer begins and ends is not known; put {% generation %} … {% endgeneration %} "
                "around the answers in tokenizer.chat_template, or end the chat with that answer."
            )
        return len(before), len(after)
