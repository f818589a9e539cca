"""Rows and tasks of language models: labels, cuts, held-out rows, and the doors through which texts and chats come."""

import gzip
import json
import warnings

import pytest
import torch

import distill
from distill import KD, CausalLM, DistillError, Rows, Schedule, fit, steps
from distill.tasks import load
from distill.tasks.loading import held_out, task_of, training_rows
from interventions import run
from tests.distill.data.texts.test_chats import TURNS
from tests.distill.data.texts.tokenizers import CHATML, tokenizer
from tests.distill.tiny_models import QUIET, bert, same, spread, t5, weights

PROMPTS = [
    {"prompt": f"Answer {number}:", "completion": " the cat" * (number % 4 + 1)} for number in range(20)
]  # fmt: skip
TEXTS = [{"text": "the cat likes the bird " * (number % 5 + 1)} for number in range(20)]
CHATS = [{"messages": TURNS[: 2 + 2 * (number % 2)]} for number in range(20)]


def gpt2(layers=2):
    import transformers

    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=400, n_embd=16, n_layer=layers, n_head=2, n_positions=256, bos_token_id=1,
                                eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    )  # fmt: skip


def llama(layers=2):
    import transformers

    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=400, hidden_size=16, num_hidden_layers=layers, num_attention_heads=4,
                                 num_key_value_heads=2, intermediate_size=24, max_position_embeddings=256)
    )  # fmt: skip


def columns_of(rows):
    return {name: [each.tolist() for each in column] for name, column in rows.table.items()}


def all_rows(task):
    """The rows of a task whose training rows are all of them."""
    return columns_of(task.train)


def written(data, path):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in data)
    return path


def test_labels_of_texts_are_their_tokens_and_those_of_prompts_are_ignored():
    reader = tokenizer()
    texts, prompts = (load(name, data=data, tokenizer=reader).train for name, data in
                      (("text", TEXTS), ("chat", PROMPTS)))  # fmt: skip
    for row in texts:
        assert row["labels"].equal(row["input_ids"])
        assert row["labels"][-1] == reader.eos_token_id
    for row in prompts:
        completion = reader.decode(row["labels"][row["labels"] != -100])
        assert set(completion.removesuffix("</s>").split()) == {"the", "cat"}
        assert row["labels"][row["labels"] != -100].equal(row["input_ids"][row["labels"] != -100])
    assert texts.batch([0, 1])["labels"].eq(-100).equal(texts.batch([0, 1])["attention_mask"] == 0)


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("data", [PROMPTS, CHATS], ids=["prompts", "chats"])
def test_kd_is_over_completions_alone_by_hand(make, data):
    """And so is the cross-entropy of the labels."""
    teacher, student, reader = spread(make()), spread(make(1), 1), tokenizer(template=CHATML)
    rows = load("chat", data=data, tokenizer=reader).train
    schedule = Schedule(steps=1, batch_size=len(rows), group_by_length=False)
    (record,) = steps(teacher, student.train(), data=rows, objective=[KD(temperature=2.0), CausalLM()],
                      schedule=schedule)  # fmt: skip
    student, kd, ce, count = spread(make(1), 1), 0.0, 0.0, 0
    for row in rows:
        with torch.no_grad():
            wanted, found = (model(row["input_ids"][None]).logits[0] for model in (teacher, student))
        for place, label in enumerate(row["labels"].tolist()):
            if label == -100:
                continue
            p, q = (logits[place - 1].double().div(2).log_softmax(-1) for logits in (wanted, found))
            kd += float((p.exp() * (p - q)).sum()) * 4
            ce -= float(found[place - 1].double().log_softmax(-1)[label])
            count += 1
    assert record.terms["kd"] == pytest.approx(kd / count, rel=1e-5)
    assert record.terms["clm"] == pytest.approx(ce / count, rel=1e-5)


def test_every_form_of_data_gives_the_same_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    reader = tokenizer(template=CHATML)
    for name, data in (("text", TEXTS), ("chat", PROMPTS), ("chat", CHATS)):
        table = {column: [row[column] for row in data] for column in data[0]}
        forms = [data, tuple(data), table, datasets.Dataset.from_dict(table), written(data, tmp_path / "a.jsonl"),
                 str(written(data, tmp_path / "a.jsonl.gz"))]  # fmt: skip
        wanted = columns_of(load(name, data=data, tokenizer=reader).train)
        for form in forms:
            assert columns_of(load(name, data=form, tokenizer=reader).train) == wanted


