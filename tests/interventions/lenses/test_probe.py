"""Linear probes: logistic regression by hand, rows never on both sides, and directions to steer the model by."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from interventions import InterventionError, Location, probe, run
from interventions.lenses.probe import Read
from tests.interventions.analysis.test_sweeps import padded
from tests.interventions.tiny_models import TRANSFORMERS, batch, make, trace

PLACES = [Location(0), Location(2)]


class Table:
    """Rows that are read by their numbers."""

    def __init__(self, x, labels):
        self.x, self.labels = x, labels

    def __len__(self):
        return len(self.x)

    def batch(self, numbers):
        return {"input": self.x[numbers], "labels": self.labels[numbers]}


def drawn(rows=120, dims=6, seed=0):
    """Vectors, whose dims 1 and 3 decide the class among three."""
    x = torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed))
    return x, torch.stack([x[:, 1], x[:, 3], -x[:, 1] - x[:, 3]], 1).argmax(1)


def network():
    """Return a network whose second place has lost dim 3."""
    lost = nn.Linear(6, 6, bias=False)
    with torch.no_grad():
        lost.weight.copy_(torch.eye(6))
        lost.weight[3] = 0
    return nn.Sequential(nn.Identity(), lost).eval()


def by_hand(vectors, labels, tested, penalty=1.0):
    """Return the accuracy of scikit-learn's own predictions."""
    learned = [row for row in range(len(labels)) if row not in tested]
    seen = vectors[learned].double()
    center, scale = seen.mean(0), seen.std(0, correction=0)
    model = LogisticRegression(C=1 / penalty, max_iter=5000).fit((seen - center) / scale, labels[learned])
    return model.score((vectors[tested].double() - center) / scale, labels[tested])


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_each_probe_is_logistic_regression_by_hand(name):
    """Over all families, on the last real token, batch by batch; the model is as it was."""
    model = make(name)
    data = [batch(name, seed=seed) for seed in range(12)]
    if name == "gpt2":
        data = [padded(each, [5, 3, 2], "right") for each in data]
    labels = torch.arange(sum(len(run(model, each).output[0]) for each in data)) % 3
    before = trace(model)
    found = probe(model, data, PLACES, labels, held_out=0.25, penalty=0.5, seed=3)
    assert trace(model) == before
    tested = torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))[: round(len(labels) / 4)].tolist()
    for at in PLACES:
        states = [run(model, each, at).vectors(at).detach() for each in data]
        last = [[4, 2, 1] if name == "gpt2" else [-1] * len(each) for each in states]
        vectors = torch.cat([each[range(len(each)), tokens] for each, tokens in zip(states, last, strict=True)])
        assert torch.allclose(found.reads[at].vectors.sort(0)[0], vectors[tested].sort(0)[0], rtol=1e-4, atol=1e-4)
        assert found.reads[at].accuracy == pytest.approx(by_hand(vectors, labels, tested, 0.5))


def test_what_is_there_is_read_and_what_is_lost_is_not():
    x, labels = drawn(400)
    found = probe(network(), [x[:100], x[100:]], ["module:0", "module:1"], labels)
    there, lost = found.reads.values()
    assert there.accuracy > 0.9
    assert there.selectivity > 0.3
    assert lost.accuracy < there.accuracy - 0.1
    assert abs(there.control - there.majority) < 0.25
    assert found.best == Location(module="0")
    assert found.classes == (0, 1, 2)
    assert (found.trained_on, len(there.labels)) == (320, 80)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_probe_is_applied_to_activations(classes):
    x, labels = drawn()
    labels = labels.clamp(max=classes - 1) + 7
    found = probe(network(), Table(x, labels), "module:0")
    read = found.reads[Location(module="0")]
    logits = found.logits("module:0", read.vectors)
    assert logits.shape == (24, classes)
    assert float((logits.argmax(-1) == read.labels).float().mean()) == pytest.approx(read.accuracy)
    assert found.classes == tuple(range(7, 7 + classes))


