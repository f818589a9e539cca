import gzip
import json
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from distill import DistillError, Rows
from distill.evaluation import metrics
from distill.evaluation.metrics import preferences
from distill.networks import LSTMClassifier, LSTMLanguageModel, TransformerLanguageModel
from distill.tasks import MinimalPairs, minimal_pairs
from tests.distill.tiny_models import VOCABULARY

WORDS = "[PAD] [UNK] [BOS] the a key keys is are near cabinet cabinets old".split()
LINES = [
    {"test": "simple", "condition": "sing", "good": "the key is old", "bad": "the key are old"},
    {"test": "simple", "condition": "plur", "good": "the keys are old", "bad": "the keys is old"},
    {"test": "near", "condition": "sing", "good": "a key near the keys is old", "bad": "a key near the keys are old"},
    {"test": "simple", "condition": "sing", "good": "a key is old", "bad": "a key are old"},
]  # fmt: skip


def tokenizer(side="right", first=None):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if first:
        words.post_processor = processors.TemplateProcessing(single=f"{first} $A", special_tokens=[(first, 2)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", padding_side=side)


def write(path, lines=LINES):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    if path.suffix == ".gz":
        with gzip.open(path, "wt") as file:
            file.write(text)
    else:
        path.write_text(text)
    return path


class Bigrams(nn.Module):
    """A language model whose next token depends on the last one alone."""

    def __init__(self) -> None:
        super().__init__()
        table = torch.randn(len(WORDS), len(WORDS), generator=torch.Generator().manual_seed(0))
        self.table = nn.Embedding.from_pretrained(table)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.table(input_ids)


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_a_file_is_read(tmp_path, name):
    pairs = minimal_pairs(write(tmp_path / name), tokenizer())
    assert pairs.groups == ("simple", "simple", "near", "simple")
    assert len(pairs) == len(pairs.good) == len(pairs.bad) == 4
    assert [WORDS[i] for i in pairs.bad[2]["input_ids"].tolist()] == LINES[2]["bad"].split()
    assert minimal_pairs(tmp_path / name, tokenizer(), by="condition").groups == ("sing", "plur", "sing", "sing")


def test_the_fields_of_blimp_and_of_neither(tmp_path):
    blimp = [{"sentence_good": line["good"], "sentence_bad": line["bad"], "UID": "agr"} for line in LINES]
    assert set(minimal_pairs(write(tmp_path / "b.jsonl", blimp), tokenizer()).groups) == {"agr"}
    bare = [{"good": line["good"], "bad": line["bad"]} for line in LINES]
    assert set(minimal_pairs(write(tmp_path / "c.jsonl", bare), tokenizer()).groups) == {"all"}


def test_limit_draws_from_each_group(tmp_path):
    path = write(
        tmp_path / "p.jsonl", [{**LINES[0], "good": f"{'old ' * i}the key is old"} for i in range(20)] + LINES[2:3]
    )
    chosen = [minimal_pairs(path, tokenizer(), limit=5, seed=seed) for seed in (0, 0, 1)]
    lengths = [[len(row) for row in pairs.good.table["input_ids"]] for pairs in chosen]
    assert lengths[0] == lengths[1] != lengths[2]
    assert chosen[0].groups == ("simple",) * 5 + ("near",)
    assert lengths[0][:5] == sorted(set(lengths[0][:5]))
    assert len(minimal_pairs(path, tokenizer(), limit=100)) == 21


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("first", [None, "[BOS]"])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_preferences_are_those_of_a_sum_by_hand(tmp_path, side, first, batch_size):
    model, words = Bigrams(), tokenizer(side, first)
    pairs = minimal_pairs(write(tmp_path / "p.jsonl"), words)
    chances = model.table.weight.log_softmax(-1)

    def probability(text):
        ids = [WORDS.index(word) for word in [*([first] if first else []), *text.split()]]
        return sum(float(chances[a, b]) for a, b in pairwise(ids))

    right = [probability(line["good"]) > probability(line["bad"]) for line in LINES]
    assert len(set(right)) == 2
    found = preferences(model, pairs, batch_size=batch_size)
    assert list(found) == ["simple", "near", "all"]
    assert found["all"].value == sum(right) / 4
    assert found["simple"].value == pytest.approx((right[0] + right[1] + right[3]) / 3)
    assert (found["near"].value, found["near"].count) == (right[2], 1)


@pytest.mark.parametrize("kind", [LSTMLanguageModel, TransformerLanguageModel])
def test_what_a_language_model_learned_it_prefers(kind):
    draws = torch.Generator().manual_seed(0)
    good = torch.randint(3, VOCABULARY, (6, 5), generator=draws)
    bad = good.clone()
    bad[:, 3] = (good[:, 3] + 1) % VOCABULARY
    pairs = MinimalPairs(Rows({"input_ids": good}), Rows({"input_ids": bad}), ("a",) * 6)
    torch.manual_seed(0)
    model = kind(VOCABULARY, width=16, dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(good)[:, :-1].flatten(0, 1), good[:, 1:].flatten()).backward()
        optimizer.step()
    model.train()
    assert preferences(model, pairs)["a"].value == 1
    assert preferences(model, MinimalPairs(pairs.bad, pairs.good, pairs.groups))["all"].value == 0
    assert model.training


def test_a_classifier_prefers_nothing(tmp_path):
    pairs = minimal_pairs(write(tmp_path / "p.jsonl"), tokenizer())
    with pytest.raises(DistillError, match=r"logits have shape \[4, 3\] and the tokens \[4, \d\]; minimal pairs need"):
        preferences(LSTMClassifier(len(WORDS), 3), pairs)


@pytest.mark.parametrize(
    ("lines", "settings", "message"),
    [
        ([{"text": "x"}], {}, r"p.jsonl has text and not 'good' and 'bad'"),
        (LINES, {"by": "kind"}, r"has test, condition, good, bad and not 'kind'; .* another by="),
        (LINES, {"limit": 0}, "limit=0 keeps no pair"),
        ([LINES[0], {"test": "x", "good": "the key"}], {}, "has a line without 'bad'"),
        ([{**LINES[0], "bad": "the key is old"}], {}, "'the key is old' and of its counterpart are the same"),
        ([3], {}, "holds no JSON objects"),
        ([], {}, "holds no JSON objects"),
    ],
)  # fmt: skip
def test_files_that_hold_no_pairs_are_refused(tmp_path, lines, settings, message):
    with pytest.raises(DistillError, match=message):
        minimal_pairs(write(tmp_path / "p.jsonl", lines), tokenizer(), **settings)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(DistillError, match=r"nowhere.jsonl cannot be read: .* give a file of one JSON object a line"):
        minimal_pairs(tmp_path / "nowhere.jsonl", tokenizer())
    (tmp_path / "p.jsonl").write_text("no json")
    with pytest.raises(DistillError, match=r"p.jsonl cannot be read"):
        minimal_pairs(str(tmp_path / "p.jsonl"), tokenizer())


def test_the_published_files(shared_data):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared_data / "models" / "stories260K"
    words, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    pairs = minimal_pairs(shared_data / "agreement" / "marvin_linzen.jsonl.gz", words, limit=5)
    assert len(set(pairs.groups)) == 22
    blimp = shared_data / "agreement" / "blimp_regular_plural_subject_verb_agreement_1.jsonl"
    found = preferences(model, minimal_pairs(blimp, words, limit=300))
    assert found["all"].low > 0.5


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_adds_nothing_to_the_probability_of_a_sentence(side):
    model, ids = Bigrams(), [torch.tensor([3, 5, 7, 12]), torch.tensor([3, 6])]
    rows = Rows({"input_ids": ids, "attention_mask": [torch.ones_like(row) for row in ids]}, padding_side=side)
    alone = [metrics._log_probabilities(model, rows.take([i]), 1) for i in range(2)]
    assert torch.allclose(metrics._log_probabilities(model, rows, 2), torch.cat(alone))
