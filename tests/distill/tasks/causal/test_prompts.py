"""Laws of prompts: what is fed, where the words of a slot stand in it, and which tokens answers begin with."""

from itertools import product
from string import ascii_letters, digits

import pytest
import torch
from einops import rearrange
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, BertTokenizerFast, GPT2TokenizerFast, PreTrainedTokenizerFast

from distill.errors import DistillError
from distill.tasks.causal import prompts as module
from distill.tasks.causal.prompts import Prompts
from interventions import select

TEMPLATES = (
    "After lunch, {who} and {whom} left.",
    "{who} met {whom}, who gave a {thing} to",
    "The {thing} that {whom} saw ({who}) was",
)
FILLERS = {"who": ("Mary", "José", "Al"), "whom": ("Tom", "Marianne"), "thing": ("map", "red hat")}
SAID = {"who": ("Mary", "Al"), "whom": ("Tom", "Mar"), "thing": ("map", "hat")}
CORPUS = [t.format(**dict(zip(SAID, said, strict=True))) for t in TEMPLATES[:2] for said in product(*SAID.values())]
ALPHABET = sorted(ascii_letters + digits + "é+=()%,.?")
KINDS = ("bytes", "pieces", "words")
SETTINGS = [(kind, bos, side) for kind in KINDS for bos in (False, True) for side in ("left", "right")]


def small(kind="bytes", bos=False, side="right", corpus=(), **special):
    """A fast tokenizer: GPT-2's kind (bytes), Llama 2's (pieces), or words up to the next space, commas included."""
    core = {"words": words, "bytes": in_bytes, "pieces": in_pieces}[kind]([*CORPUS, *corpus])
    if bos:
        start = core.token_to_id("<s>")
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    start_token = {"bos_token": "<s>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side=side, **start_token, **special)


def words(corpus):
    found = sorted({word for text in ["José José, Marianne Marianne, red", *corpus] for word in text.split()})
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<s>", "?", *found])}, unk_token="?"))
    brackets = [pre_tokenizers.Split(each, "isolated") for each in "()"]
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), *brackets])
    return core


def in_bytes(corpus):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return trained(core, corpus, 300, pre_tokenizers.ByteLevel.alphabet())


def in_pieces(corpus):
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained(core, corpus, len(ALPHABET) + 40, ["▁", *ALPHABET])
    core.pre_tokenizer, core.decoder = None, decoders.Metaspace()
    return core


def trained(core, corpus, size, alphabet):
    settings = dict(vocab_size=size, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(corpus, trainers.BpeTrainer(**settings))
    return core


def every(prompts):
    """All prompts: each template with each filler."""
    sizes = {"template": len(prompts.templates), **{slot: len(words) for slot, words in prompts.fillers.items()}}
    places = torch.cartesian_prod(*(torch.arange(size) for size in sizes.values()))
    return dict(zip(sizes, places.T, strict=True))


def at(tokenizer, encoded, positions):
    """The text of the tokens at these positions `[batch]`, found as an intervention finds them."""
    chosen = select(positions[:, None], encoded["attention_mask"].bool())
    assert chosen.rows.tolist() == list(range(len(positions)))
    ids = encoded["input_ids"][chosen.rows, chosen.columns]
    return [tokenizer.decode([i]).strip() for i in ids.tolist()]


def assert_slots_stand_where_they_are_said(tokenizer, prompts, lower=False):
    """The tokens from first to last spell a slot's word (the last one its end), and the one before is none of it."""
    numbers = every(prompts)
    encoded, texts = prompts.encode(numbers), prompts.texts(numbers)
    for slot, words in prompts.fillers.items():
        having = [i for i, t in enumerate(numbers["template"].tolist()) if f"{{{slot}}}" in prompts.templates[t]]
        there = {name: number[having] for name, number in numbers.items()}
        first, last = prompts.first(slot, there), prompts.last(slot, there)
        ends = at(tokenizer, {name: part[having] for name, part in encoded.items()}, last)
        for row, low, high, end in zip(having, first.tolist(), last.tolist(), ends, strict=True):
            real = encoded["input_ids"][row][encoded["attention_mask"][row].bool()].tolist()
            word = words[int(numbers[slot][row])]
            word = word.lower().replace("é", "e") if lower else word
            spelled = tokenizer.decode(real[low : high + 1]).strip()
            assert spelled.rstrip(",.") == word, (texts[row], slot)
            assert "�" in end or (end and word.endswith(end.rstrip(",."))), (texts[row], slot)


@pytest.mark.parametrize(("kind", "bos", "side"), SETTINGS)
def test_slots_stand_where_they_are_said(kind, bos, side):
    tokenizer = small(kind, bos, side)
    assert_slots_stand_where_they_are_said(tokenizer, Prompts(TEMPLATES, FILLERS, tokenizer))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "bert-base-uncased", "stories260K"])
