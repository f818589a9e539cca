"""Every rule of positions at every site of several families: a step of DIITO learns, and the same is measured.

Teacher and student differ in their number of layers, and where the family allows it in width and number of heads.
"""

from contextlib import suppress

import pytest
import torch
from torch import nn

from distill import (
    DIITO,
    Answer,
    Crossway,
    DistillError,
    InContext,
    Scattered,
    Span,
    fit,
    interchange_accuracy,
)  # fmt: skip
from distill.errors import NothingToMeasure
from interventions import Location, Noise, Rotation
from tests.distill.every_site import FAMILIES, at, words
from tests.distill.test_every_site import CASES
from tests.distill.tiny_models import (
    CNN,
    LSTM,
    QUIET,
    VOCABULARY,
    bert,
    images,
    mlp,
    spread,
    text,
    vectors,
)  # fmt: skip

RULES = [Span(0.4), Span(0.5, consecutive=False, same=True), Scattered(), Answer(), Answer(0), None]


def t5_of(layers, heads, width):
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=width, d_kv=4, num_layers=layers, num_decoder_layers=layers,
                 num_heads=heads, d_ff=24, decoder_start_token_id=0, pad_token_id=0, eos_token_id=None,
                 dropout_rate=0.0)
    )  # fmt: skip


def vit_of(layers, heads, width):
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(image_size=8, patch_size=4, num_channels=1, hidden_size=width, num_hidden_layers=layers,
                  num_attention_heads=heads, intermediate_size=24, num_labels=3, hidden_dropout_prob=0.0,
                  attention_probs_dropout_prob=0.0)
    )  # fmt: skip


def bert_of(layers, heads, width):
    return bert(layers, width, num_attention_heads=heads)


WIDTHS = {"bert": bert_of, "vit": vit_of, "t5": t5_of}
"""Families whose teacher has 4 heads and the student 3, in another width."""


def couple(family):
    make = WIDTHS.get(family)
    if make is not None:
        return spread(make(3, 4, 16), 0, 0.5), spread(make(2, 3, 12), 1, 0.5)
    return spread(FAMILIES[family].make(3), 0, 0.5), spread(FAMILIES[family].make(2), 1, 0.5)


def check(teacher, student, mapping, rows, rule, **settings):
    """A step of DIITO trains with finite gradients; interchange accuracy is a figure or says that there is none."""
    seen = []

    class Watched(DIITO):
        def compare(self, step, found):
            terms = super().compare(step, found)
            seen.append(terms["kd_cf"])
            return terms

    before = {name: value.clone() for name, value in student.state_dict().items()}
    fit(teacher, student, mapping, rows, objective=Watched(positions=rule, **settings), steps=1, batch_size=6, lr=1e-3,
        console=QUIET, eval_data=None)  # fmt: skip
    assert len(seen) == 2  # the trial and the step
    assert all(bool(term.isfinite()) for term in seen)
    assert all(bool(value.isfinite().all()) for value in student.state_dict().values())
    assert any(not torch.equal(value, before[name]) for name, value in student.state_dict().items())
    if settings.get("op") is not None or isinstance(settings.get("sources"), Crossway):
        return
    with suppress(NothingToMeasure):  # which says so: every interchange there is left out
        found = interchange_accuracy(teacher, student, mapping, rows, pairs=12, positions=rule, **settings)
        assert found.overall.count + found.overall.left_out == 12
        assert 0 <= found.iia <= 1


@pytest.mark.parametrize(("family", "site"), CASES)
def test_every_rule_at_every_site(family, site):
    """Two of the rules a case, in turn: one on rows of one length, one on rows of several."""
    turn = CASES.index((family, site))
    for number, even in ((turn % 6, True), ((turn + 3 + turn // 6) % 5, False)):
        teacher, student = couple(family)
        mapping = {at(family, site, 1 + even): at(family, site, 1 - even)}
        check(teacher, student, mapping, FAMILIES[family].data(6, even=even), RULES[number])


PARTS = [
    ("bert", Location(1, "attention_heads", heads=[0, 3]), Location(0, "attention_heads", heads=[1, 2])),
    ("bert", Location(1, "attention_heads", heads=1), Location(0, "attention_heads")),
    ("bert", Location(1, "attention_pattern", heads=[0, 1]), Location(0, "attention_pattern", heads=2)),
    ("vit", Location(2, "query", dims=range(2)), (Location(0, "query"), Location(1, "key"))),
    ("vit", Location(1, dims=range(8)), Location(0, dims=range(4, 10))),
    ("bert", Location(1, subspace=Rotation(4, 16)), Location(0, "mlp_output")),
    ("vit", Location(module="vit.layers.1"), Location(0)),
    ("bert", Location(module="bert.encoder.layer.1.intermediate"), Location(0, "mlp_activation")),
    ("t5", Location(1, "attention_heads", stack="encoder"), Location(0, "attention_heads", stack="encoder")),
    ("t5", Location(1, "mlp_output", stack="encoder"), Location(1, stack="encoder")),
]


@pytest.mark.parametrize(("family", "above", "below"), PARTS)
def test_every_rule_at_parts_of_places(family, above, below):
    rows = FAMILIES[family].data(6, even=True)
    for rule in (Span(0.4), Answer(), Scattered(1)):
        teacher, student = couple(family)
        check(teacher, student, {above: below}, rows, rule)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_models_without_blocks(rule):
    """Maps of a convolution have positions, the layers of an MLP have none; an LSTM reads its last state."""
    layer, state = Location(module="1"), Location(module="lstm")
    check(spread(mlp(8), 0, 0.5), spread(mlp(5), 1, 0.5), {layer: layer}, vectors(6), rule)
    check(spread(LSTM(), 0, 0.5), spread(LSTM(), 1, 0.5), {state: state}, text(6, 5, 5, labels=False), rule)
    mapping, cnns = {Location(module="conv2"): Location(module="conv1")}, (spread(CNN(), 0), spread(CNN(), 1))
    if rule == Answer():
        with pytest.raises(
            DistillError, match=r"Answer\(\) finds no answering position in this CNN: .*Answer\(token=0\)"
        ):
            check(*cnns, mapping, images(6), rule)
        with pytest.raises(DistillError, match=r"Answer\(\) finds no answering position in this CNN"):
            interchange_accuracy(*cnns, mapping, images(6), positions=rule)
        return
    check(*cnns, mapping, images(6), rule)


OTHERS = [{"sources": InContext(0.4)}, {"sources": Crossway()}, {"op": Noise(0.5)}]


@pytest.mark.parametrize("settings", OTHERS, ids=str)
@pytest.mark.parametrize("make", [bert_of, None])
def test_every_rule_with_every_source(settings, make):
    for rule in RULES[:-1]:
        teacher, student = couple("bert" if make else "llama")
        mapping = {Location(1, "attention_heads"): Location(0, "attention_heads")}
        check(teacher, student, mapping, words(6), rule, **settings)


class Blocks(nn.Module):
    """A model of blocks that have no attention."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)])

    def forward(self, input_ids):
        state = self.embed(input_ids)
        for block in self.blocks:
            state = state + block(state)
        return self.head(state[:, 0])


def test_a_site_that_one_side_lacks_is_named():
    for rule in (Span(), Answer()):
        objective = DIITO(positions=rule, at=["block_output", "attention_heads"])
        with pytest.raises(DistillError, match=r"the student has no attention_heads at block_output.1 ↔ block_output"):
            fit(spread(bert(3)), Blocks(), {Location(1): Location(0)}, text(6), objective=objective, console=QUIET)
