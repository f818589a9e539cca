"""Chats as texts: what is marked is what the assistant wrote, whatever the template and the tokenizer."""

import pytest

from distill import DistillError
from distill.data.texts.chats import marked_texts
from distill.data.texts.tokens import tokens_of
from tests.distill.data.texts.tokenizers import (
    CHATML,
    FORGETFUL,
    INST,
    MARKED,
    MARKED_TO_THE_NEWLINE,
    tokenizer,
)

TURNS = [
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "It is a dog!"},
    {"role": "user", "content": "the cat likes\nthe bird."},
    {"role": "assistant", "content": "yes."},
]
SYSTEM = {"role": "system", "content": "Answer: no."}


def read(rows, reader):
    names = [f"row {number} of the data" for number in range(len(rows))]
    return list(tokens_of(zip(names, marked_texts(rows, reader, names), strict=True), reader))


def learned(row):
    return [token for token, kept in zip(row.ids, row.learned, strict=True) if kept]


def alike(reader, tokens, text):
    """Whether tokens are those of a text, up to white space."""
    return "".join(reader.decode(tokens).split()) == "".join(text.split())


@pytest.mark.parametrize("kind", ["bytes", "pieces", "words"])
@pytest.mark.parametrize(
    ("template", "end"),
    [(CHATML, "<|im_end|>"), (INST, "</s>"), (MARKED, "<|im_end|>"), (MARKED_TO_THE_NEWLINE, "<|im_end|>")],
    ids=["chatml", "inst", "marked", "marked to the newline"],
)
@pytest.mark.parametrize("chat", [TURNS, [SYSTEM, *TURNS], TURNS[:2]], ids=["turns", "system", "one"])
def test_what_is_learned_is_each_answer_of_the_assistant_and_its_end(kind, template, end, chat):
    """The whole chat has the tokens of the template; those that are learned say the answers, the others the rest."""
    reader = tokenizer(kind, template)
    (row,) = read([{"messages": chat}], reader)
    assert list(row.ids) == reader.apply_chat_template(chat, return_dict=True)["input_ids"]
    answers = "".join(each["content"] + end for each in chat if each["role"] == "assistant")
    expected = reader(answers, add_special_tokens=False)["input_ids"]
    assert alike(reader, learned(row), reader.decode(expected))
    rest = [token for token, kept in zip(row.ids, row.learned, strict=True) if not kept]
    whole = "".join(reader.decode(row.ids).split())
    assert len("".join(reader.decode(rest).split())) == len(whole) - len("".join(reader.decode(expected).split()))


@pytest.mark.parametrize("kind", ["bytes", "pieces", "words"])
@pytest.mark.parametrize("template", [CHATML, INST, MARKED], ids=["chatml", "inst", "marked"])
def test_a_completion_is_learned_and_the_answers_of_its_prompt_are_not(kind, template):
    reader = tokenizer(kind, template)
    whole, last = read([{"messages": TURNS}, {"prompt": TURNS[:3], "completion": TURNS[3:]}], reader)
    assert whole.ids == last.ids
    first_turn = read([{"messages": TURNS[:2]}], reader)[0].learned
    assert list(last.learned) == [kept and i >= len(first_turn) for i, kept in enumerate(whole.learned)]
    assert read([{"prompt": TURNS[:3], "completion": TURNS[3]["content"]}], reader)[0] == last


def test_without_a_tokenizer_of_offsets_the_tokens_before_an_answer_decide():
    class Slow:
        """As tokenizers in Python are: without places of tokens in the text."""

        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return False if name == "is_fast" else getattr(self.inner, name)

        def __call__(self, *given, **settings):
            assert "return_offsets_mapping" not in settings
            return self.inner(*given, **settings)

    fast = tokenizer("bytes", CHATML)
    assert read([{"messages": TURNS}], Slow(fast)) == read([{"messages": TURNS}], fast)


def test_tools_are_shown_to_the_template():
    reader = tokenizer("bytes", "{% if tools %}{{ tools[0]['name'] }}{% endif %}" + CHATML)
    with_tool, without = read([{"messages": TURNS, "tools": '[{"name": "bird"}]'}, {"messages": TURNS}], reader)
    assert reader.decode(with_tool.ids) == "bird" + reader.decode(without.ids)
    assert learned(with_tool) == learned(without)


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        ({"messages": TURNS}, None, r"row 0 of the data is a chat, .* has no chat template; .*chat_template = "),
        ({"messages": TURNS}, FORGETFUL, r"writes what stands before and in message 1 otherwise .* generation"),
        ({"messages": TURNS[1:]}, CHATML, "begins with a message of the assistant"),
        ({"messages": TURNS}, "{{ raise_exception('roles must alternate') }}", "refused by the .*roles must alternate"),
        ({"messages": []}, CHATML, r"row 0 of the data has \[\] in 'messages'"),
        ({"messages": [{"content": "a"}]}, CHATML, r"{'content': 'a'} in 'messages', which is no message"),
        ({"messages": "hello"}, CHATML, "has 'hello' in 'messages'"),
        ({"prompt": "a", "completion": 3}, None, "has 3 as 'completion', which is no text"),
        ({"prompt": TURNS[:1], "completion": 3}, CHATML, "has 3 in 'completion', which is no message"),
        ({"text": "\ud800"}, None, "which is no text; write it as one, in whole characters"),
    ],
)
def test_what_cannot_be_read_says_why_in_one_line(row, template, message):
    with pytest.raises(DistillError, match=message) as error:
        read([row], tokenizer("bytes", template))
    assert "\n" not in str(error.value)


def test_a_chat_that_ends_with_the_answer_needs_no_marks_although_the_template_changes_earlier_ones():
    (row,) = read([{"prompt": TURNS[:3], "completion": TURNS[3:]}], reader := tokenizer("bytes", FORGETFUL))
    assert reader.decode(learned(row)) == " yes."


def test_chats_of_sharegpt_are_those_of_messages():
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "the dog"}]
    shared = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "the dog"}]
    for row in ({"conversations": shared}, {"messages": shared}, {"conversations": messages}):
        made = [
            list(marked_texts([each], tokenizer(template=CHATML), ["row 0"])) for each in ({"messages": messages}, row)
        ]
        assert made[0] == made[1]
