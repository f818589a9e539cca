"""Specialists made from a generalist: which classes, which rows, and a dustbin that is right for all rows."""

from math import log

import pytest
import torch
from torch import nn

from distill import KD, DistillError, Rows, Schedule, Specialists, fit
from distill.specialists.training import Specialist, confusable_classes, enriched, predictions
from tests.distill.tiny_models import QUIET, bert, gpt2, text, vit

PAIRS = ((0, 3), (1, 5), (2, 4))
SHORT = {"schedule": Schedule(steps=3, batch_size=8, lr=1e-3), "console": QUIET}


def torn(rows=600, noise=0.02, seed=0):
    """Answers of a network that cannot tell the classes of a pair apart."""
    draw = torch.Generator().manual_seed(seed)
    other = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
    labels = torch.randint(6, (rows,), generator=draw)
    share = 0.3 + 0.4 * torch.rand(rows, generator=draw)
    answers = torch.full((rows, 6), noise)
    answers[torch.arange(rows), labels] += share
    answers[torch.arange(rows), torch.tensor([other[int(each)] for each in labels])] += 1 - share
    return answers / answers.sum(-1, keepdim=True)


def images(rows=120, classes=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    pixels = torch.randn(rows, 1, 8, 8, generator=draw) + labels[:, None, None, None]
    return Rows({"pixel_values": pixels, "labels": labels})


# --- which classes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clustering", ["kmeans", "online"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_confusions_are_found(clustering, seed):
    found = confusable_classes(torn(seed=seed), 3, clustering=clustering, seed=seed)
    assert sorted(found) == sorted(PAIRS)
    assert found == confusable_classes(torn(seed=seed), 3, clustering=clustering, seed=seed)


@pytest.mark.parametrize("n", range(1, 8))
def test_clusters_are_a_partition_and_sets_of_a_size_have_it(n):
    answers = torch.randn(80, 7, generator=torch.Generator().manual_seed(n)).softmax(-1)
    found = confusable_classes(answers, n)
    assert sorted(each for classes in found for each in classes) == list(range(7))
    assert len(found) == n
    assert all(found)
    for size in (1, 3, 6):
        assert [len(set(classes)) for classes in confusable_classes(answers, n, size=size)] == [size] * n


def test_a_size_takes_the_nearest_and_covers_the_planted_pair():
    for classes in confusable_classes(torn(), 3, size=2):
        assert classes in PAIRS


# --- which rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 0.25, 0.9])
@pytest.mark.parametrize("classes", [(0,), (0, 2), (1, 2)])
def test_all_rows_of_the_classes_and_their_share(share, classes):
    labels = torch.tensor([0] * 10 + [1] * 50 + [2] * 20 + [3] * 120)
    rows, shift = enriched(labels, classes, share=share)
    inside = torch.isin(labels[rows], torch.tensor(classes))
    special = int(torch.isin(labels, torch.tensor(classes)).sum())
    assert rows[inside].tolist() == torch.isin(labels, torch.tensor(classes)).nonzero()[:, 0].tolist()
    assert inside.float().mean().item() == pytest.approx(share, abs=0.02)
    rest, drawn = len(labels) - special, int((~inside).sum())
    assert shift == pytest.approx(log(rest / drawn))
    assert rows[~inside].bincount().max() <= -(-drawn // rest)  # nothing twice before all of it once
    again = enriched(labels, classes, share=share)[0]
    assert torch.equal(rows, again)
    assert not torch.equal(rows, enriched(labels, classes, share=share, seed=1)[0])


def test_the_correction_makes_the_best_answer_to_the_enriched_rows_that_to_all_rows():
    """Closed form: what minimises the cross-entropy on a table of counts is the share of each class in each cell."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (40_000,), generator=draw)
    cells = (labels + torch.randint(3, (40_000,), generator=draw)) % 5  # what is seen of an example
    classes = (1, 4)
    rows, shift = enriched(labels, classes, share=0.5)

    def answers(chosen):
        own = torch.full_like(labels, 2)
        for place, each in enumerate(classes):
            own[labels == each] = place
        counts = torch.zeros(5, 3).double()
        counts.index_put_((cells[chosen], own[chosen]), torch.ones(len(chosen)).double(), accumulate=True)
        return (counts + 1e-9).log()

    biased, true = answers(rows), answers(torch.arange(len(labels))).softmax(-1)
    corrected = biased + torch.tensor([0.0, 0.0, shift]).double()
    # Of each class all rows are there, of the rest a random part: what is left is the draw of that part.
    torch.testing.assert_close(corrected.softmax(-1), true, atol=0.02, rtol=0)
    assert not torch.allclose(biased.softmax(-1), true, atol=0.05)
    specialist = Specialist(nn.Identity(), classes, 5)
    specialist.shift.fill_(shift)
    torch.testing.assert_close(specialist(biased).softmax(-1), true, atol=0.02, rtol=0)


# --- the specialists --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [bert, gpt2, vit])
def test_a_specialist_begins_as_the_generalist_with_the_others_in_the_dustbin(make):
    generalist = make().eval()
    batch = images().batch(range(6)) if make is vit else text().batch(range(6))
    inputs = {name: column for name, column in batch.items() if name != "labels" and "special" not in name}
    answers = generalist(**inputs).logits
    specialist = Specialist(generalist, (2, 0), 3)
    merged = torch.stack([answers[:, 2], answers[:, 0], answers[:, 1]], -1).softmax(-1)
    torch.testing.assert_close(specialist(**inputs).softmax(-1), merged)


@pytest.mark.parametrize("make", [bert, gpt2, vit])
def test_in_one_call_a_teacher_that_teaches(make):
    rows = images(24) if make is vit else text(24)
    generalist, student = make(), make(2)
    before = {name: value.clone() for name, value in generalist.state_dict().items()}
    teacher = Specialists.train(generalist, rows, n=2, **SHORT)
    assert sorted(each for classes in teacher.classes for each in classes) == [0, 1, 2]
    for name, value in generalist.state_dict().items():
        assert torch.equal(value, before[name]), name
    for number in ("1", "2"):
        own = teacher.members[number].module.state_dict()
        assert own.keys() == before.keys()
        assert any(not torch.equal(own[name], before[name]) for name in own)
        assert not teacher.members[number].training
    result = fit(teacher, student, {}, rows, objective=KD(1.0), schedule=Schedule(steps=2, batch_size=8), console=QUIET)
    assert len(result.records) == 2


def test_the_shift_is_that_of_the_rows_and_only_after_training():
    rows = images(90)
    unequal = rows.take([i for i in range(90) if i % 3 or i < 30])  # fewer of class 0
    teacher = Specialists.train(vit(), unequal, n=3, **SHORT)
    labels = unequal.table["labels"]
    for number, classes in enumerate(teacher.classes):
        expected = enriched(labels, classes, seed=number)[1]
        assert float(teacher.members[str(number + 1)].shift) == pytest.approx(expected)


def test_a_seed_makes_the_same_teacher_again_and_another_one_another():
    rows, generalist = images(48), vit()
    one, same, other = (Specialists.train(generalist, rows, n=2, seed=seed, **SHORT) for seed in (5, 5, 6))
    states = [each.state_dict() for each in (one, same, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert states[0].keys() != states[2].keys() or any(
        not torch.equal(value, states[2][name]) for name, value in states[0].items()
    )


def test_train_of_an_object_is_the_mode_of_a_module():
    teacher = Specialists.train(vit(), images(48), n=2, k=2, temperature=2.0, **SHORT)
    assert (teacher.k, teacher.temperature) == (2, 2.0)
    assert teacher.train() is teacher
    assert all(module.training for module in teacher.modules())
    assert teacher.eval() is teacher
    assert not any(module.training for module in teacher.modules())
    assert teacher.train(False) is teacher
    assert not teacher.training


def test_a_network_of_ones_own_with_a_dustbin():
    made = []

    def small(generalist, classes):
        made.append(classes)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, len(classes) + 1))

    teacher = Specialists.train(vit(), images(48), n=2, network=small, **SHORT)
    assert tuple(made) == teacher.classes
    assert isinstance(teacher.members["1"].module, nn.Sequential)
    with pytest.raises(DistillError, match=r"specialist for \d classes has 7 outputs; it needs"):
        Specialists.train(
            vit(), images(48), n=2, network=lambda *_: nn.Sequential(nn.Flatten(), nn.Linear(64, 7)), **SHORT
        )


def test_specialists_learn_their_classes():
    """Two classes that the generalist was never shown apart are told apart by the specialist for them."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(400, 4, generator=draw)
    labels = (x[:, 0] > 0).long() * 2 + (x[:, 1] > 0).long()
    generalist = nn.Linear(4, 4)
    with torch.no_grad():  # sees dim 0 alone
        generalist.weight.copy_(torch.tensor([[-4.0, 0, 0, 0], [-4.0, 0, 0, 0], [4.0, 0, 0, 0], [4.0, 0, 0, 0]]))
        generalist.bias.zero_()
    rows = Rows({"inputs": x, "labels": labels})
    teacher = Specialists.train(
        generalist, rows, n=2, schedule=Schedule(steps=150, batch_size=50, lr=0.05), console=QUIET
    )
    assert sorted(teacher.classes) == [(0, 1), (2, 3)]
    alone = (generalist(x).argmax(-1) == labels).float().mean()
    together = (teacher(x).logits.argmax(-1) == labels).float().mean()
    assert alone < 0.6
    assert together > 0.9
    torch.testing.assert_close(predictions(generalist, rows).sum(-1), torch.ones(400).double())


# --- what cannot be is one line ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, r"n=0 specialists of size=None cannot be made of 3 classes; use n from 1 to 3"),
        ({"n": 4}, r"n=4 .* cannot be made of 3 classes"),
        ({"n": 2, "size": 3}, r"size from 1 to 2, or None"),
        ({"n": 1}, r"one specialist for all 3 classes has nothing for its dustbin; use n=2"),
        ({"n": 2, "share": 1.0}, r"share=1\.0 of the rows"),
        ({"n": 2, "clustering": "dbscan"}, r"'dbscan' does not exist; use 'kmeans', or 'online'"),
    ],
)
def test_numbers_that_do_not_fit(settings, message):
    with pytest.raises(DistillError, match=message) as caught:
        Specialists.train(vit(), images(30), **settings, **SHORT)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, r"the data has no column labels \(pixel_values\); add one class a row"),
        (torch.randn(30), r"labels that are no class for each example"),
        (torch.arange(30) % 4, r"the labels go from 0 to 3 and the generalist has 3 classes"),
        (torch.zeros(30, dtype=torch.long), r"none of the 30 rows is of"),
    ],
)
def test_data_that_does_not_fit(labels, message):
    table = {"pixel_values": images(30).table["pixel_values"]}
    rows = Rows(table if labels is None else {**table, "labels": labels})
    with pytest.raises(DistillError, match=message):
        Specialists.train(vit(), rows, n=3, **SHORT)