def test_the_direction_of_a_class_raises_its_logit_and_its_ablation_hides_it():
    x, _ = drawn(400)
    labels = (x[:, 1] > 0).long()
    net = nn.Sequential(nn.Identity(), nn.Linear(6, 2)).eval()
    found = probe(net, [x], "module:0", labels)
    along = found.direction("module:0", 1)
    assert along.separation > 0.95
    assert torch.nn.functional.cosine_similarity(along.unit, torch.eye(6)[1], dim=0) > 0.9
    at = Location(module="0")
    read = found.reads[at]
    steered = read.vectors + along.add(5.0)[at].value * 5.0
    assert (found.logits(at, steered)[:, 1] > found.logits(at, read.vectors)[:, 1]).all()
    hidden = read.vectors - (read.vectors @ along.unit)[:, None] * along.unit
    assert found.logits(at, hidden).argmax(-1).unique().numel() == 1


def test_all_tokens_of_a_row_are_on_one_side():
    """Rows are told apart by a mark in their tokens, and classes by nothing else, so that no probe can know them."""
    marks = torch.randn(40, 1, 6, generator=torch.Generator().manual_seed(0)).expand(40, 5, 6)
    labels = torch.randint(0, 2, (40,), generator=torch.Generator().manual_seed(1))
    found = probe(nn.Sequential(nn.Identity()).eval(), [marks], "module:0", labels, positions=None)
    read = found.reads[Location(module="0")]
    assert len(read.labels) == 8 * 5
    assert found.trained_on == 32 * 5
    held = {tuple(row) for row in read.vectors.tolist()}
    assert len(held) == 8


def test_rows_without_a_class_are_left_out():
    x, labels = drawn()
    some = labels.where(torch.arange(120) % 2 == 0, -100)
    found = probe(network(), [x], "module:0", some)
    assert found.trained_on + len(found.reads[Location(module="0")].labels) == 60
    alone = probe(network(), [x[::2]], "module:0", labels[::2], seed=0)
    assert found.trained_on == alone.trained_on


def test_the_seed_decides_and_batches_do_not():
    x, labels = drawn()
    one, same, other = (
        probe(network(), data, "module:1", labels, seed=seed)
        for data, seed in (([x], 0), ([x[:50], x[50:]], 0), ([x], 1))
    )
    assert one.to_dict() == same.to_dict()
    assert one.to_dict() != other.to_dict()


def test_what_it_shows():
    x, labels = drawn()
    found = probe(network(), [x], ["module:0", "module:1"], labels)
    assert str(found).splitlines()[0] == "linear probes: 3 classes, 96 vectors trained on, 24 held out"
    assert str(found).splitlines()[2].split()[0] == "module:0"
    assert list(found.to_pandas().columns) == ["accuracy", "control", "selectivity", "majority", "held out"]
    assert "<img" in found._repr_html_()
    assert isinstance(next(iter(found.reads.values())), Read)


X, Y = drawn(20)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": Y[:-1]}, r"labels are .* and the data has 20 rows; pass one whole number for each row"),
        ({"labels": Y.double()}, "pass one whole number for each row"),
        ({"labels": ["a", "b"]}, r"are no classes; pass a whole number for each row"),
        ({"labels": None}, "the data has no column 'labels'"),
        ({"labels": torch.zeros(20, dtype=torch.long)}, "the labels name 1 class, so there is nothing to tell apart"),
        ({"labels": torch.arange(20)}, r"class \d+ has no row to learn from"),
        ({"labels": torch.full((20,), -100)}, "the labels name 0 class"),
        ({"data": []}, "the data has no batches"),
        ({"data": [X * float("nan")]}, "the activations at module:0 are not finite"),
        ({"held_out": 1.0}, "held_out=1.0 is no share of the rows"),
        ({"penalty": 0.0}, "penalty=0.0 leaves a probe without bounds"),
        ({"at": []}, "names no location"),
    ],
)
def test_what_cannot_be_probed_is_refused(settings, message):
    given = {"data": [X], "at": "module:0", "labels": Y} | settings
    with pytest.raises(InterventionError, match=message) as error:
        probe(network(), given.pop("data"), given.pop("at"), **given)
    assert "\n" not in str(error.value)


def test_what_was_not_probed_is_refused():
    found = probe(network(), [X], "module:0", Y)
    with pytest.raises(InterventionError, match="module:1 has no probe; name one of module:0"):
        found.direction("module:1", 0)
    with pytest.raises(InterventionError, match="label=9 is no class of these probes; name one of 0, 1, 2"):
        found.direction("module:0", 9)
    with pytest.raises(InterventionError, match="reads 6 dims, and the vectors are"):
        found.logits("module:0", torch.zeros(2, 5))
