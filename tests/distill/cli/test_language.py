"""Language models on the command line: texts and chats, students by importance and on their own text, the report."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.cli.samples import prompt_of
from tests.distill.cli.test_main import distill, quick  # noqa: F401
from tests.distill.conftest import sentences, write_csv
from tests.distill.data.texts.test_language import gpt2, llama
from tests.distill.data.texts.tokenizers import tokenizer
from tests.fake_hub import running

TEXTS = [{"text": text} for text, _ in sentences(40)]
PAIRS = [{"prompt": f"{text}\n", "completion": "Answer: yes."} for text, _ in sentences(40)]
FIT = ["--steps", "3", "--batch-size", "4", "--student-layers", "1", "--eval-pairs", "20", "--lr", "0.01"]


@pytest.fixture(scope="session")
def teachers(tmp_path_factory):
    """Folders of tiny language models with their tokenizer."""
    found = {}
    for name, make in (("gpt2", gpt2), ("llama", llama)):
        torch.manual_seed(0)
        found[name] = tmp_path_factory.mktemp("teachers") / name
        make(3).save_pretrained(found[name])
        tokenizer().save_pretrained(found[name])
    return found


@pytest.fixture
def files(tmp_path):
    """Texts, and prompts with completions, in files."""
    for name, rows in (("texts", TEXTS), ("pairs", PAIRS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def told_by(run):
    return json.loads((run / "result.json").read_text())


@pytest.mark.parametrize(
    ("family", "options", "students"),
    [
        ("gpt2", ["--task", "text", "--data", "texts.jsonl", "--objective", "kd"], ["KD"]),
        pytest.param(
            "llama", ["--task", "chat", "--data", "pairs.jsonl", "--student-by", "search", "--on-policy", "0.5",
                      "--max-new-tokens", "4"],
            ["KD", "KD, equal time", "KD + interchange"], marks=pytest.mark.full,
        ),
        (
            "llama", ["--task", "text", "--data", "texts.jsonl", "--block-size", "32", "--objective", "kd,diito",
                      "--student-by", "importance", "--student-intermediate", "12"], ["KD + interchange"],
        ),
    ],
)  # fmt: skip
def test_a_language_model_is_distilled_measured_and_reported(family, options, students, teachers, files):
    run = files / "run"
    status, out, err = distill("fit", "--teacher", teachers[family], "--output", run, *FIT, *options)
    assert (status, err) == (0, "")
    told = told_by(run)
    assert [model["name"] for model in told["models"]] == ["teacher", "untrained", *students]
    assert all(model["perplexity"] > 1 for model in told["models"])
    assert all(0 <= model["agreement"]["value"] <= 1 for model in told["models"][1:])
    assert all(len(sample["written"]) == 1 + len(students) for sample in told["samples"])
    page = (run / "report.html").read_text()
    assert "<h2>Text</h2>" in page
    assert "perplexity" in out
    folder = next(run.rglob("student"))
    model, read = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.num_hidden_layers == 1
    ids = read("A good film", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] > ids["input_ids"].shape[1]
    assert (folder / "generation_config.json").exists()
    assert (folder / "README.md").exists()


def test_a_run_is_evaluated_and_compared_afterwards(teachers, files):
    run, options = files / "run", ["--task", "text", "--data", "texts.jsonl", "--objective", "kd"]
    status, _out, err = distill("fit", "--teacher", teachers["gpt2"], "--output", run, *FIT, *options)
    assert (status, err) == (0, "")
    status, out, err = distill("evaluate", run, "--pairs", 20)
    assert (status, err) == (0, "")
    assert "perplexity" in out
    status, out, err = distill("rerun", run, "--output", files / "again")
    assert (status, err) == (0, "")
    assert f"KD: the same to the bit as in {run}." in out


def test_a_student_is_evaluated_while_it_is_trained_and_the_best_one_kept(teachers, files):
    run, options = files / "run", ["--task", "text", "--data", "texts.jsonl", "--objective", "kd"]
    watched = ["--eval-every", "1", "--save-best", "best", "--early-stopping", "2", "--keep", "1", "--lr", "5"]
    status, out, err = distill("fit", "--teacher", teachers["gpt2"], "--output", run, *FIT, *options, *watched)
    assert (status, err) == (0, "")
    told = json.loads((run / "kd" / "result.json").read_text())
    history = [json.loads(line) for line in (run / "kd" / "log.jsonl").read_text().splitlines()]
    found = [each["evaluation"]["perplexity"] for each in history if each.get("evaluation")]
    assert len(found) >= 2
    (model,) = [each for each in told_by(run)["models"] if each["name"] == "KD"]
    assert model["perplexity"] == pytest.approx(min(found), rel=1e-3)
    assert told["settings"]
    assert "perplexity" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "text", "--data", "texts.jsonl"], "--task text has no teacher of its own; give a language model"),
        (["--data", "films.csv", "--teacher", "gpt2"], "a language model, which has no classifier; distil it on texts"),
        (["--task", "chat", "--data", "pairs.jsonl", "--teacher", "encoder"], "which writes no text"),
        (["--task", "text", "--data", "texts.jsonl", "--teacher", "gpt2", "--on-policy", "2"], "a number from 0"),
        (["--on-policy", "0.5"], "--on-policy is for language models, and the rows of pvr are of others"),
        (["--task", "text", "--data", "texts.jsonl", "--teacher", "gpt2", "--student-by", "luck"], "--student-by luck"),
        (["--task", "text", "--data", "texts.jsonl", "--teacher", "gpt2", "--early-stopping", "2"], "eval_every=200"),
        (["--task", "text", "--data", "texts.jsonl", "--teacher", "gpt2", "--top-k", "5"], "name a folder for them"),
        (["--task", "text", "--data", "texts.jsonl", "--teacher", "gpt2", "--objective", "augmented"], "augmented"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_before_a_training(options, message, teachers, files, encoder):
    write_csv(files / "films.csv", sentences(20))
    named = [{**teachers, "encoder": encoder}.get(each, each) for each in options]
    status, _out, err = distill("fit", *named, "--output", files / "run")
    assert (status, err.count("\n")) == (2, 1), err
    assert message in err
    assert not (files / "run").exists()


@pytest.mark.parametrize("objective", [["--objective", "kd"], pytest.param([], marks=pytest.mark.full)])
def test_students_are_uploaded(objective, teachers, files):
    options = ["--task", "text", "--data", "texts.jsonl", "--teacher", teachers["gpt2"], *FIT, *objective]
    with running() as hub:
        status, out, err = distill("fit", *options, "--output", files / "run", "--push", "me/small")
        assert (status, err) == (0, "")
        names = ["me/small"] if objective else ["me/small-kd", "me/small-kd-equal-time", "me/small-diito"]
        assert sorted(hub.repos) == sorted(names)
        assert all(f"uploaded: {hub.address}/{name}\n" in out for name in names)
        assert all("model.safetensors" in repo["files"] and "README.md" in repo["files"] for repo in hub.repos.values())
        hub.token = "another"
        status, _out, err = distill("fit", *options, "--output", files / "other", "--push", "me/small")
        assert (status, err.count("\n")) == (2, 1)
        assert "log in first" in err
        assert not (files / "other").exists()


@pytest.mark.parametrize(
    ("labels", "first"), [([-100, -100, 5, 6], 2), ([4, 5, 6, 7], 2), ([-100] * 4, 4), ([-100, 5, 6, 7], 2)]
)
def test_the_prompt_of_a_sample_is_what_is_not_learned(labels, first):
    row = {"input_ids": torch.arange(4), "labels": torch.tensor(labels)}
    assert prompt_of(row).tolist() == list(range(first))
