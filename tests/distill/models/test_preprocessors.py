"""A saved student reloads with what reads its inputs, and answers as it did."""

import copy
import json

import numpy as np
import pytest
import torch
from transformers import pipeline

import distill
from distill.models.preprocessors import preprocessors_of, tokenizer_among
from tests.distill.conftest import save_bert, sentences, write_csv
from tests.distill.tiny_models import QUIET, spread, text

SETTINGS = dict(objective=distill.KD(), steps=1, batch_size=4, console=QUIET)
TEXTS = ["the cat sees a good film", "a bird likes the very bad plot", "dog"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "</s>", *"the cat sees a good film bird likes very bad".split()]


PETS = ("cat", "dog", "bird")


def tokens(words: int) -> distill.Rows:
    """Text whose ids are below the number of words, with labels 0 and 1."""
    table = text(8, longest=5).table
    return distill.Rows({**table, "input_ids": [row % words for row in table["input_ids"]],
                         "labels": table["labels"] % 2})  # fmt: skip


def tokenizer(**special):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="</s>", **special)


def classifier(folder):
    from transformers import BertForSequenceClassification

    save_bert(folder, classifier=True)
    teacher = BertForSequenceClassification.from_pretrained(folder)
    teacher.config.id2label = {0: "bad", 1: "good"}
    teacher.config.label2id = {"bad": 0, "good": 1}
    return teacher, tokens(teacher.config.vocab_size), "text-classification", TEXTS


def causal(folder):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=24, eos_token_id=5)
    ).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    ids = torch.randint(6, len(WORDS), (8, 6), generator=torch.Generator().manual_seed(0))
    return GPT2LMHeadModel.from_pretrained(folder), {"input_ids": ids}, "text-generation", TEXTS


def pictures(folder):
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    ViTForImageClassification(
        ViTConfig(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                  intermediate_size=24, id2label=dict(enumerate(PETS)), label2id={n: i for i, n in enumerate(PETS)})
    ).save_pretrained(folder)  # fmt: skip
    ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.1] * 3).save_pretrained(folder)
    asked = [Image.fromarray(np.full((12, 12, 3), value, dtype=np.uint8)) for value in (20, 200)]
    rows = {"pixel_values": torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    return ViTForImageClassification.from_pretrained(folder), rows, "image-classification", asked


def sounds(folder):
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForSequenceClassification

    Wav2Vec2ForSequenceClassification(
        Wav2Vec2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
                       conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=4,
                       num_conv_pos_embedding_groups=2, classifier_proj_size=8, num_labels=3)
    ).save_pretrained(folder)  # fmt: skip
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder)
    rows = {"input_values": torch.randn(8, 400, generator=torch.Generator().manual_seed(0))}
    asked = [np.sin(np.arange(800) / k).astype(np.float32) for k in (3, 11)]
    return Wav2Vec2ForSequenceClassification.from_pretrained(folder), rows, "audio-classification", asked


def answers(model, kind, asked, **parts):
    kept = dict(max_new_tokens=4, do_sample=False) if kind == "text-generation" else {}
    return rounded(pipeline(kind, model=model, **parts)(asked, **kept))


def rounded(answer):
    """Answers whose scores are the same up to the order of summation."""
    if isinstance(answer, list):
        return [rounded(each) for each in answer]
    if isinstance(answer, dict):
        return {name: rounded(each) for name, each in answer.items()}
    return round(answer, 4) if isinstance(answer, float) else answer


@pytest.mark.parametrize("make", [classifier, causal, pictures, sounds])
def test_the_saved_student_answers_as_it_did(make, tmp_path):
    teacher, data, kind, asked = make(tmp_path / "t")
    student = spread(copy.deepcopy(teacher) if make is sounds else distill.from_layers(teacher, 1), 1, scale=1.0)
    distill.fit(teacher.eval(), student, {}, data, output_dir=tmp_path / "run", **SETTINGS)
    (own,) = preprocessors_of(teacher)
    name = next(n for n, words in (("tokenizer", "okenizer"), ("image_processor", "ImageProc"),
                                   ("feature_extractor", "FeatureExtr")) if words in type(own).__name__)  # fmt: skip
    wanted = answers(student.eval(), kind, asked, **{name: own})
    assert answers(str(tmp_path / "run/student"), kind, asked) == wanted
    told = json.loads((tmp_path / "run/student/config.json").read_text())
    assert (
        told.get("id2label", {}) == {str(i): name for i, name in teacher.config.id2label.items()} or kind[:4] == "text"
    )


