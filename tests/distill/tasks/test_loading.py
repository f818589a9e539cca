import json

import pytest
import torch
import transformers

from distill import DistillError, Rows, tasks
from distill.tasks.loading import RANDOM_ROWS, held_out, random_rows, task_of, training_rows
from distill.tasks.named import length_for, tokenizer_of
from tests.distill.data.texts.tokenizers import tokenizer
from tests.distill.tiny_models import VOCABULARY, bert, gpt2_lm, images, mlp, text, vectors, vit


def test_rows_in_any_form_are_themselves():
    rows = text()
    assert training_rows(rows, bert(2)) is held_out(rows, bert(2)) is rows
    assert training_rows({"inputs": torch.zeros(3, 6)}, mlp()).columns == ("inputs",)
    assert task_of(rows, bert(2)) is None


def test_a_task_gives_its_training_rows_and_is_measured_on_its_test_rows():
    task = tasks.Task("own", text(4), text(3, seed=1), ("a", "b", "c"))
    assert task_of(task, bert(2)) is task
    assert training_rows(task, bert(2)) is task.train
    assert held_out(task, bert(2)) is task.test


def test_a_name_loads_the_task():
    task = task_of("pvr", vit())
    assert task.name == "pvr"
    assert torch.equal(held_out("pvr", vit()).table["labels"], task.test.table["labels"])
    with pytest.raises(DistillError, match="there is no task 'pvrr'; did you mean 'pvr'"):
        training_rows("pvrr", vit())


def test_a_file_needs_the_tokenizer_of_the_model(tmp_path):
    (tmp_path / "my.csv").write_text("text,label\na,0\nb,1\n")
    for path in (tmp_path / "my.csv", str(tmp_path / "my.csv")):
        with pytest.raises(DistillError, match="'my' is text and needs a tokenizer, and none was given"):
            training_rows(path, bert(2))
    assert tokenizer_of(bert(2)) is None
    assert tokenizer_of(mlp()) is None


def test_no_data_is_an_error_that_names_the_ways_out():
    with pytest.raises(DistillError, match=r"no data; pass data='pvr' .*data='random' for a data-free run"):
        training_rows(None, bert(2))


@pytest.mark.parametrize("make", [bert, gpt2_lm])
def test_random_tokens_are_those_of_the_model_and_as_long_as_it_reads(make):
    rows = training_rows("random", make(2), seed=0)
    assert len(rows) == RANDOM_ROWS
    lengths = torch.tensor([len(row) for row in rows.table["input_ids"]])
    assert (int(lengths.min()), int(lengths.max())) == (2, 24)  # 24 positions
    ids = torch.cat(list(rows.table["input_ids"]))
    assert (int(ids.min()), int(ids.max())) == (0, VOCABULARY - 1)
    assert rows.columns == ("input_ids", "attention_mask")


def test_random_pictures_have_the_shape_of_the_model():
    pixels = training_rows("random", vit()).table["pixel_values"]
    assert pixels.shape == (RANDOM_ROWS, 1, 8, 8)
    assert abs(pixels.mean()) < 0.01
    assert abs(pixels.std() - 1) < 0.01


def test_random_rows_are_decided_by_the_seed_and_held_out_ones_are_others():
    model = vit()
    before = torch.random.get_rng_state()
    pixels = [random_rows(model, 4, seed).table["pixel_values"] for seed in (0, 0, 1)]
    assert torch.equal(pixels[0], pixels[1])
    assert not torch.equal(pixels[0], pixels[2])
    for seed in (0, 1):
        trained = training_rows("random", model, seed).table["pixel_values"]
        assert not torch.equal(trained, held_out("random", model).table["pixel_values"])
    assert torch.equal(before, torch.random.get_rng_state())


def test_random_rows_of_an_unknown_kind():
    with pytest.raises(DistillError, match=r"does not know the inputs of Sequential; .*data=\{'inputs': torch.randn"):
        training_rows("random", mlp())


def test_random_rows_of_an_encoder_decoder_reach_both_sides():
    from distill.models.inputs import inputs_of
    from tests.distill.tiny_models import t5

    model = t5(2).eval()
    batch = random_rows(model, 3, 0).batch(range(3))
    assert model(**inputs_of(model, batch)).logits.shape[0] == 3


def test_a_list_of_pairs():
    rows = training_rows([(torch.zeros(6), 1), (torch.ones(6), 0)], mlp())
    assert rows.columns == ("inputs", "labels")
    assert isinstance(rows, Rows)
    assert len(images(3)) == len(vectors(3)) == 3


@pytest.mark.parametrize(
    ("kind", "settings", "most"),
    [
        ("Bert", {}, 24),
        ("Roberta", {"pad_token_id": 1}, 22),  # numbers tokens from the one after its padding
        ("GPT2", {"n_positions": 24}, 24),
        ("T5", {}, None),
        ("Llama", {}, None),
    ],
)
def test_texts_are_cut_to_the_positions_that_a_model_has(kind, settings, most):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=24, num_labels=2, **settings,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    assert length_for(model) == (most or 128)
    assert length_for(model, 8) == 8
    assert length_for(model, 1000) == (most or 1000)


@pytest.mark.parametrize(
    ("named", "rows"), [("folder", (16, 4)), ("splits", (20, 4)), ("part-*.jsonl", (32, 8)), ("part-0.jsonl", (16, 4))]
)
def test_texts_of_language_models_by_folder_and_pattern(named, rows, tmp_path):
    from datasets import Dataset, DatasetDict

    texts = [{"text": "the cat likes the bird " * (number % 3 + 1)} for number in range(20)]
    Dataset.from_list(texts).save_to_disk(tmp_path / "folder")
    DatasetDict(train=Dataset.from_list(texts), validation=Dataset.from_list(texts[:4])).save_to_disk(
        tmp_path / "splits"
    )
    for number in range(2):
        (tmp_path / f"part-{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    task = tasks.load("text", data=str(tmp_path / named), tokenizer=tokenizer())
    assert (len(task.train), len(task.test)) == rows
    assert task.train.table["labels"][0].tolist() == task.train.table["input_ids"][0].tolist()
