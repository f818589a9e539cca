"""The tokens of prompts and completions: where the completion begins, token by token, and how a text ends."""

import pytest

from distill import DistillError
from distill.data.texts.chats import MarkedText
from distill.data.texts.tokens import CHUNK, tokens_of
from tests.distill.data.texts.tokenizers import tokenizer


def of(prompt, completion, reader):
    text = MarkedText(prompt + completion, ((len(prompt), len(prompt) + len(completion)),))
    (row,) = tokens_of([("row 0", text)], reader)
    return row


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("kind", ["bytes", "pieces", "words"])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("Answer:", " yes."), ("Answer: ", "yes."), ("What is it?\n", "It is a dog!"), ("", "no."), ("the cat", ""),
     ("What", " ÄÖ 日本 is it")],
)  # fmt: skip
def test_a_completion_begins_at_its_first_token_and_ends_with_the_end_token(kind, prompt, completion, adds):
    reader = tokenizer(kind, adds=adds)
    row = of(prompt, completion, reader)
    assert list(row.ids) == [*[1] * adds, *reader(prompt + completion, add_special_tokens=False)["input_ids"], 2]
    first = list(row.learned).index(True)
    assert all(row.learned[first:])
    for part, text in ((row.ids[:first], "<s>" * adds + prompt), (row.ids[first:], completion + "</s>")):
        if kind != "words" and "Ä" not in completion:
            assert "".join(reader.decode(part).split()) == "".join(text.split())
    if kind == "words":
        assert first == adds + len(reader(prompt, add_special_tokens=False)["input_ids"])


def test_a_token_over_the_border_is_an_error_where_it_has_letters_of_both():
    reader = tokenizer("bytes")
    assert len(reader("user")["input_ids"]) == 1
    with pytest.raises(DistillError, match=r"row 0: a completion begins or ends at 'user', within a token"):
        of("us", "er", reader)


def test_an_answer_may_end_within_the_white_space_of_a_token():
    class Joined:
        """One token for a full stop and the newline after it, as Llama 3 has."""

        eos_token_id, is_fast = 2, True

        def __call__(self, texts, **settings):
            known = {"a": [(0, 1)], "a.": [(0, 1), (1, 2)], "a.\nb": [(0, 1), (1, 3), (3, 4)]}
            if isinstance(texts, str):
                return {"input_ids": [5], "special_tokens_mask": [0]}
            ids = {"a": [5], "a.": [5, 6], "a.\nb": [5, 7, 8]}
            return {"input_ids": [ids[text] for text in texts], "offset_mapping": [known[text] for text in texts]}

    (row,) = tokens_of([("row 0", MarkedText("a.\nb", ((1, 2),), is_chat=True))], Joined())
    assert list(row.learned) == [False, True, False]


def test_texts_have_one_beginning_and_one_end():
    reader = tokenizer("bytes", adds=True)
    plain, given = tokens_of([("0", MarkedText("the cat")), ("1", MarkedText("<s>the cat</s>"))], reader)
    assert plain == given
    assert all(plain.learned)
    assert [plain.ids[0], plain.ids[-1]] == [1, 2]


def test_many_texts_are_those_one_by_one():
    reader = tokenizer("bytes")
    texts = [(str(i), MarkedText(f"the cat {i} likes", ((3, 7),))) for i in range(CHUNK + 3)]
    together = list(tokens_of(texts, reader))
    assert len(together) == CHUNK + 3
    for number in (0, CHUNK - 1, CHUNK, CHUNK + 2):
        assert [together[number]] == list(tokens_of([texts[number]], reader))