def test_an_encoder_decoder_keeps_its_tokenizer(tmp_path):
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    T5ForConditionalGeneration(
        T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, num_layers=2, num_heads=2, d_ff=24,
                 decoder_start_token_id=0, pad_token_id=0, eos_token_id=5)
    ).save_pretrained(tmp_path / "t")  # fmt: skip
    tokenizer(pad_token="[PAD]").save_pretrained(tmp_path / "t")
    teacher = T5ForConditionalGeneration.from_pretrained(tmp_path / "t").eval()
    rows = tokens(len(WORDS)).table
    data = distill.Rows({**{name: rows[name] for name in ("input_ids", "attention_mask")}, "labels": rows["input_ids"]})
    student = distill.from_layers(teacher, 1)
    distill.fit(teacher, student, {}, data, output_dir=tmp_path / "run", **SETTINGS)
    again = T5ForConditionalGeneration.from_pretrained(tmp_path / "run/student").eval()
    own, theirs = (AutoTokenizer.from_pretrained(tmp_path / part) for part in ("run/student", "t"))
    asked = [read(TEXTS, return_tensors="pt", padding=True) for read in (own, theirs)]
    assert torch.equal(asked[0]["input_ids"], asked[1]["input_ids"])
    given = {name: asked[0][name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(again.generate(**given, max_new_tokens=4), student.eval().generate(**given, max_new_tokens=4))


def test_what_is_given_comes_before_what_lies_by_the_teacher(tmp_path):
    from transformers import AutoTokenizer, BertForSequenceClassification

    save_bert(tmp_path / "t", classifier=True)
    teacher = BertForSequenceClassification.from_pretrained(tmp_path / "t").eval()
    teacher.config.id2label, teacher.config.label2id = {0: "negative", 1: "positive"}, {"negative": 0, "positive": 1}
    other = tokenizer(pad_token="[PAD]")
    student = distill.from_layers(teacher, 1)
    data = write_csv(tmp_path / "x.csv", sentences(20))
    distill.fit(teacher, student, {}, data, tokenizer=other, output_dir=tmp_path / "run", **SETTINGS)
    assert AutoTokenizer.from_pretrained(tmp_path / "run/student").get_vocab() == other.get_vocab()


def test_chains_mutual_learning_and_new_students_keep_tokenizer_and_names(tmp_path):
    """An assistant that was built here has no folder of its own to look in, and only numbers for classes."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    save_bert(tmp_path / "t", classifier=True)
    teacher = BertForSequenceClassification.from_pretrained(tmp_path / "t").eval()
    teacher.config.id2label, teacher.config.label2id = {0: "no", 1: "yes"}, {"no": 0, "yes": 1}
    sizes = {name: getattr(teacher.config, name) for name in ("vocab_size", "hidden_size", "num_attention_heads",
             "intermediate_size", "max_position_embeddings")}  # fmt: skip
    assistant = BertForSequenceClassification(BertConfig(num_hidden_layers=2, **sizes))
    student = BertForSequenceClassification(BertConfig(num_hidden_layers=1, **sizes))
    rows = tokens(sizes["vocab_size"])
    distill.chain([teacher, assistant, student], data=rows, mapping={}, output_dir=tmp_path / "chain", **SETTINGS)
    schedule = distill.Schedule(steps=1, batch_size=4)
    both = [teacher, copy.deepcopy(assistant)]
    distill.mutual(both, rows, output_dir=tmp_path / "both", schedule=schedule, console=QUIET)
    wanted = AutoTokenizer.from_pretrained(tmp_path / "t").get_vocab()
    for place in ("chain/1", "chain/2", "both/0", "both/1"):
        assert AutoTokenizer.from_pretrained(tmp_path / place / "student").get_vocab() == wanted
    assert json.loads((tmp_path / "chain/2/student/config.json").read_text())["id2label"] == {"0": "no", "1": "yes"}


def test_a_served_teacher_reads_texts_by_the_tokenizer_that_it_was_given(tmp_path):
    teacher, *_ = causal(tmp_path / "model")
    teacher.config._name_or_path = ""
    reads = tokenizer(pad_token="[PAD]")
    served = distill.Served(teacher, tokenizer=reads)
    assert tokenizer_among(preprocessors_of(served)) is reads
    distill.fit(served, spread(copy.deepcopy(teacher), 1), {}, TEXTS, **{**SETTINGS, "objective": distill.KD(1.0)})
    with pytest.raises(distill.DistillError, match="needs a tokenizer, and none was given or is saved with a teacher"):
        distill.fit(distill.Served(teacher), spread(copy.deepcopy(teacher), 1), {}, TEXTS, **SETTINGS)


def test_a_tokenizer_that_was_made_up_does_not_count(tmp_path):
    """transformers makes an empty one for a folder without any file of words."""
    from transformers import BertConfig, BertForSequenceClassification

    BertForSequenceClassification(
        BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    ).save_pretrained(tmp_path / "t")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "t")
    assert preprocessors_of(model) == ()
    assert tokenizer_among(preprocessors_of(model)) is None
    assert distill.tasks.named.tokenizer_of(model) is None