def test_slots_stand_where_they_are_said_to_real_tokenizers(name, side, shared_data):
    tokenizer = real(name, shared_data, side)
    assert_slots_stand_where_they_are_said(tokenizer, Prompts(TEMPLATES, FILLERS, tokenizer), lower="bert" in name)


def real(name, shared_data, side="right"):
    if name == "stories260K":
        return AutoTokenizer.from_pretrained(shared_data / "models" / name, padding_side=side)
    kind = GPT2TokenizerFast if name == "gpt2" else BertTokenizerFast
    return kind.from_pretrained(shared_data / "tokenizers" / name, padding_side=side)


@pytest.mark.parametrize(("kind", "bos", "side"), SETTINGS)
def test_a_network_is_fed_the_tokens_of_the_text(kind, bos, side):
    tokenizer = small(kind, bos, side)
    prompts = Prompts(TEMPLATES, FILLERS, tokenizer)
    encoded, numbers = prompts.encode(every(prompts)), every(prompts)
    lengths = encoded["attention_mask"].sum(1)
    assert lengths.unique().numel() > 1  # or nothing is padded
    for text, ids, mask in zip(prompts.texts(numbers), *encoded.values(), strict=True):
        alone = tokenizer(text)["input_ids"]
        width = len(ids) - len(alone)
        assert mask.tolist() == ([0] * width + [1] * len(alone) if side == "left" else [1] * len(alone) + [0] * width)
        assert ids[mask.bool()].tolist() == alone
    assert prompts.end(numbers).tolist() == (lengths - 1).tolist()
    assert tokenizer.pad_token is None


@pytest.mark.parametrize(("special", "expected"), [({}, 0), ({"eos_token": "M"}, "M"), ({"pad_token": "l"}, "l")])
def test_padding_is_that_of_the_tokenizer(special, expected):
    tokenizer = small(**special)
    encoded = (prompts := Prompts(TEMPLATES, FILLERS, tokenizer)).encode(every(prompts))
    pad = expected if expected == 0 else tokenizer.convert_tokens_to_ids(expected)
    assert encoded["input_ids"][encoded["attention_mask"] == 0].unique().tolist() == [pad]


@pytest.mark.parametrize(("kind", "bos"), [(kind, bos) for kind in KINDS for bos in (False, True)])
def test_answers_begin_as_the_tokenizer_continues_the_prompt(kind, bos):
    tokenizer = small(kind, bos)
    prompts, answers = Prompts(TEMPLATES[1:], FILLERS, tokenizer), ("Tom", "red", "a")
    found = prompts.answer_ids(answers, every(prompts))
    for text, row in zip(prompts.texts(every(prompts)), found.tolist(), strict=True):
        length = len(tokenizer(text)["input_ids"])
        assert row == [tokenizer(f"{text} {answer}")["input_ids"][length] for answer in answers]


