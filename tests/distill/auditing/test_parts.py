"""Parts exchanged one by one: a change is found where it is and nowhere else, and its size is that of a transplant."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import kl_div

from distill import DistillError, from_layers
from distill.auditing.answers import Models
from distill.auditing.layers import layers_of
from distill.auditing.parts import measure_parts
from distill.auditing.reading import reading_of
from distill.models.inputs import inputs_of
from tests.distill.auditing.changes import HEADS, changed, noisy, with_changed_head, written
from tests.distill.tiny_models import CNN, LSTM, bert, gpt2_lm, images, llama, mlp, spread, t5, text, vectors, vit

DATA = {
    bert: text(8),
    vit: images(12),
    gpt2_lm: text(12, labels=False),
    llama: text(12, labels=False),
    t5: written(),
    mlp: vectors(12),
    CNN: images(12),
    LSTM: text(12, shortest=6, longest=6),
}
FULL = pytest.mark.full


def parts_of(original, compressed, data, batch_size=5, mapping=None, **settings):
    reading = reading_of(original, compressed, data, chosen=False)
    models = Models(original, compressed, reading, batch_size, layers_of(original, compressed, mapping))
    return measure_parts(models, data, **settings)


@pytest.mark.parametrize("make", [bert, *(pytest.param(each, marks=FULL) for each in DATA if each is not bert)])
def test_a_model_and_its_copy_compute_the_same_in_every_part(make):
    model = spread(make())
    parts, depths = parts_of(model, copy.deepcopy(model), DATA[make])
    assert len(parts) > 2
    assert {(each.divergence, each.changed, each.distance) for each in parts} == {(0.0, 0.0, 0.0)}
    assert {each.divergence for each in depths} <= {0.0}


@pytest.mark.parametrize("make", [bert, *(pytest.param(each, marks=FULL) for each in HEADS if each is not bert)])
@pytest.mark.parametrize(("layer", "head"), [(1, 1), pytest.param(0, 0, marks=FULL), pytest.param(3, 1, marks=FULL)])
def test_a_changed_head_is_found_at_its_layer_and_nowhere_else(make, layer, head):
    """The head and its block differ; every other part computes the same, although later states differ."""
    parts, depths = parts_of(spread(make()), with_changed_head(make, layer, head), DATA[make])
    stack = "decoder" if make is t5 else None
    found = {(each.site, each.stack, each.layer, each.head) for each in parts if each.distance > 0}
    assert found == {("attention_heads", stack, layer, head), ("block_output", stack, layer, None)}
    assert all(each.divergence > 0 for each in parts if each.distance > 0)
    after = {each.layer: each.divergence for each in depths if each.stack == stack and each.layer is not None}
    assert [each for each in after if after[each] > 0] == list(range(layer, 4))


PLACES = {
    "bert.embeddings.word_embeddings.weight": {"embedding"},
    "bert.encoder.layer.1.attention.self.key.weight": {*(f"attention_heads.1[heads={h}]" for h in range(2)),
                                                        "block_output.1"},
    "bert.encoder.layer.1.attention.output.dense.weight": {"attention_output.1", "block_output.1"},
    "bert.encoder.layer.1.attention.output.LayerNorm.weight": {"mlp_output.1", "rest of block_output.1",
                                                               "block_output.1"},
    "bert.encoder.layer.2.intermediate.dense.weight": {"mlp_output.2", "block_output.2"},
    "bert.encoder.layer.2.output.LayerNorm.weight": {"rest of block_output.2", "block_output.2"},
    "bert.pooler.dense.weight": {"head"},
    "classifier.weight": {"head"},
}  # fmt: skip


@pytest.mark.parametrize("path", PLACES)
def test_any_changed_weight_is_found_in_its_part(path):
    model = spread(bert())
    parts, _ = parts_of(model, changed(model, path, noisy), DATA[bert])
    assert {each.name for each in parts if each.distance > 0} == PLACES[path]


def mean_kl(one, other, data):
    columns = data.batch(range(len(data)))
    with torch.no_grad():
        p, q = (each(**inputs_of(each, columns)).logits.double().log_softmax(-1) for each in (one, other))
    return float(kl_div(q, p, log_target=True, reduction="none").sum(-1).mean())


def transplanted(model, other, path):
    """The model with a module of the other."""
    copied = copy.deepcopy(model)
    parent, _, name = path.rpartition(".")
    setattr(copied.get_submodule(parent), name, copy.deepcopy(other.get_submodule(path)))
    return copied


def test_the_divergence_of_a_part_is_that_of_a_transplant():
    """Against copies of the original in which the modules themselves were replaced by those of another model."""
    one, other, data = spread(bert()), spread(bert(), seed=9), DATA[bert]
    found = {each.name: each.divergence for each in parts_of(one, other, data)[0]}
    for name, path in {
        "block_output.2": "bert.encoder.layer.2",
        "attention_output.1": "bert.encoder.layer.1.attention.output.dense",
        "embedding": "bert.embeddings",
    }.items():
        assert found[name] == pytest.approx(mean_kl(one, transplanted(one, other, path), data), rel=1e-4)
    head = copy.deepcopy(one)
    with torch.no_grad():
        for name in ("query", "key", "value"):
            for own, new in zip(
                *(m.bert.encoder.layer[1].attention.self.get_submodule(name).parameters() for m in (head, other)),
                strict=True,
            ):
                own[8:] = new[8:]
    assert found["attention_heads.1[heads=1]"] == pytest.approx(mean_kl(one, head, data), rel=1e-4)
    with torch.no_grad():
        columns = data.batch(range(len(data)))
        states = one.bert(**inputs_of(one, columns))[0]
        logits = other.classifier(other.bert.pooler(states)).double().log_softmax(-1)
        p = one(**inputs_of(one, columns)).logits.double().log_softmax(-1)
    expected = float(kl_div(logits, p, log_target=True, reduction="none").sum(-1).mean())
    assert found["head"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("size", [pytest.param(1, marks=FULL), 12])
def test_the_batch_size_changes_nothing(size):
    one, other = spread(bert(2)), spread(bert(2), seed=9)
    expected, parts = (parts_of(one, other, DATA[bert], n)[0] for n in (5, size))
    assert [each.name for each in parts] == [each.name for each in expected]
    assert [e.divergence for e in parts] == pytest.approx([e.divergence for e in expected], rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("make", [bert, pytest.param(vit, marks=FULL), pytest.param(llama, marks=FULL)])
def test_dropped_blocks_are_found_and_the_kept_ones_compute_the_same(make):
    model = spread(make())
    parts, _ = parts_of(model, from_layers(model, [0, 1, 3]), DATA[make])
    assert {each.name for each in parts if each.distance > 0} == {"block_output.3 (blocks 2 to 3)"}


def test_the_last_depth_is_that_of_the_answers():
    one, other = spread(bert(2)), spread(bert(2), seed=9)
    _, depths = parts_of(one, other, DATA[bert])
    assert [each.layer for each in depths] == [0, 1, None]
    assert depths[-1].divergence == pytest.approx(mean_kl(one, other, DATA[bert]), rel=1e-4)


def test_dropped_blocks_at_the_end():
    model = spread(bert())
    parts, _ = parts_of(model, from_layers(model, [0, 1]), DATA[bert])
    found = [each for each in parts if each.distance > 0]
    assert [each.site for each in found] == ["dropped blocks"]
    cut = from_layers(model, [0, 1])
    assert found[0].divergence == pytest.approx(mean_kl(model, cut, DATA[bert]), rel=1e-4)


@pytest.mark.parametrize("make", [mlp, pytest.param(CNN, marks=FULL), pytest.param(LSTM, marks=FULL)])
def test_models_without_blocks_are_exchanged_module_by_module(make):
    model = spread(make())
    path = {mlp: "2.weight", CNN: "conv2.weight", LSTM: "lstm.weight_ih_l0"}[make]
    parts, depths = parts_of(model, changed(model, path, noisy), DATA[make])
    assert [each.name for each in parts if each.distance > 0] == [f"module:{path.rpartition('.')[0]}"]
    (answers,) = depths
    assert (answers.layer, answers.divergence > 0) == (None, True)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize("make", [bert, *(pytest.param(each, marks=FULL) for each in (llama, t5, vit, mlp))])
def test_of_a_quantized_model_every_part_with_a_linear_layer_differs_a_little(make):
    model = spread(make())
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    parts, _ = parts_of(model, quantized, DATA[make])
    linear = [each for each in parts if each.site in ("attention_heads", "attention_output", "mlp_output", "module")]
    assert linear
    assert all(0 < each.distance < 0.1 for each in linear)
    assert all(each.distance == 0 for each in parts if each.site == "embedding")


def test_models_of_other_widths_have_no_part_in_common():
    with pytest.raises(DistillError, match=r"block_output.0 of the original has .*16.*the compressed model .*8"):
        parts_of(spread(bert()), spread(bert(width=8)), DATA[bert])
