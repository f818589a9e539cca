"""The answers of two models, against the measurements of one model and against values computed by hand."""

import copy
from math import log

import pytest
import torch
from torch import nn
from torch.nn.functional import kl_div

import distill
from distill import DistillError, Rows, metrics
from distill.auditing.answers import Compared, Models, compare
from distill.auditing.behaviour import behaviour_of, shared_neighbours
from distill.auditing.reading import Reading, reading_of
from distill.models.inputs import inputs_of
from tests.distill.auditing.changes import written
from tests.distill.tiny_models import (
    CLASSES,
    VOCABULARY,
    bert,
    bert_with,
    gpt2_lm,
    images,
    llama,
    spread,
    t5,
    text,
    vit,
)


def compared(one, other, data, batch_size=5):
    reading = reading_of(one, other, data, chosen=False)
    return compare(Models(one, other, reading, batch_size), data)


def token_labels(rows=12):
    data = text(rows, labels=False)
    draw = torch.Generator().manual_seed(4)
    labels = [torch.randint(CLASSES, row.shape, generator=draw) for row in data.table["input_ids"]]
    for row in labels:
        row[0] = row[-1] = -100
    return Rows({**data.table, "labels": labels})


CASES = {
    "classifier": (bert, text(12)),
    "images": (vit, images(12)),
    "tokens": (lambda: bert_with("TokenClassification", num_labels=CLASSES), token_labels()),
    "language": (gpt2_lm, text(12, labels=False)),
    "decoder": (t5, written()),
}


@pytest.mark.parametrize("name", CASES)
def test_the_figures_of_both_are_those_of_each_alone(name):
    """Agreement, divergence, accuracy, calibration and perplexity against loops and the functions for one model."""
    make, data = CASES[name]
    one, other = spread(make(), scale=0.6), spread(make(), seed=7, scale=0.6)
    found = behaviour_of(compared(one, other, data))
    logits, masks = [[], []], []
    for row in range(len(data)):
        columns = data.batch([row])
        with torch.no_grad():
            for model, mine in zip((one, other), logits, strict=True):
                answers = model(**inputs_of(model, columns)).logits[0]
                mine.append(answers[None] if answers.ndim == 1 else answers)
        counted = columns["labels"][0] != -100 if name == "tokens" else torch.ones(len(logits[0][-1]), dtype=torch.bool)
        masks.append(counted)
    p, q = (torch.cat([each[mask] for each, mask in zip(mine, masks, strict=True)]).double() for mine in logits)
    assert found.answers == len(p)
    assert found.agreement.value == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    expected = kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
    assert found.divergence == pytest.approx(float(expected), rel=1e-4)
    assert found.largest == pytest.approx(float((p - q).abs().max()), rel=1e-4)
    if name in ("classifier", "images", "tokens"):
        assert [each.value for each in found.accuracy] == [distill.accuracy(each, data).value for each in (one, other)]
        assert found.calibration[1].error == pytest.approx(distill.calibration(other, data).error, rel=1e-4)
        assert found.won - found.lost == round((found.accuracy[1].value - found.accuracy[0].value) * found.answers)
    else:
        alone = [metrics.perplexity(each, data) for each in (one, other)]
        assert found.perplexity == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_a_model_and_its_copy_answer_alike_to_the_last_bit(name):
    make, data = CASES[name]
    model = spread(make())
    found = behaviour_of(compared(model, copy.deepcopy(model), data))
    assert (found.divergence, found.largest, found.agreement.value, found.won, found.lost) == (0.0, 0.0, 1.0, 0, 0)
    assert found.p_value in (1.0, None)


@pytest.mark.parametrize("size", [1, 12])
def test_the_batch_size_changes_nothing(size):
    one, other, data = spread(llama(2)), spread(llama(2), seed=7), text(12, labels=False)
    expected, found = (behaviour_of(compared(one, other, data, n)) for n in (5, size))
    assert found.divergence == pytest.approx(expected.divergence, rel=1e-4)
    assert (found.answers, found.agreement) == (expected.answers, expected.agreement)


def test_neighbours_of_a_rotation_are_the_same_and_those_of_noise_are_not():
    draw = torch.Generator().manual_seed(0)
    one, noise = (torch.randn(200, 8, generator=draw, dtype=torch.float64) for _ in range(2))
    turn = torch.linalg.qr(torch.randn(8, 8, generator=draw, dtype=torch.float64)).Q
    assert shared_neighbours(embedded(one, one @ turn)).value == 1.0
    chance = shared_neighbours(embedded(one, noise))
    assert chance.low <= 10 / 199 + 0.02
    assert chance.value == pytest.approx(10 / 199, abs=0.02)
    assert shared_neighbours(embedded(one[:2], one[:2])) is None