@pytest.mark.parametrize(
    ("template", "answer", "written"),
    [("{a} is", "Tom", " Tom"), ("{a} is ", "Q", "Q"), ("{a} (", "Q", "Q"), ("{a} is", " Tom", " Tom")],
)
def test_an_answer_follows_a_space_unless_there_is_one(template, answer, written):
    tokenizer = small()
    found = Prompts([template], {"a": ["Al"]}, tokenizer).answer_ids([answer], {"a": torch.tensor([0])})
    assert found.tolist() == [[tokenizer(written)["input_ids"][0]]]


def test_prompts_of_a_batch_may_end_differently():
    tokenizer = small()
    found = Prompts(["{a} is", "{a} ("], {"a": ["Al"]}, tokenizer).answer_ids(
        ["Q"], numbers_of(template=[0, 1], a=[0, 0])
    )
    assert found.tolist() == [[tokenizer(" Q")["input_ids"][0]], [tokenizer("Q")["input_ids"][0]]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_answers_are_read_at_the_last_real_token(side):
    tokenizer = small(bos=True, side=side)
    prompts, answers = Prompts(TEMPLATES, FILLERS, tokenizer), ("Tom", "red", "a")
    numbers = every(prompts)
    encoded = prompts.encode(numbers)
    logits = torch.rand(*encoded["input_ids"].shape, len(tokenizer), generator=torch.Generator().manual_seed(0))
    real = rearrange(torch.arange(logits.shape[1]), "token -> 1 token") * encoded["attention_mask"]
    ids = prompts.answer_ids(answers, numbers)
    expected = [[logits[i, int(real[i].argmax()), j].item() for j in row] for i, row in enumerate(ids.tolist())]
    assert prompts.read(logits, answers, numbers).tolist() == expected


def test_a_slot_that_stands_twice_is_where_it_stands_first():
    tokenizer = small()
    prompts = Prompts(["{a} gave {b} to {a}"], {"a": ["Tom"], "b": ["Al"]}, tokenizer)
    numbers = dict.fromkeys("ab", torch.tensor([0]))
    assert prompts.texts(numbers) == ["Tom gave Al to Tom"]
    assert prompts.last("a", numbers) < prompts.first("b", numbers)


class Counting:
    """A tokenizer that counts the texts it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.texts = tokenizer, 0

    def __call__(self, texts, **settings):
        self.texts += len(texts)
        return self.tokenizer(texts, **settings)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


def test_a_prompt_is_tokenised_once():
    tokenizer = Counting(small())
    prompts = Prompts(TEMPLATES, FILLERS, tokenizer)
    twice = {name: number.repeat(2) for name, number in every(prompts).items()}
    for _ in range(2):
        prompts.encode(twice), prompts.end(twice)
    assert tokenizer.texts == len(set(prompts.texts(twice)))


def test_old_prompts_make_room(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 5)
    prompts, fresh = (Prompts(TEMPLATES, FILLERS, small()) for _ in range(2))
    numbers = every(prompts)
    one = {name: number[:1] for name, number in numbers.items()}
    for asked in (numbers, one, numbers):
        assert torch.equal(prompts.encode(asked)["input_ids"], fresh.encode(asked)["input_ids"])
        assert len(prompts._seen) <= 5


def numbers_of(**numbers):
    return {name: torch.tensor(value) for name, value in numbers.items()}


def test_a_template_alone_needs_no_number():
    prompts = Prompts(["{a} is {b}"], {"a": ["Tom", "Al"], "b": ["red"]}, small())
    assert prompts.texts(numbers_of(a=[1, 0], b=[0, 0])) == ["Al is red", "Tom is red"]


class Slow:
    is_fast = False


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((["{a} is"], {"a": ["Al"]}, Slow()), r"a fast one: Slow is none; pass AutoTokenizer\.from_pretrained\(NAME"),
        (("{a} is", {"a": ["Al"]}), r"templates must be a sequence, each a text; write templates=\['…'\]"),
        (([], {"a": ["Al"]}), r"must be a list of texts: \[\]"),
        (
            (["{a} is"], {"b": ["Al"]}),
            r"the slot \{a\} of '\{a\} is' has no fillers: fillers has b; give fillers=\{'a'",
        ),
        ((["{a} is"], {"a": []}), r"the slot \{a\} of '\{a\} is' has no fillers"),
    ],
)
def test_what_prompts_cannot_be_made_of(given, message):
    with pytest.raises(DistillError, match=message):
        Prompts(*given, *(() if len(given) == 3 else (small(),)))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"template": [0]}, r"the numbers of prompts lack 'a': they have template; give numbers=\{'a'"),
        ({"a": [0]}, r"the numbers of prompts lack 'template'"),
        ({"template": [0], "a": [2]}, r"'a' has no number 2: there are 2; give whole numbers 0 to 1"),
        ({"template": [-1], "a": [0]}, r"'template' has no number -1: there are 2"),
    ],
)
def test_numbers_of_no_prompt(numbers, message):
    with pytest.raises(DistillError, match=message):
        Prompts(["{a} is", "So {a} is"], {"a": ["Tom", "Al"]}, small()).encode(numbers_of(**numbers))


def test_a_slot_that_a_template_lacks():
    prompts = Prompts(["{a} is", "{a} saw {b}"], {"a": ["Tom"], "b": ["Al"]}, small())
    with pytest.raises(
        DistillError, match=r"the template '\{a\} is' has no \{b\}, it has a; leave it out of templates"
    ):
        prompts.last("b", numbers_of(template=[1, 0], a=[0, 0], b=[0, 0]))


def test_a_word_that_the_tokenizer_drops():
    tokenizer = small("words")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("Al", "")
    with pytest.raises(DistillError, match=r"no token holds \{a\}='Al' of 'Al is'; give it another filler"):
        Prompts(["{a} is"], {"a": ["Al"]}, tokenizer).encode(numbers_of(a=[0]))


ENDING = processors.TemplateProcessing(single="$A <s>", special_tokens=[("<s>", 0)])


@pytest.mark.parametrize(
    ("kind", "template", "answers", "message"),
    [
        (
            "bytes",
            "{a} and",
            ("Toma", "Mary", "Tomb"),
            r"'Toma' and 'Tomb' share .* 'Tom' after 'Al and'; leave out \['Tomb'\]",
        ),
        ("pieces", "{a} and", ("0", "1"), r"share .* token ' ' .* the space is a separate token, so end"),
        ("bytes", "{a} and ", ("Tom",), r"the answer 'Tom' changes the tokens of the prompt .*: 'Al and '; .*rstrip"),
        ("ending", "{a} and", ("Tom",), r"nothing can continue 'Al and': the tokenizer ends it with '<s>'; pass the"),
    ],
)
def test_answers_that_cannot_be_read(kind, template, answers, message):
    tokenizer = small("bytes" if kind == "ending" else kind)
    if kind == "ending":
        tokenizer.backend_tokenizer.post_processor = ENDING
    with pytest.raises(DistillError, match=message):
        Prompts([template], {"a": ["Al"]}, tokenizer).answer_ids(answers, numbers_of(a=[0]))


def test_end_is_the_last_token_of_the_text_where_the_tokenizer_adds_one():
    tokenizer = small()
    tokenizer.backend_tokenizer.post_processor = ENDING
    prompts = Prompts(["{a} and"], {"a": ["Al"]}, tokenizer)
    numbers = numbers_of(a=[0])
    assert at(tokenizer, prompts.encode(numbers), prompts.end(numbers)) == ["and"]


@pytest.mark.parametrize(("cut", "vocabulary"), [(1, 1000), (0, 10)])
def test_logits_of_something_else(cut, vocabulary):
    prompts = Prompts(["{a} and"], {"a": ["Al"]}, small())
    numbers = numbers_of(a=[0, 0])
    width = prompts.encode(numbers)["input_ids"].shape[1]
    message = rf"prompts of {width} tokens, and the logits are \[2, {width - cut}, {vocabulary}\]; give those of a"
    with pytest.raises(DistillError, match=message):
        prompts.read(torch.zeros(2, width - cut, vocabulary), ["Tom"], numbers)
