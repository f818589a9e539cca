"""The audit of compressed models: what was done to them is what it says."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import distill
from distill import Audit, DistillError, audit, from_layers
from distill.auditing.interchanges import KINDS
from interventions import Location
from tests.distill.auditing.changes import with_changed_head, written
from tests.distill.tiny_models import (
    bert,
    bert_with,
    gpt2_lm,
    images,
    llama,
    mlp,
    same,
    spread,
    t5,
    text,
    vectors,
    vit,
    weights,
)

FAST = {"pairs": 12, "examples": 8, "batch_size": 8}
DATA = {bert: text(12), vit: images(12), llama: text(12, labels=False), t5: written(), mlp: vectors(12)}
ALL = [bert, *(pytest.param(each, marks=pytest.mark.full) for each in (vit, llama, t5, mlp))]
QUANTIZED = pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")


def quantized(model):
    return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


def pruned(model, share=0.3):
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            prune.l1_unstructured(module, "weight", share)
            prune.remove(module, "weight")
    return model


def small(make):
    return spread(make() if make in (mlp, t5) else make(3), scale=0.5)


@pytest.mark.parametrize("make", ALL)
def test_a_copy_is_the_same_computation(make):
    model = small(make)
    before, found = weights(model), audit(model, copy.deepcopy(model), DATA[make], **FAST)
    assert found.sentences[0].startswith("Yes, it is the same computation: all ")
    assert found.controls.itself == 0.0
    assert found.controls.untrained.divergence > 0
    for each in found.interchange.values():
        assert each.iia == 1.0
        assert each.overall.kl == 0.0
    assert not found.differences.rows
    assert not found.differences.confusions
    assert same(before, weights(model))


@QUANTIZED
@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("compress", [quantized, pytest.param(pruned, marks=pytest.mark.full)])
def test_quantized_and_pruned_models_differ_all_over(make, compress):
    model = small(make)
    found = audit(model, compress(model), DATA[make], **FAST)
    assert not found.sentences[0].startswith("Yes")
    assert any("spread over" in each or "Most of it" in each for each in found.sentences)
    assert found.behaviour.divergence < found.controls.untrained.divergence
    assert found.controls.itself == 0.0
    if make is not mlp:
        assert {*found.interchange} == {*KINDS}
        assert all(each.overall.count for each in found.interchange.values())
    else:
        assert found.notes == ("no interchange accuracy: no blocks stand for each other.",)


def test_a_change_in_one_head_that_accuracy_misses_is_found():
    """A small change keeps every answer, so that accuracy and agreement are perfect; the head is named."""
    model, changed = spread(bert()), with_changed_head(bert, 1, 1, size=0.02)
    found = audit(model, changed, text(12), **FAST)
    assert found.behaviour.agreement.value == 1.0
    assert found.behaviour.accuracy[0].value == found.behaviour.accuracy[1].value
    assert 0 < found.behaviour.divergence < 1e-3
    said = [each for each in found.sentences if each.startswith("The difference is in attention_heads.1[heads=1]")]
    assert len(said) == 1
    assert "and nowhere else" in said[0]


def test_dropped_layers():
    model = spread(bert(), scale=0.5)
    found = audit(model, from_layers(model, [0, 2, 3]), text(12), **FAST)
    assert found.settings["mapping"] == {"blocks": {0: 0, 2: 1, 3: 2}}
    assert any("in block_output.2 (blocks 1 to 2) and nowhere else" in each for each in found.sentences)
    stated = audit(model, from_layers(model, [0, 2, 3]), text(12), mapping={0: 0, 2: 1, 3: 2}, **FAST)
    assert stated.parts == found.parts


def test_blocks_whose_weights_are_not_alike_are_searched():
    """A student of the first and the third block, all weights of which were changed a little and then rescaled."""
    model = spread(bert(4), scale=0.5)
    student = from_layers(model, [0, 2, 3])
    with torch.no_grad():
        for block in student.bert.encoder.layer:
            block.output.dense.weight.mul_(-1)
    found = audit(model, student, text(12), **FAST)
    assert set(found.settings["mapping"]["blocks"].values()) <= {0, 1, 2}
    assert found.settings["mapping"]["blocks"][3] == 2
    assert found.parts


@pytest.mark.parametrize("merged", [True, False])
def test_adapters_of_peft(merged):
    """A LoRA on the values of one layer is found there, merged or not; one that adds nothing changes no answer."""
    import peft

    model = spread(bert(3), scale=0.5)
    config = peft.LoraConfig(r=2, target_modules=["value"], layers_to_transform=[1], lora_dropout=0.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
    if not merged:
        unchanged = audit(model, adapted, text(12), **FAST)
        assert unchanged.behaviour.divergence == 0.0
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    found = audit(model, adapted.merge_and_unload() if merged else adapted, text(12), **FAST)
    layers = {each.layer for each in found.parts if each.distance > 1e-5}
    assert layers == {1}
    assert {each.head for each in found.parts if each.site == "attention_heads" and each.distance > 0} == {0, 1}


def test_language_models_and_embeddings():
    one, other = spread(gpt2_lm(2), scale=0.5), spread(gpt2_lm(2), seed=5, scale=0.5)
    found = audit(one, other, text(12, labels=False), **FAST)
    assert found.behaviour.perplexity[0] != found.behaviour.perplexity[1]
    assert found.sentences[1].startswith("Its perplexity is ")
    found = audit(one.transformer, other.transformer, text(12, labels=False), **FAST)
    assert found.behaviour.kind == "embeddings"
    assert found.parts
    assert found.interchange == {}
    assert "no interchange accuracy: embeddings" in found.notes[0]


def test_one_row_has_parts_and_no_interchange():
    found = audit(spread(bert(2)), spread(bert(2), seed=5), text(1), **FAST)
    assert found.parts
    assert found.notes == ("no interchange accuracy: one row has no other to be paired with.",)


def test_token_classifiers():
    one, other = (spread(bert_with("TokenClassification", layers=2), seed=seed, scale=0.5) for seed in (0, 5))
    found = audit(one, other, text(12, labels=False), **FAST)
    assert (found.behaviour.kind, found.behaviour.unit, found.behaviour.accuracy) == ("classes", "tokens", None)
    assert found.behaviour.answers == sum(len(row) for row in text(12, labels=False).table["input_ids"])


def test_rows_classes_and_slices_that_differ():
    """Only rows of one kind change: their slice is the worst, they lead the rows, and the classes are counted."""

    class Answers(nn.Module):
        def __init__(self, flipped: bool) -> None:
            super().__init__()
            self.scale, self.flipped = nn.Linear(1, 1, bias=False), flipped
            nn.init.constant_(self.scale.weight, 1.0)

        def forward(self, x: torch.Tensor, odd: torch.Tensor) -> torch.Tensor:
            sign = torch.where(odd > 0, -1.0, 1.0) if self.flipped else torch.ones_like(odd, dtype=torch.float)
            return torch.stack([self.scale(x)[:, 0] * sign, torch.zeros(len(x))], 1)

    x = torch.linspace(1, 3, 8)[:, None]
    data = {"x": x, "odd": torch.arange(8) % 2, "labels": torch.zeros(8, dtype=torch.long)}
    found = audit(Answers(False), Answers(True), data, slices="odd", **FAST)
    assert [(each.value, each.rows, each.agreement.value) for each in found.differences.slices] == [
        ("1", 4, 0.0),
        ("0", 4, 1.0),
    ]
    assert [each.row for each in found.differences.rows] == [7, 5, 3, 1]
    (moved,) = found.differences.confusions
    assert (moved.original, moved.compressed, moved.count, moved.share) == ("0", "1", 4, 0.5)
    assert (found.behaviour.won, found.behaviour.lost, found.behaviour.p_value) == (0, 4, 0.125)
    named = audit(Answers(False), Answers(True), data, slices={"side": list("abababab")}, **FAST)
    assert [each.value for each in named.differences.slices] == ["b", "a"]
    assert named.differences.column == "side"


def test_the_figures_are_plain_data_and_pages(tmp_path):
    folder = tmp_path / "deep" / "page"
    found = audit(spread(bert(2)), spread(bert(2), seed=5), text(12), output_dir=folder, **FAST)
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["sentences"] == list(found.sentences)
    assert told["controls"]["itself"] == 0.0
    assert len(found.to_pandas()) == len(found.parts)
    assert json.loads((folder / "result.json").read_text())["sentences"] == list(found.sentences)
    assert "BertForSequenceClassification against BertFor" in (folder / "report.html").read_text()
    with pytest.raises(DistillError, match="page"):
        audit(mlp(), mlp(), vectors(12), output_dir=folder, **FAST)
    assert isinstance(found, Audit)
    assert distill.audit is audit


def test_the_seed_decides_everything():
    one, other = spread(bert(2), scale=0.5), spread(bert(2), seed=5, scale=0.5)
    first, second, third = (audit(one, other, text(12), seed=seed, **FAST) for seed in (0, 0, 1))
    assert first.to_dict() == second.to_dict()
    assert first.interchange["spans of tokens"] != third.interchange["spans of tokens"]


@pytest.mark.parametrize(
    ("other", "settings", "message"),
    [
        (lambda: bert(4, labels=5), {}, r"3 classes against 5"),
        (lambda: bert(4, vocab_size=50), {}, r"the original knows 40 tokens and the compressed model 50"),
        (vit, {}, r"reads input_ids and the compressed model \(ViTForImageClassification\) none of them"),
        (lambda: bert(4), {"mapping": {0: 9}}, r"block 9 and the compressed model has 4"),
        (lambda: bert(4), {"slices": "topic"}, r"slices='topic' is no column of the data, which has input_ids"),
        (lambda: bert(4), {"slices": [1, 2]}, r"2 values and the data 12 rows"),
        (lambda: bert(4), {"slices": "input_ids"}, r"several values a row"),
        (lambda: bert(4), {"examples": 0}, r"examples=0"),
        (lambda: bert(4), {"pairs": 0}, r"pairs=0"),
        (lambda: bert(4).to("meta"), {}, r"meta"),
        (lambda: bert(4, id2label={0: "a", 1: "b", 2: "c"}), {}, None),
    ],
)
def test_what_cannot_be_audited_is_said_in_one_line(other, settings, message):
    original = spread(bert(4, id2label={0: "c", 1: "b", 2: "a"}) if message is None else bert(4))
    with pytest.raises(DistillError, match=message or r"the classes of the original are c, b, a and those") as error:
        audit(original, other(), text(12), **{**FAST, **settings})
    assert "\n" not in str(error.value)


def test_a_compressed_model_that_reads_fewer_tokens():
    """It cannot be run with the same inputs: one line that names it."""
    short = spread(bert(2, max_position_embeddings=4))
    with pytest.raises(DistillError, match=r"the compressed model \(BertForSequenceClassification\) fails.*4") as error:
        audit(spread(bert(2)), short, text(12, shortest=8), **FAST)
    assert "\n" not in str(error.value)


def test_models_of_other_widths_are_compared_by_answers_and_interchanges():
    found = audit(spread(bert(2)), spread(bert(2, width=8)), text(12), **FAST)
    assert found.parts == ()
    assert "no part was exchanged: block_output.0" in found.notes[0]
    assert found.interchange["spans of tokens"].iia is not None
    with pytest.raises(DistillError, match="no part was exchanged; "):
        found.plot()


def test_answers_choose_a_part_of_the_output():
    one, other = (spread(bert(2).bert, seed=seed, scale=0.5) for seed in (0, 5))
    data = text(12, labels=False)
    found = audit(one, other, data, answers="pooler_output", **FAST)
    assert found.behaviour.kind == "embeddings"
    assert {Location.parse(each.name).site for each in found.parts if each.head is not None} == {"attention_heads"}
