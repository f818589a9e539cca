"""What several tests of the command line and of teachers need: a tiny task of one's own, saved models, an own cache."""

import pytest
import torch

WORDS = "the a cat dog bird sees likes good bad fine poor very not film plot".split()
GOOD, BAD = {"good", "fine", "likes"}, {"bad", "poor", "not"}


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Texts that are positive where they have more good words than bad ones."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    while len(rows) < count:
        length = int(torch.randint(3, 8, (), generator=draw))
        words = [WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=draw)]
        balance = sum((w in GOOD) - (w in BAD) for w in words)
        if balance:
            rows.append((" ".join(words), "positive" if balance > 0 else "negative"))
    return rows


def write_csv(path, rows, header="text,label"):
    path.write_text("\n".join([header, *(f"{text},{label}" for text, label in rows)]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def csv(tmp_path):
    """A file of 60 sentences."""
    return write_csv(tmp_path / "films.csv", sentences(60))


def save_bert(folder, *, classifier: bool, layers: int = 3, labels: int = 2):
    """A tiny BERT with its WordPiece tokenizer; its classifier answers by the words, or it has none."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=32,
    )  # fmt: skip
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        num_labels=labels,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = (BertForSequenceClassification if classifier else BertModel)(config)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """The folder of a BERT without a classifier."""
    return save_bert(tmp_path_factory.mktemp("encoder"), classifier=False)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of one's own."""
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