def test_a_generalist_that_is_no_classifier_or_knows_no_difference():
    tokens = nn.Embedding(5, 3)  # one answer a token
    with pytest.raises(DistillError, match=r"specialists are for classes, and the generalist gives \[6, 4, 3\]"):
        Specialists.train(tokens, Rows({"ids": torch.zeros(6, 4).long(), "labels": torch.zeros(6).long()}), **SHORT)
    with pytest.raises(DistillError, match=r"fall into 1 groups and n=2 were requested; use n=1"):
        confusable_classes(torch.full((9, 4), 0.25), 2)
    with pytest.raises(DistillError, match="1 row has no covariance"):
        confusable_classes(torch.full((1, 4), 0.25), 2)


# --- what it takes ----------------------------------------------------------------------------------------------------


def named(model, names=("cat", "dog", "cow")):
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: number for number, name in enumerate(names)}
    return model


@pytest.mark.parametrize("make", [bert, gpt2, vit])
def test_a_generalist_whose_classes_have_names(make):
    rows = images() if make is vit else text()
    teacher = Specialists.train(named(make(2)), rows, 2, **SHORT)
    assert sorted(each for classes in teacher.classes for each in classes) == [0, 1, 2]
    student = make(1)
    result = fit(teacher, student, {}, rows, objective=KD(), eval_data=rows, **SHORT)
    assert result.evaluation.accuracy is not None
    assert list(teacher.config.id2label.values()) == ["cat", "dog", "cow"]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"n": 2.5}, r"n=2\.5 specialists of size=None cannot be made of 3 classes"),
        ({"n": "2"}, r"n='2' specialists"),
        ({"n": True}, r"n=True specialists"),
        ({"n": 2, "size": 1.5}, r"size=1\.5 cannot be made"),
        ({"n": 2, "seed": "0"}, r"seed='0' is no whole number"),
        ({"n": 2, "k": 0}, r"Specialists\(k=0, temperature=1\.0\): both must be above 0"),
        ({"n": 2, "temperature": 0.0}, r"temperature=0\.0\): both must be above 0"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_before_any_training(wrong, match, monkeypatch):
    monkeypatch.setattr("distill.specialists.training.fit", lambda *args, **settings: pytest.fail("trained"))
    with pytest.raises(DistillError, match=match):
        Specialists.train(bert(1), text(), **wrong, **SHORT)


def test_data_of_another_kind_is_said_in_one_line():
    with pytest.raises(
        DistillError, match=r"the generalist \(BertFor\w+\)|forward takes .* and the data has pixel_values"
    ):
        Specialists.train(bert(1), images(), 2, **SHORT)


@pytest.mark.parametrize("answers", [1, lambda output: output[1]], ids=["an index", "a function"])
def test_a_generalist_with_other_outputs(answers):
    class Wrapped(nn.Sequential):
        def forward(self, inputs):
            return inputs, super().forward(inputs)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    rows = Rows({"inputs": torch.randn(60, 4), "labels": torch.arange(60) % 3})
    plain = Specialists.train(net, rows, 2, **SHORT)
    found = Specialists.train(Wrapped(*net), rows, 2, answers=answers, **SHORT)
    inputs = torch.randn(5, 4)
    assert torch.equal(found(inputs).logits, plain(inputs).logits)