def test_a_txt_and_a_csv_file(tmp_path):
    reader = tokenizer()
    (tmp_path / "a.txt").write_text("\n\n".join(row["text"] for row in TEXTS))
    stripped = [{"text": row["text"].strip()} for row in TEXTS]
    wanted = columns_of(load("text", data=stripped, tokenizer=reader).train)
    assert columns_of(load("text", data=tmp_path / "a.txt", tokenizer=reader).train) == wanted
    lines = ["prompt,completion", *(f'{row["prompt"]},"{row["completion"]}"' for row in PROMPTS)]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    wanted = columns_of(load("chat", data=PROMPTS, tokenizer=reader).train)
    assert columns_of(load(data=tmp_path / "a.csv", tokenizer=reader).train) == wanted


@pytest.mark.parametrize("make", [gpt2, llama])
def test_fit_reads_texts_and_chats_for_a_model_that_predicts_the_next_token(make, tmp_path):
    """In memory all of them are trained on; of a file a fifth is held out, as of every file."""
    teacher, reader = spread(make()), tokenizer(template=CHATML)
    for data in (TEXTS, PROMPTS, CHATS):
        students, settings = [spread(make(1), 1) for _ in range(2)], {"tokenizer": reader, "console": QUIET}
        settings |= {"steps": 2, "batch_size": 4, "objective": [KD(), CausalLM()]}
        result = fit(teacher, students[0], {}, data, **settings)
        name = "text" if data is TEXTS else "chat"
        rows = load(name, data=data, tokenizer=reader, eval_data=data[:1], max_length=256).train
        fit(teacher, students[1], {}, rows, **settings)
        assert same(weights(students[0]), weights(students[1]))
        assert result.records[-1].terms.keys() == {"kd", "clm"}
        task = task_of(written(data, tmp_path / "a.jsonl"), teacher, reader)
        assert (len(task.train), len(task.test), task.classes) == (16, 4, ())
        evaluated = fit(teacher, spread(make(1), 1), {}, data, eval_data=tmp_path / "a.jsonl", **settings).evaluation
        assert evaluated.accuracy.count == sum(int((row["labels"][1:] != -100).sum()) for row in rows)


def test_doors_that_have_no_tokenizer_use_that_of_the_model(tmp_path):
    model = gpt2()
    model.save_pretrained(tmp_path / "m")
    tokenizer().save_pretrained(tmp_path / "m")
    loaded = type(model).from_pretrained(tmp_path / "m")
    rows = training_rows(PROMPTS, loaded)
    assert columns_of(rows) == columns_of(held_out(PROMPTS, loaded))
    assert len(rows) == 20
    assert distill.metrics.accuracy(loaded, PROMPTS).count > 20
    with pytest.raises(DistillError, match="task 'chat' is text and needs a tokenizer, and none was given"):
        training_rows(PROMPTS, model)


def test_a_cut_is_said_and_rows_without_a_completion_are_left_out():
    reader = tokenizer()
    rows = [
        *PROMPTS,
        {"prompt": "the cat " * 40, "completion": " yes."},
        {"prompt": "a", "completion": " the cat" * 40},
    ]
    with pytest.warns(
        UserWarning, match="2 of 22 rows of the data have more than 30 .* cut there; 1 of 22 .* left out"
    ):
        task = load("chat", data=rows, tokenizer=reader, max_length=30)
    assert len(task.train) + len(task.test) == 21
    assert max(len(row["input_ids"]) for part in (task.train, task.test) for row in part) == 30
    with pytest.raises(DistillError, match=r"none of 3 rows of the data has a token to learn among its first 4; give"):
        load("chat", data=[{"prompt": "the cat " * 9, "completion": "no"}] * 3, tokenizer=reader, max_length=4)
    assert all(int((row["labels"][1:] != -100).sum()) for row in task.train)


def test_a_row_with_nothing_to_learn_is_left_out_with_a_line():
    silent = [{"messages": TURNS[:1]}, *CHATS]
    with pytest.warns(UserWarning, match="1 of 21 rows of the data have no token to learn"):
        task = load(data=silent, tokenizer=tokenizer(template=CHATML))
    assert len(task.train) + len(task.test) == 20


