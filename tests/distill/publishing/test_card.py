"""The card of a student: its metadata are what a hub reads, its figures those that were measured."""

import pytest
import torch
from huggingface_hub import ModelCard

from distill import DIITO, KD, Labels, fit
from distill.publishing.card import name_of
from interventions import Location
from tests.distill.publishing.test_push import language_model

MAPPING = {Location(layer=1): Location(layer=0)}


def data(rows):
    generator = torch.Generator().manual_seed(rows)
    tokens = torch.randint(20, (rows, 6), generator=generator)
    return {"input_ids": tokens, "labels": tokens}


def test_the_card_of_a_language_model(tmp_path):
    teacher = language_model()
    teacher.config._name_or_path = "org/large"
    result = fit(
        teacher, language_model(1), MAPPING, data(16), objective=[KD(), DIITO()], eval_data=data(8), steps=3,
        batch_size=4, output_dir=tmp_path / "run",
    )  # fmt: skip
    card = ModelCard.load(tmp_path / "run" / "student" / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.base_model == "org/large"
    assert "distillation" in card.data.tags
    measured = {each.metric_type: each.metric_value for each in card.data.eval_results}
    assert measured["iia"] == result.iia
    assert measured["perplexity"] == pytest.approx(result.evaluation.perplexity)
    text = card.text
    assert f"A GPT2LMHeadModel of {sum(p.numel() for p in result.student.parameters()):,} parameters" in text
    assert "distilled from [org/large](https://huggingface.co/org/large)" in text
    assert "3 steps of 4 rows of 16 in all" in text
    assert f"`{result.settings['mapping'][0]}`" in text
    assert str(result.evaluation.interchange.overall.iia) in text
    assert 'GPT2LMHeadModel.from_pretrained("student")' in text
    assert "AutoTokenizer" not in text


def test_the_card_of_a_plain_network_without_a_teacher(tmp_path):
    rows = {"inputs": torch.randn(12, 4), "labels": torch.arange(12) % 2}
    student = torch.nn.Linear(4, 2)
    fit(None, student, {}, rows, objective=Labels(), steps=1, output_dir=tmp_path / "run")
    card = ModelCard.load(tmp_path / "run" / "student" / "README.md")
    assert card.data.library_name == "pytorch"
    assert card.data.base_model is None
    assert card.data.eval_results is None
    assert "trained on labels" in card.text
    assert "Nothing was measured: no held-out data was given." in card.text


@pytest.mark.parametrize(
    ("path", "name"), [("org/large", "org/large"), ("./a/b", ""), ("/home/me", ""), ("a/b/c", ""), ("", ""), (None, "")]
)
def test_only_names_of_a_hub_are_named(path, name):
    model = language_model()
    model.config._name_or_path = path
    assert name_of(model) == name


def test_a_folder_of_this_machine_is_no_name_of_a_hub(tmp_path, monkeypatch):
    (tmp_path / "org" / "large").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    model = language_model()
    model.config._name_or_path = "org/large"
    assert name_of(model) == ""
