"""`distill audit` on saved models: what it prints, what it writes, what it refuses."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.distill.cli.test_main import distill
from tests.distill.conftest import save_bert, sentences

FEW = ("--pairs", 8, "--examples", 8)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """An original, a copy with one changed head, and a file of sentences with a column of their lengths."""
    monkeypatch.chdir(tmp_path)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    save_bert(tmp_path / "original", classifier=True)
    changed = save_bert(tmp_path / "changed", classifier=True)
    model = AutoModelForSequenceClassification.from_pretrained(changed)
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.self.value.weight[8:] += 1.0
    model.save_pretrained(changed)
    rows = [f"{text},{label},{'long' if len(text) > 25 else 'short'}" for text, label in sentences(30)]
    (tmp_path / "films.csv").write_text("\n".join(["text,label,length", *rows]) + "\n")
    return "original", "changed", "--data", "films.csv"


def test_a_changed_head_is_named_on_the_page_and_in_the_terminal(folders, tmp_path):
    status, out, err = distill("audit", *folders, "--slice", "length", "--output", "page", *FEW)
    assert status == 0, err
    said = " ".join(out.split())
    assert "The difference is in attention_heads.1[heads=1] and nowhere else" in said
    assert "report: page/report.html" in said
    told = json.loads((tmp_path / "page" / "result.json").read_text())
    assert told["title"] == "changed against original"
    assert {each["value"] for each in told["differences"]["slices"]} == {"long", "short"}
    assert told["behaviour"]["accuracy"][0]["count"] == 30  # all rows of the file
    page = (tmp_path / "page" / "report.html").read_text()
    assert told["differences"]["rows"][0]["text"] in page
    assert "Slices by length" in page


def test_the_folder_is_new_and_the_first_that_is_free(folders, tmp_path):
    for number in (1, 2):
        assert distill("audit", "original", "original", *folders[2:], *FEW)[0] == 0
        assert (tmp_path / "runs" / f"audit-{number}" / "report.html").exists()
    status, _, err = distill("audit", *folders, "--output", "runs/audit-1", *FEW)
    assert status == 2
    assert "runs/audit-1" in err


def test_adapters_are_read_with_the_model_that_they_belong_to(folders, tmp_path):
    import peft

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "original")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["value"], layers_to_transform=[2]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    adapted.save_pretrained(tmp_path / "adapters")
    status, _, err = distill("audit", "original", "adapters", *folders[2:], "--output", "page", *FEW)
    assert status == 0, err
    told = json.loads((tmp_path / "page" / "result.json").read_text())
    assert {each["layer"] for each in told["parts"] if each["distance"] > 1e-5} == {2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("original", "nowhere", "--data", "films.csv"), "model 'nowhere' cannot be loaded"),
        (("original", "changed"), "data"),
        (("original", "changed", "--data", "none.csv"), "none.csv"),
        (
            ("original", "changed", "--data", "films.csv", "--slice", "topic"),
            "--slice 'topic' is no column of films.csv",
        ),
        (("original", "changed", "--data", "films.csv", "--mapping", "0-0"), "--mapping '0-0' is not of blocks"),
        (("original", "changed", "--data", "films.csv", "--mapping", "0~0 0~1"), "a block of the original twice"),
        (("original", "changed", "--data", "films.csv", "--mapping", "0~7"), "block 7 and the compressed model has 3"),
        (("original", "changed", "--data", "films.csv", "--text", "sentence"), "'sentence'"),
        (("original", "changed", "--data", "films.csv", "--pairs", "0"), "pairs=0"),
    ],
)
def test_what_is_wrong_is_one_line_and_leaves_nothing(folders, tmp_path, arguments, message):
    before = sorted(tmp_path.iterdir())
    status, _, err = distill("audit", *arguments)
    assert status == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before