def test_columns_that_are_not_read_are_named():
    rows = [{**row, "id": number, "source": "a"} for number, row in enumerate(TEXTS)]
    with pytest.warns(UserWarning, match="of the data only 'text' is read, and 'id', 'source' not"):
        load("text", data=rows, tokenizer=tokenizer())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load("text", data=TEXTS, tokenizer=tokenizer())
        load("chat", data=[{**row, "tools": None} for row in CHATS], tokenizer=tokenizer(template=CHATML))


def test_rows_that_share_something():
    rows = [{**row, "speaker": number // 2} for number, row in enumerate(TEXTS)]
    with pytest.warns(UserWarning, match="'speaker' not"):
        task = load("text", data=rows, tokenizer=tokenizer(), clusters="speaker")
    shared = torch.cat([task.train.clusters, task.test.clusters])[:, 0]
    assert shared.bincount().tolist() == [2] * 10
    with pytest.raises(DistillError, match="clusters='speaker' names what documents share, and a packed row"):
        load("text", data=rows, tokenizer=tokenizer(), clusters="speaker", block_size=32)


def test_a_task_shows_its_rows_and_keeps_a_share():
    task = load("chat", data=PROMPTS, tokenizer=tokenizer(), fraction=0.5, seed=3)
    assert len(task.train) == 8
    assert task.example(0).startswith("Answer")
    assert task.tokenizer.eos_token == "</s>"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load("chat", data=TEXTS, tokenizer=tokenizer()), "has the columns 'text', and task 'chat' needs"),
        (lambda: load("text", data=PROMPTS, tokenizer=tokenizer()), "'prompt', 'completion', and task 'text' needs"),
        (lambda: load("text", data={"x": [1.0]}, tokenizer=tokenizer()), "has none of these, and task 'text' needs"),
        (lambda: load("text", data="missing.txt", tokenizer=tokenizer()), "missing.txt does not exist"),
        (lambda: load("text", data=TEXTS), "needs a tokenizer, and none was given"),
        (lambda: load("text", data=TEXTS, tokenizer=tokenizer(), label="a"), "task 'text' takes no label"),
        (lambda: load("text", data=TEXTS, tokenizer=tokenizer(), max_length=1), "max_length=1 leaves nothing to pred"),
        (lambda: load("text", data=TEXTS, tokenizer=tokenizer(), block_size=0), "block_size=0 leaves nothing to pred"),
        (lambda: load("text", data=TEXTS, tokenizer=tokenizer(), packing="no"), "packing='no' is none of 'best-fit'"),
        (lambda: load("pvr", packing="best-fit"), "task 'pvr' takes no packing"),
        (lambda: load("text", data=[*TEXTS, {"text": None}], tokenizer=tokenizer()), "row 20 of the data has no"),
        (lambda: fit(bert(1), bert(1), {}, PROMPTS, tokenizer=tokenizer()), "BertForSequenceClassification does"),
        (lambda: fit(t5(1), t5(1), {}, PROMPTS, tokenizer=tokenizer()), "T5ForConditionalGeneration does not predict"),
    ],
)  # fmt: skip
def test_what_does_not_fit_says_why_in_one_line(call, message):
    with pytest.raises(DistillError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_file_that_is_trained_on_is_not_tested_on(tmp_path):
    path = written(PROMPTS, tmp_path / "a.jsonl")
    with pytest.raises(DistillError, match="the file that is trained on"):
        load("chat", data=path, eval_data=path, tokenizer=tokenizer())


def test_texts_with_labels_stay_those_of_classification(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "\n".join(f"the cat {i},{'ab'[i % 2]}" for i in range(20)))
    assert task_of(path, gpt2(), tokenizer()).classes == ("a", "b")
    assert load(data=path, tokenizer=tokenizer()).classes == ("a", "b")


def test_special_tokens_are_no_place_for_interventions():
    rows = load("chat", data=CHATS, tokenizer=tokenizer(template=CHATML)).train
    for row in rows:
        assert row["special_tokens_mask"].bool().equal(row["input_ids"] < 6)
    batch = Rows.of(rows).batch([0, 1])
    assert batch["special_tokens_mask"][batch["attention_mask"] == 0].all()
    assert run(spread(gpt2()), {"input_ids": batch["input_ids"]}).logits.shape[-1] == 400
