import pytest
import torch
from torch import nn

from distill import DistillError, Rows, Task
from distill.evaluation.linear_probe import features, linear_probe
from distill.models.inputs import inputs_of
from interventions import Location
from tests.distill.tiny_models import CNN, LSTM, bert, gpt2, images, mlp, same, spread, text, vectors, vit, weights

CLASSES = 3


def told_apart(rows=120, seed=0, width=6):
    """Vectors whose class is that of the largest of their first three entries."""
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, width, generator=draw)
    labels = inputs[:, :CLASSES].argmax(-1)
    inputs[torch.arange(rows), labels] += 2  # with room to spare
    return Rows({"inputs": inputs, "labels": labels})


def drawn(make, rows, seed):
    """Rows of the model's kind of inputs, with labels drawn at random."""
    if make in (CNN, vit):
        return images(rows, seed)
    return vectors(rows, seed) if make is mlp else text(rows, seed=seed)


def linear():
    """Its features are a rotation of its inputs, and three more that do not vary."""
    net = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 2))
    with torch.no_grad():
        turned = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0))).Q
        net[0].weight.copy_(torch.cat([turned * torch.logspace(-3, 3, 6)[:, None], torch.zeros(3, 6)]))
    return net


def test_classes_that_lie_in_the_features_are_found():
    """Whatever the sizes of the features, and of whatever other classes the model is."""
    found = linear_probe(linear(), told_apart(), told_apart(60, 1), penalty=1e-3)
    assert found.value == 1
    assert found.count == 60
    assert found.low == pytest.approx(0.94, abs=0.005)  # Wilson: 60 / (60 + 1.96²)


@pytest.mark.parametrize("make", [mlp, CNN, LSTM, bert, gpt2, vit])
def test_random_labels_are_found_by_chance(make):
    model = spread(make())
    found = linear_probe(model, drawn(make, 60, 0), drawn(make, 240, 1))
    assert found.count == 240
    assert 0.2 < found.value < 0.47
    assert found == linear_probe(model, drawn(make, 60, 0), drawn(make, 240, 1))  # nothing is drawn


@pytest.mark.parametrize("make", [mlp, CNN, LSTM, bert, gpt2, vit])
def test_what_the_model_answers_from_is_what_is_probed(make):
    """The model's own answers are linear in its features, so the probe learns to answer like the model."""
    model = spread(make(), scale=1.0)
    rows = [drawn(make, count, seed) for count, seed in ((300, 0), (100, 1))]
    given = [answers(model, each) for each in rows]
    labelled = [
        Rows({**each.table, "labels": (logits - given[0].mean(0)).argmax(-1)})  # about as many of each class
        for each, logits in zip(rows, given, strict=True)
    ]
    assert len(labelled[0].table["labels"].unique()) == CLASSES
    pool = {"pool": "last"} if make is gpt2 else {}
    found = linear_probe(model, *labelled, penalty=1e-2, **pool)
    assert found.value > 0.85
    shuffled = Rows({**labelled[0].table, "labels": labelled[0].table["labels"].roll(1)})
    assert linear_probe(model, shuffled, labelled[1], penalty=1e-2, **pool).value < found.value - 0.2


@torch.no_grad()
def answers(model, rows):
    given = inputs_of(model, rows.batch(range(len(rows))))
    output = model(**given) if isinstance(given, dict) else model(*given)
    return getattr(output, "logits", output)


@pytest.mark.parametrize("make", [CNN, bert])
def test_the_model_is_left_as_it_was(make):
    model = make().train()
    frozen = next(model.parameters()).requires_grad_(False)
    next(iter(model.children())).eval()
    before, modes = weights(model), [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    state = torch.random.get_rng_state()
    linear_probe(model, drawn(make, 30, 0), drawn(make, 30, 1), batch_size=7)
    assert same(before, weights(model))
    assert modes == [m.training for m in model.modules()]
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert not frozen.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.random.get_rng_state())


def test_batches_change_nothing():
    rows, model = text(20), spread(bert())
    at = Location(1)
    one, other = (features(model, rows, at, batch_size=size) for size in (20, 3))
    assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("pool", ["mean", "first", "last"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_positions_are_pooled_without_padding(pool, side):
    rows, model = text(6, 3, 9, side=side), spread(bert())
    at = Location(2)
    found = features(model, rows, at, pool=pool)
    batch = rows.batch(range(6))
    with torch.no_grad():
        states = model(**inputs_of(model, batch), output_hidden_states=True).hidden_states[3]
    for i in range(6):
        own = states[i][batch["attention_mask"][i].bool()]
        expected = {"mean": own.mean(0), "first": own[0], "last": own[-1]}[pool]
        assert torch.allclose(found[i], expected, atol=1e-5)


@pytest.mark.parametrize("size", [8, 12])
def test_other_resolutions_and_maps(size):
    draw = torch.Generator().manual_seed(0)
    rows = Rows({"pixel_values": torch.randn(20, 1, size, size, generator=draw), "labels": torch.arange(20) % 2})
    model = spread(CNN())
    assert features(model, rows, Location(module="fc", io="input")).shape == (20, 6)
    maps = features(model, rows, Location(module="conv2"))
    with torch.no_grad():
        expected = model.conv2(model.bn1(model.conv1(rows.table["pixel_values"])).tanh()).mean((2, 3))
    assert torch.allclose(maps, expected, atol=1e-5)
    assert linear_probe(model, rows, rows, at="module:conv2").count == 20


def test_a_task_has_its_test_rows():
    task = Task("apart", told_apart(), told_apart(40, 1), ("a", "b", "c"))
    found = linear_probe(linear(), task, penalty=1e-3)
    assert (found.value, found.count) == (1, 40)
    assert linear_probe(linear(), task, told_apart(30, 2), penalty=1e-3).count == 30


def test_rows_without_a_label_are_left_out():
    train, test = told_apart(), told_apart(40, 1)
    labels = [rows.table["labels"].clone() for rows in (train, test)]
    labels[0][::2], labels[1][::4] = -100, -100
    train, test = (Rows({**r.table, "labels": x}) for r, x in zip((train, test), labels, strict=True))
    found = linear_probe(linear(), train, test, penalty=1e-3)
    assert found.count == 30
    assert found.value > 0.9


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({}, dict(pool="max"), "pool='max' makes no vector"),
        ({}, dict(penalty=0.0), "penalty=0.0 leaves the classifier without bounds"),
        ({"labels": torch.zeros(24).long()}, {}, "all 24 train rows have class 0"),
        ({"labels": torch.zeros(24)}, {}, "train rows have real numbers; give whole numbers"),
        ({"labels": torch.zeros(24, 2).long()}, {}, "train rows have several"),
        ({"labels": torch.full((24,), -100)}, {}, "none of the train rows has a label"),
        ({"inputs": torch.full((24, 6), torch.nan)}, {}, "are not finite in 24 rows"),
    ],
)
def test_errors(change, settings, message):
    rows = Rows({**vectors().table, **change})
    with pytest.raises(DistillError, match=message):
        linear_probe(mlp(), rows, vectors(), **settings)


def test_rows_to_measure_on_are_needed():
    with pytest.raises(DistillError, match=r"linear_probe\(model, train_rows, test_rows\)"):
        linear_probe(mlp(), vectors())
    with pytest.raises(DistillError, match="train rows have none"):
        linear_probe(mlp(), {"inputs": torch.randn(4, 6)}, vectors())