def embedded(one, other):
    """The embeddings of two models, without other figures."""
    none = torch.zeros(len(one), dtype=torch.float64)
    rest = dict.fromkeys(("one", "other", "label"), none.long())
    rest |= dict.fromkeys(("divergence", "gap", "sure", "other_sure", "loss", "other_loss"), none)
    return Compared(Reading("embeddings"), len(one), torch.arange(len(one)), **rest, vectors=torch.stack([one, other]))


def test_rows_that_share_a_cluster_make_intervals_wider():
    """Forty rows in four clusters that agree or differ as one say as much as four."""
    none = torch.zeros(40, dtype=torch.float64)
    rest = dict.fromkeys(("divergence", "gap", "sure", "other_sure", "loss", "other_loss"), none)
    of = torch.arange(40) // 10
    rest |= {"one": none.long(), "other": (of == 0).long(), "label": none.long()}
    alone = behaviour_of(Compared(Reading("classes"), 40, torch.arange(40), **rest))
    shared = behaviour_of(Compared(Reading("classes"), 40, torch.arange(40), **rest, clusters=of[:, None]))
    assert alone.agreement.value == shared.agreement.value == 0.75
    assert shared.agreement.high - shared.agreement.low > 2 * (alone.agreement.high - alone.agreement.low)
    assert (alone.gain.value, shared.gain.value) == (-0.25, -0.25)
    assert alone.gain.high < 0 < shared.gain.high
    assert alone.p_value < 0.01
    assert shared.p_value is None


class Values(nn.Module):
    def __init__(self, slope: float) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.linear.weight, slope)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def test_values_differ_by_their_mean_difference():
    found = behaviour_of(compared(Values(2.0), Values(2.5), Rows({"x": torch.tensor([[1.0], [-3.0]])})))
    assert (found.kind, found.divergence, found.largest, found.agreement) == ("values", 1.0, 1.5, None)


def test_embeddings_are_means_over_real_tokens():
    one, other, data = spread(bert_of(), scale=0.6), spread(bert_of(), seed=7, scale=0.6), text(12, labels=False)
    found = compared(one, other, data)
    for row in range(len(data)):
        columns = data.batch([row])
        with torch.no_grad():
            alone = [each(**inputs_of(each, columns)).last_hidden_state[0].mean(0) for each in (one, other)]
        torch.testing.assert_close(found.vectors[:, row].float(), torch.stack(alone), rtol=1e-4, atol=1e-5)
        cosine = torch.nn.functional.cosine_similarity(*(each.double() for each in alone), dim=0)
        assert float(found.divergence[row]) == pytest.approx(1 - float(cosine), rel=1e-3, abs=1e-6)
    assert behaviour_of(found).kind == "embeddings"


def bert_of():
    import transformers

    config = bert().config
    return transformers.BertModel(config, add_pooling_layer=False)


@pytest.mark.parametrize(
    ("one", "other", "data", "message"),
    [
        (bert, lambda: bert(labels=5), text(4), r"3 classes against 5"),
        (bert, bert_of, text(4), r"the original answers with classes and the compressed model with embeddings"),
        (
            bert,
            vit,
            text(4),
            r"original \(BertFor.*\) reads input_ids and .* \(ViTForImageClassification\) none of them",
        ),
        (bert, lambda: bert_with("TokenClassification", num_labels=CLASSES), text(4), r"3.* and the compressed .* to"),
    ],
)
def test_models_that_cannot_be_compared(one, other, data, message):
    with pytest.raises(DistillError, match=message) as error:
        compared(spread(one()), spread(other()), data)
    assert "\n" not in str(error.value)


def test_rows_without_an_answer_that_counts():
    data = token_labels(3)
    data = Rows({**data.table, "labels": [torch.full_like(each, -100) for each in data.table["labels"]]})
    model = spread(bert_with("TokenClassification", num_labels=CLASSES))
    with pytest.raises(DistillError, match="none of the 3 rows has an answer that counts"):
        behaviour_of(compared(model, model, data))


def test_a_certain_answer_of_another_class_has_the_divergence_of_its_odds():
    """p = (1, 0) to the last bit and q = (1/4, 3/4): KL = ln 4."""

    class Fixed(nn.Module):
        def __init__(self, logits: list[float]) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.tensor(logits))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.logits.expand(len(x), -1)

    found = compared(Fixed([0.0, -2000.0]), Fixed([0.0, log(3.0)]), Rows({"x": torch.zeros(2, 1)}))
    assert found.divergence.tolist() == pytest.approx([log(4.0)] * 2, rel=1e-6)
    assert found.differs.all()


def test_vocabularies_name_next_tokens():
    """The label of a token without labels is the next real one."""
    found = compared(spread(llama(2)), spread(llama(2)), text(4, labels=False))
    ids = text(4, labels=False).table["input_ids"]
    expected = torch.cat([torch.cat([row[1:], torch.tensor([-100])]) for row in ids])
    assert found.label.tolist() == expected.tolist()
    assert int(expected.max()) < VOCABULARY
