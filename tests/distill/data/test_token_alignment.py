"""Texts under two tokenizers: what is paired, what means the same, and that one tokenizer on both sides is plain KD."""

import pytest
import torch

from distill import DistillError
from distill.data.token_alignment import Spans, TokenAlignment, shared_log_probabilities, span_kd
from distill.data.token_meanings import Shared, shared_meanings
from distill.losses import kd, reverse_kl

TEXTS = ["the cat sees a dog", "Dogs like the cat, not a bird.", "a bird"]
WORDS = "the a cat dog bird sees like likes not".split()


def fast(tokenizer, **special):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def words(vocabulary=WORDS, order=1):
    """Whole words, spaces dropped, [CLS] in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    listed = ["[PAD]", "[UNK]", "[CLS]", *vocabulary, ",", "."][::order]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(listed)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", listed.index("[CLS]"))]
    )
    return fast(tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]")


def pieces():
    """WordPiece without capitals."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    parts = [
        "[PAD]",
        "[UNK]",
        "the",
        "a",
        "cat",
        "do",
        "##g",
        "##gs",
        "bi",
        "##rd",
        "see",
        "##s",
        "like",
        "not",
        ",",
        ".",
    ]
    tokenizer = Tokenizer(models.WordPiece({part: i for i, part in enumerate(parts)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    return fast(tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def byte_level(merges=(), shuffled=False):
    """GPT-2's way, with few merges: all bytes, some words. `shuffled` gives every token another number."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    listed = [*alphabet, *("".join(merge) for merge in merges), "<end>"]
    if shuffled:
        order = torch.randperm(len(listed), generator=torch.Generator().manual_seed(0)).tolist()
        listed = [listed[i] for i in order]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(listed)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return fast(tokenizer, eos_token="<end>", pad_token="<end>")


MERGES = [
    ("t", "h"),
    ("th", "e"),
    ("Ġ", "c"),
    ("Ġc", "a"),
    ("Ġca", "t"),
    ("Ġ", "the"),
    ("d", "o"),
    ("do", "g"),
    ("Ġ", "a"),
]


def unigram():
    """SentencePiece's way: ▁ for a space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(set("".join(TEXTS)) - {" "})
    scored = [("<unk>", 0.0), ("▁", -4.0), *((x, -5.0) for x in letters), ("▁the", -1.0), ("▁cat", -1.0), ("og", -2.0)]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return fast(tokenizer, unk_token="<unk>", pad_token="<unk>")


def nameless():
    """Parts of words without a mark."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE({x: i for i, x in enumerate("abcd")}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return fast(tokenizer)


def tokens(tokenizer, row):
    return tokenizer.convert_ids_to_tokens(row.tolist())


def paired(alignment, texts, by="prefix"):
    """The texts read up to each pair, from the offsets, and the tokens there: (student's, teacher's)."""
    batch = alignment.rows(texts).batch(range(len(texts)))
    rows, here, there = alignment.spans(batch, by)
    ours = [tokens(alignment.student, row) for row in batch["input_ids"]]
    theirs = [tokens(alignment.teacher, row) for row in batch["teacher_input_ids"]]
    return [(ours[r][i], theirs[r][j]) for r, i, j in zip(*(x.tolist() for x in (rows, here, there)), strict=True)]


def test_rows_hold_what_both_tokenizers_say():
    alignment = TokenAlignment(byte_level(MERGES), words())
    rows = alignment.rows(TEXTS, [0, 1, 2])
    batch = rows.batch([0, 2])
    assert tokens(alignment.student, batch["input_ids"][0]) == ["[CLS]", "the", "cat", "sees", "a", "dog"]
    assert batch["starts"].tolist() == [[-1, 0, 4, 8, 13, 15], [-1, 0, 2, -1, -1, -1]]
    assert batch["ends"].tolist() == [[-1, 3, 7, 12, 14, 18], [-1, 1, 6, -1, -1, -1]]
    assert tokens(alignment.teacher, batch["teacher_input_ids"][0])[:4] == ["the", "Ġcat", "Ġ", "s"]
    assert batch["teacher_starts"][0, :4].tolist() == [0, 4, 8, 8]  # without the space
    assert batch["teacher_ends"][0, :4].tolist() == [3, 7, 8, 9]
    padding = batch["teacher_attention_mask"] == 0
    assert padding[1].any()
    assert (batch["teacher_input_ids"][padding] == alignment.teacher.pad_token_id).all()
    assert alignment.teacher.pad_token_id != 0
    assert (batch["teacher_ends"][padding] == -1).all()
    assert batch["labels"].tolist() == [0, 2]
    assert rows.take([1]).batch([0])["teacher_ends"].shape == rows.batch([1])["teacher_ends"].shape
    assert len(alignment.rows(TEXTS, max_length=2).batch([0])["input_ids"][0]) == 2


def test_prefixes_end_together():
    assert paired(TokenAlignment(byte_level(MERGES), words()), ["the cat sees a dog"]) == [
        ("the", "the"),
        ("cat", "Ġcat"),
        ("sees", "s"),
        ("a", "Ġa"),
        ("dog", "dog"),
    ]
    assert paired(TokenAlignment(pieces(), unigram()), ["the dog"]) == [("▁the", "the"), ("og", "##g")]


def test_tokens_stand_for_the_same_characters():
    alignment = TokenAlignment(byte_level(MERGES), words())
    assert paired(alignment, ["the cat sees a dog"], "token") == [
        ("the", "the"),
        ("cat", "Ġcat"),
        ("a", "Ġa"),
        ("dog", "dog"),
    ]


def test_a_letter_in_several_tokens_is_read_after_the_last():
    alignment = TokenAlignment(byte_level(), byte_level(MERGES))
    batch = alignment.rows(["a é b"]).batch([0])
    spans = alignment.spans(batch)
    assert len(batch["teacher_ends"][0]) == 6  # a, Ġ, two bytes of é, Ġ, b
    assert spans.teacher.tolist() == [0, 1, 3, 4, 5]
    assert alignment.spans(batch, "token").teacher.tolist() == [0, 1, 4, 5]


@pytest.mark.parametrize(
    ("places", "prefixes", "alone"),
    [
        ([(0, 1), (1, 3)], [0, 1], [0, 1]),
        ([(0, 2), (1, 3)], [1], []),  # a letter begins in the first and ends in the second
        ([(0, 1), (1, 1), (1, 2)], [1, 2], [1, 2]),  # one that stands for nothing comes after the same text
        ([(-1, -1), (0, 1), (1, 2), (-1, -1)], [1, 2], [1, 2]),
        ([(0, 0), (0, 1)], [1], [1]),  # nothing has been read before the first letter
    ],
)
def test_after_which_tokens_the_text_has_been_read(places, prefixes, alone):
    """Against a tokenizer with the same tokens, which are paired with themselves if they are paired at all."""
    starts, ends = (torch.tensor(side)[None] for side in zip(*places, strict=True))
    batch = {"starts": starts, "ends": ends, "teacher_starts": starts, "teacher_ends": ends}
    alignment = TokenAlignment(words(), words())
    for by, expected in (("prefix", prefixes), ("token", alone)):
        spans = alignment.found(batch, by)
        assert spans.student.tolist() == spans.teacher.tolist() == expected


def test_pairs_are_those_of_a_loop():
    alignment = TokenAlignment(unigram(), pieces())
    batch = alignment.rows(TEXTS).batch(range(3))
    expected = []
    for row in range(3):
        ends, others = (batch[name][row].tolist() for name in ("ends", "teacher_ends"))
        last = [{end: i for i, end in enumerate(side) if end > 0} for side in (ends, others)]  # ▁a may be two tokens
        expected += [(row, last[0][end], last[1][end]) for end in sorted(last[0].keys() & last[1])]
    assert list(zip(*(x.tolist() for x in alignment.spans(batch)), strict=True)) == expected
    assert len(expected) > 10


MEANINGS = [
    (words, pieces, {"the": {"the"}, "cat": {"cat"}, ",": {","}, "sees": None}),
    (
        byte_level,
        pieces,
        {"Ġa": {"a"}, "Ġthe": {"the"}, "the": None, ",": {","}, "g": {"##g"}, "Ġcat": {"cat"}, "A": None},
    ),
    (unigram, byte_level, {"▁the": {"Ġthe"}, "▁cat": {"Ġcat"}, "▁": {"Ġ"}, "s": {"s"}, "og": None, "a": {"a"}}),
    (byte_level, byte_level, {"the": {"the"}, "Ġ": {"Ġ"}, "<end>": {"<end>"}}),
]


@pytest.mark.parametrize(("student", "teacher", "expected"), MEANINGS)
def test_tokens_that_mean_the_same(student, teacher, expected):
    student, teacher = (make(MERGES) if make is byte_level else make() for make in (student, teacher))
    shared = shared_meanings(student, teacher)
    others = teacher.get_vocab()
    for token, same in expected.items():
        number = shared.student[student.convert_tokens_to_ids(token)]
        found = {other for other, i in others.items() if shared.teacher[i] == number and number < shared.count}
        assert found == (same or set()), token


def test_capitals_that_a_student_does_not_know_are_one_meaning():
    shared = shared_meanings(pieces(), byte_level([("t", "h"), ("th", "e"), ("Ġ", "the"), ("T", "he"), ("h", "e")]))
    assert shared.count < len(shared.student)
    teacher = byte_level([("h", "e"), ("t", "he"), ("T", "he"), ("Ġ", "the"), ("Ġ", "The")])
    shared = shared_meanings(pieces(), teacher)
    numbers = shared.teacher[torch.tensor(teacher.convert_tokens_to_ids(["Ġthe", "ĠThe"]))]
    assert numbers[0] == numbers[1] < shared.count


def answers(batch, side, size, seed=0, dtype=torch.float64):
    """Logits that are decided by the tokens read, with a padding of their own."""
    ids = batch[f"{side}input_ids"]
    return torch.randn(*ids.shape, size, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 3


@pytest.mark.parametrize("make", [words, pieces, byte_level, unigram])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_one_tokenizer_on_both_sides_is_plain_distillation(make, temperature):
    alignment = TokenAlignment(make(), make())
    batch = alignment.rows(TEXTS).batch(range(3))
    size = len(alignment.student)
    student, teacher = answers(batch, "", size), answers(batch, "teacher_", size, 1)
    student.requires_grad_()
    spans = alignment.spans(batch)
    counted = torch.zeros_like(batch["ends"], dtype=torch.bool)
    counted[spans.rows, spans.student] = True
    if make is not unigram:  # which may have two tokens, ▁ and a, for the first letter
        assert torch.equal(counted, batch["ends"] >= 0)
    assert torch.equal(spans.student, spans.teacher)
    found = span_kd(student, teacher, spans, alignment.shared, temperature)
    expected = kd(student, teacher, temperature, mask=counted)
    assert found.item() == pytest.approx(expected.item(), rel=1e-14)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (found, expected)]
    assert torch.allclose(*gradients, atol=1e-15)


def test_other_numbers_of_the_same_tokens_are_plain_distillation():
    plain, shuffled = byte_level(MERGES), byte_level(MERGES, shuffled=True)
    alignment = TokenAlignment(plain, shuffled)
    batch = alignment.rows(TEXTS).batch(range(3))
    size = len(plain)
    names = plain.convert_ids_to_tokens(range(size))
    order = torch.tensor(shuffled.convert_tokens_to_ids(names))  # of the student's logits, by the teacher's numbers
    assert not torch.equal(order, torch.arange(size))
    student, teacher = answers(batch, "", size), answers(batch, "teacher_", size, 1)
    spans = alignment.spans(batch)
    counted = torch.zeros_like(batch["ends"], dtype=torch.bool)
    counted[spans.rows, spans.student] = True
    expected = kd(student[..., order], teacher, 2.0, mask=counted)
    assert span_kd(student, teacher, spans, alignment.shared, 2.0).item() == pytest.approx(expected.item(), rel=1e-12)


def test_what_is_added_up_by_hand():
    """Meanings: a: student 0, teacher {0, 2}; b: student 2, teacher 1; the rest: student 1, teacher 3."""
    shared = Shared(torch.tensor([0, 2, 1]), torch.tensor([0, 1, 0, 2]), 2)
    student = torch.tensor([[0.5, 0.2, 0.3]]).log()
    teacher = torch.tensor([[0.1, 0.3, 0.4, 0.2]]).log()
    ours, theirs = shared_log_probabilities(student, teacher, shared)
    assert torch.allclose(ours.exp(), torch.tensor([[0.5, 0.3, 0.2]]))
    assert torch.allclose(theirs.exp(), torch.tensor([[0.5, 0.3, 0.2]]))
    spans = Spans(*torch.tensor([[0], [1], [0]]))
    padded = torch.stack([torch.zeros(1, 3), student], 1)
    assert span_kd(padded, teacher[None], spans, shared).item() == pytest.approx(0, abs=1e-7)
    # at temperature 1/2 probabilities are squared before they are added up
    cold = shared_log_probabilities(student, teacher, shared, 0.5)[1].exp()
    assert torch.allclose(cold, torch.tensor([[0.17, 0.09, 0.04]]) / 0.30)


def test_what_one_cannot_say_at_all_is_not_held_against_it():
    shared = Shared(torch.tensor([0, 1]), torch.tensor([0, 1, 2]), 2)  # the student knows no token beyond
    student = torch.tensor([[0.5, 0.5]]).log().requires_grad_()
    teacher = torch.tensor([[0.3, 0.1, 0.6]]).log()
    _, theirs = shared_log_probabilities(student, teacher, shared)
    assert torch.allclose(theirs.exp(), torch.tensor([[0.75, 0.25]]))
    loss = span_kd(student[None], teacher[None], Spans(*torch.zeros(3, 1).long()), shared)
    assert loss.item() == pytest.approx(0.130812, abs=1e-6)  # 0.75 ln 1.5 + 0.25 ln 0.5
    loss.backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("divergence", [None, reverse_kl])
def test_extreme_and_half_precision_logits_stay_finite(divergence):
    shared = Shared(torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 1, 1, 2]), 2)
    spans = Spans(*torch.zeros(3, 1).long())
    settings = {} if divergence is None else {"divergence": divergence}
    student = torch.tensor([[[400.0, -400.0, -400.0, -400.0, -400.0]]], requires_grad=True)
    teacher = torch.tensor([[[-400.0, 400.0, -400.0, -400.0]]])
    loss = span_kd(student, teacher, spans, shared, **settings)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    half = span_kd(student.bfloat16() / 100, teacher.bfloat16() / 100, spans, shared, **settings)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(
        span_kd(student / 100, teacher / 100, spans, shared, **settings).item(), rel=0.02
    )


def test_gradients_are_right():
    shared = Shared(torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 1, 1, 2]), 2)
    spans = Spans(torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([1, 0]))
    draw = torch.Generator().manual_seed(0)
    student = torch.randn(1, 2, 5, generator=draw, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 2, 4, generator=draw, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: span_kd(s, teacher, spans, shared, 2.0), student)


def test_padding_changes_nothing():
    alignment = TokenAlignment(byte_level(MERGES), pieces())
    values = []
    for rows in ([2], [0, 1, 2]):
        batch = alignment.rows(TEXTS).batch(rows)
        spans = alignment.spans(batch)
        keep = spans.rows == len(rows) - 1
        spans = Spans(*(each[keep] for each in spans))
        ids = [batch[name][-1] for name in ("input_ids", "teacher_input_ids")]
        student, teacher = (
            torch.sin(row[:, None] * torch.arange(1, 2 + size)).expand(len(rows), -1, -1)
            for row, size in zip(ids, (len(alignment.student), len(alignment.teacher)), strict=True)
        )
        values.append((len(spans.rows), span_kd(student, teacher, spans, alignment.shared).item()))
    assert values[0] == values[1]
    assert values[0][0] == 3


def test_models_may_have_more_logits_than_tokens():
    alignment = TokenAlignment(words(), pieces())
    batch = alignment.rows(TEXTS).batch(range(3))
    spans, shared = alignment.spans(batch), alignment.shared
    student, teacher = answers(batch, "", len(alignment.student)), answers(batch, "teacher_", len(alignment.teacher), 1)
    wide = torch.cat([student, torch.full_like(student[..., :3], -1e9)], -1)
    assert span_kd(wide, teacher, spans, shared).item() == pytest.approx(
        span_kd(student, teacher, spans, shared).item()
    )
    with pytest.raises(DistillError, match=r"the student has 5 logits and its tokenizer 16 tokens"):
        span_kd(student[..., :5], teacher, spans, shared)


def slow():
    class Slow:
        is_fast = False

    return Slow()


def test_errors():
    with pytest.raises(DistillError, match="tokenizer of the student is a Slow, .*use a fast one"):
        TokenAlignment(words(), slow())
    alignment = TokenAlignment(words(), byte_level())
    with pytest.raises(DistillError, match="by='word' does not pair tokens"):
        alignment.spans(alignment.rows(TEXTS).batch([0]), "word")
    with pytest.raises(DistillError, match=r"the data has input_ids; make it with data=alignment.rows\(texts\)"):
        alignment.spans({"input_ids": torch.ones(1, 2)})
    with pytest.raises(DistillError, match="takes a list of texts"):
        alignment.rows([])
    with pytest.raises(DistillError, match="text 1, '', has no token"):
        alignment.rows(["a", ""])
    with pytest.raises(DistillError, match="temperature above 0"):
        span_kd(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), Spans(*torch.zeros(3, 1).long()),
                Shared(torch.arange(2), torch.arange(2), 2), 0.0)  # fmt: skip
    with pytest.raises(DistillError, match="BPE.* does not mark where a word begins"):
        shared_meanings(nameless(), words())
    with pytest.raises(DistillError, match="no token of the student's vocabulary means the same"):
        shared_meanings(words(["chat"]), unigram_of("xyz"))


def unigram_of(letters):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *((x, -1.0) for x in letters)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return fast(tokenizer, unk_token="<unk>")


def test_a_batch_without_pairs():
    alignment = TokenAlignment(words(), words())
    batch = alignment.rows(["the cat", "a dog"]).batch(range(2))
    batch = {**batch, "teacher_ends": batch["teacher_ends"] + 50 * (batch["teacher_ends"] >= 0)}
    with pytest.raises(
        DistillError, match="of the 4 tokens of the student and the 4 of the teacher in this batch of 2"
    ):
        alignment.spans(batch)
    assert len(alignment.found(batch).rows) == 0


@pytest.fixture(scope="module")
def real(shared_data):
    from transformers import BertTokenizerFast, GPT2TokenizerFast

    folder = shared_data / "tokenizers"
    if not folder.is_dir():
        pytest.skip(f"no tokenizers in {folder}")
    gpt2 = folder / "gpt2"
    return (
        GPT2TokenizerFast(vocab=str(gpt2 / "vocab.json"), merges=str(gpt2 / "merges.txt")),
        BertTokenizerFast(vocab=str(folder / "bert-base-uncased" / "vocab.txt")),
    )


def test_gpt2_and_bert(real):
    gpt2, bert = real
    alignment = TokenAlignment(gpt2, bert)
    found = paired(alignment, ["Héllo wörld, don't  stop 😀 naïve"])
    assert found == [
        ("hello", "llo"), ("world", "ld"), (",", ","), ("don", "Ġdon"), ("t", "'t"), ("stop", "Ġstop"),
        ("[UNK]", "Ģ"), ("naive", "ĠnaÃ¯ve"),
    ]  # fmt: skip
    shared = alignment.shared
    assert 15_000 < shared.count < len(bert)
    numbers = shared.teacher[
        torch.tensor(gpt2.convert_tokens_to_ids(["Ġthe", "ĠThe", "the", "Ġ,", ",", "ing"]))
    ].tolist()
    ours = shared.student[torch.tensor(bert.convert_tokens_to_ids(["the", "##the", ",", "##ing", "[CLS]"]))].tolist()
    assert numbers == [ours[0], ours[0], ours[1], ours[2], ours[2], ours[3]]
    assert ours[4] == shared.count
    assert len(set(ours)) == 5
