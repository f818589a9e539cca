import copy
import re

import pytest
import torch
from torch import nn

from distill import (
    DIITO,
    KD,
    DistillError,
    Ensemble,
    Labels,
    Rows,
    Schedule,
    fit,
    from_layers,
    layer_mapping,
    metrics,
    steps,
)
from distill.losses import kd
from distill.models.inputs import inputs_of, vocabulary_of
from distill.teachers.ensemble import averaged
from interventions import InterventionError, Location, interchange, run
from tests.distill.tiny_models import (
    CLASSES,
    CNN,
    LSTM,
    QUIET,
    VOCABULARY,
    bert,
    gpt2_lm,
    images,
    mlp,
    same,
    spread,
    t5,
    text,
    vectors,
    vit,
    weights,
)

SHORT = Schedule(steps=3, batch_size=5, lr=1e-2)


def logits_of(model, rows, count=6):
    batch = rows.batch(range(count))
    with torch.no_grad():
        return run(model, inputs_of(model, batch), resumable=False).logits


def pair(make=mlp):
    return spread(make(), 0), spread(make(), 1)


@pytest.mark.parametrize("average", ["logits", "probabilities", "geometric"])
@pytest.mark.parametrize(
    ("make", "rows"),
    [(mlp, vectors()), (CNN, images()), (vit, images()), (bert, text()), (gpt2_lm, text(labels=False))],
)
def test_two_identical_teachers_are_one(average, make, rows):
    teacher = spread(make())
    alone = logits_of(teacher, rows)
    for twin in (teacher, copy.deepcopy(teacher)):
        both = logits_of(Ensemble([teacher, twin], average), rows)
        assert (
            torch.equal(both, alone)
            if average == "logits"
            else torch.allclose(both.softmax(-1), alone.softmax(-1), atol=1e-6)
        )


def test_the_three_averages_by_hand():
    z = torch.tensor([[[3.0, 1.0]], [[1.0, 7.0]]]).log()  # p = (3/4, 1/4) and (1/8, 7/8)
    even, skew = torch.tensor([0.5, 0.5]), torch.tensor([0.75, 0.25])
    assert torch.allclose(averaged(z, even), torch.tensor([[3.0, 7.0]]).log() / 2)
    assert torch.allclose(averaged(z, even, "probabilities").exp(), torch.tensor([[7 / 16, 9 / 16]]))
    assert torch.allclose(averaged(z, skew, "probabilities").exp(), torch.tensor([[19 / 32, 13 / 32]]))
    geometric = torch.tensor([[(3 / 4 * 1 / 8) ** 0.5, (1 / 4 * 7 / 8) ** 0.5]])
    assert torch.allclose(averaged(z, even, "geometric").exp(), geometric)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(3, 7, 5), (3, 2, 4, 5)])
def test_the_mean_of_logits_is_the_geometric_mean_of_probabilities(temperature, shape):
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    w = torch.tensor([0.2, 0.3, 0.5])
    one, other = averaged(z, w, "logits"), averaged(z, w, "geometric")
    assert torch.allclose((one / temperature).softmax(-1), (other / temperature).softmax(-1), atol=1e-6)
    differences = one - other
    assert torch.allclose(differences, differences[..., :1].expand_as(differences), atol=1e-5)
    mean = averaged(z, w, "probabilities")
    assert not torch.allclose(mean.softmax(-1), one.softmax(-1), atol=1e-2)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 4.0])
def test_kd_sees_the_mean_of_the_softened_probabilities(temperature):
    one, other = pair()
    ensemble = Ensemble([one, other], "probabilities", weights=[1, 3], temperature=temperature)
    z = logits_of(ensemble, vectors())
    softened = [(logits_of(each, vectors()) / temperature).softmax(-1) for each in (one, other)]
    target = 0.25 * softened[0] + 0.75 * softened[1]
    assert torch.allclose((z / temperature).softmax(-1), target, atol=1e-6)
    student = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    expected = (target * (target.log() - (student / temperature).log_softmax(-1))).sum(-1).mean() * temperature**2
    assert kd(student, z, temperature).item() == pytest.approx(expected.item(), rel=1e-5)


def test_sure_teachers_stay_finite():
    z = torch.tensor([[[400.0, 0.0, -400.0]], [[-400.0, 0.0, 400.0]]])
    mean = averaged(z, torch.tensor([0.5, 0.5]), "probabilities")
    assert torch.allclose(mean.softmax(-1), torch.tensor([[0.5, 0.0, 0.5]]))
    assert mean.isfinite().all()
    never = z.masked_fill(z == 0, -torch.inf)  # a class that is impossible for both stays so
    assert averaged(never, torch.tensor([0.5, 0.5]), "probabilities").softmax(-1)[0, 1] == 0


def test_weights_are_shares():
    one, other = pair()
    rows = vectors()
    first, second = logits_of(one, rows), logits_of(other, rows)
    assert torch.allclose(logits_of(Ensemble([one, other], weights=[3, 1]), rows), 0.75 * first + 0.25 * second)
    assert torch.equal(logits_of(Ensemble([one], weights=[7.0]), rows), first)


def test_half_precision_is_widened():
    one, other = (each.to(torch.bfloat16) for each in pair())
    rows = Rows({"inputs": vectors().table["inputs"].to(torch.bfloat16)})
    found = logits_of(Ensemble([one, other]), rows)
    assert found.dtype == torch.float32
    assert torch.equal(found, (logits_of(one, rows).float() + logits_of(other, rows).float()) / 2)


def test_members_of_several_kinds_each_get_what_they_name():
    members = [spread(bert(2)), spread(LSTM(), 1)]
    ensemble, batch = Ensemble(members), text().batch(range(5))
    assert set(inputs_of(ensemble, batch)) == {"input_ids", "attention_mask"}
    assert torch.allclose(
        logits_of(ensemble, text(), 5), sum(logits_of(member, text(), 5) for member in members) / 2, atol=1e-6
    )
    pictures = Ensemble([spread(CNN()), spread(nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)), 1)])
    assert set(inputs_of(pictures, images().batch([0, 1]))) == {"pixel_values"}
    assert logits_of(pictures, images()).shape == (6, CLASSES)
    x = images().batch([0, 1])["pixel_values"]
    assert torch.equal(pictures(x).logits, pictures(pixel_values=x).logits)
    inner = Ensemble([Ensemble(members), members[0]])
    assert torch.allclose(
        logits_of(inner, text()), 0.75 * logits_of(members[0], text()) + 0.25 * logits_of(members[1], text()), atol=1e-6
    )


def test_encoder_decoders_are_given_the_labels_shifted():
    rows = text(labels=False)
    written = Rows({**rows.table, "labels": torch.randint(5, 40, (24, 4), generator=torch.Generator().manual_seed(0))})
    one, other = (spread(t5(2), seed) for seed in range(2))
    mean = (logits_of(one, written) + logits_of(other, written)) / 2
    assert torch.allclose(logits_of(Ensemble([one, other]), written), mean)
    other.config.decoder_start_token_id = 3
    with pytest.raises(DistillError, match="members of Ensemble make different decoder_input_ids of the labels"):
        inputs_of(Ensemble([one, other]), written.batch([0, 1]))


def test_modes_and_weights_of_the_members_are_kept():
    one, other = spread(CNN(), 0).train(), spread(CNN(), 1).eval()
    one.bn1.eval()
    ensemble, before = Ensemble([one, other]), weights(one)
    modes = [module.training for module in (*one.modules(), *other.modules())]
    student = spread(CNN(), 2)
    list(steps(ensemble, student, None, images(), objective=KD(), schedule=SHORT))
    assert modes == [module.training for module in (*one.modules(), *other.modules())]
    assert same(before, weights(one))
    assert all(parameter.grad is None for parameter in ensemble.parameters())


def test_a_teacher_like_any_other(tmp_path):
    one, other = spread(bert(3)), spread(bert(2), 1)
    ensemble = Ensemble([one, other], "probabilities", temperature=2.0)
    student = from_layers(one, 2)
    result = fit(
        ensemble, student, None, text(), objective=[KD(2.0), Labels()], eval_data=text(seed=1), schedule=SHORT,
        output_dir=tmp_path / "run", console=QUIET,
    )  # fmt: skip
    assert result.records[0].terms["kd"] > 0
    assert result.accuracy is not None
    assert vocabulary_of(ensemble) == VOCABULARY
    assert metrics.accuracy(ensemble, text()).count == 24
    mean = Ensemble([one, one, one])
    expected = list(steps(one, from_layers(one, 2), None, text(), objective=KD(), schedule=SHORT))
    assert [r.loss for r in steps(mean, from_layers(one, 2), None, text(), objective=KD(), schedule=SHORT)] == [
        pytest.approx(record.loss, rel=1e-4) for record in expected
    ]


def test_random_data_is_made_for_the_members():
    students = spread(bert(2), 3), spread(vit(2), 3)
    for make, student in zip((bert, vit), students, strict=True):
        ensemble = Ensemble([spread(make(2)), spread(make(3), 1)])
        assert next(steps(ensemble, student, None, "random", objective=KD(), schedule=SHORT)).terms["kd"] > 0


def test_a_layer_alone_is_ambiguous_whatever_the_depths():
    for members in ([bert(3), bert(3)], [bert(3), bert(2)], [bert(3), vit(2)], [bert(3), gpt2_lm(3)]):
        ensemble = Ensemble([spread(member) for member in members])
        with pytest.raises(DistillError, match=r"layers cannot be counted: .*ambiguous.*stacks 0, 1"):
            layer_mapping(ensemble, members[0], "full")
    ensemble = Ensemble([spread(bert(3)), spread(bert(2), 1)])
    with pytest.raises(DistillError, match=r"ambiguous: this Ensemble has the stacks 0, 1; write stack='0'"):
        next(steps(ensemble, spread(bert(2), 2), "full", text(), objective=[KD(), DIITO()], schedule=SHORT))
    with pytest.raises(InterventionError, match="ambiguous"):
        run(ensemble, inputs_of(ensemble, text().batch([0])), Location(1))


def test_interchanges_inside_members():
    one, other = spread(bert(3)), spread(bert(2), 1)
    ensemble, batch = Ensemble([one, other]), text(24, 6, 6).batch(range(4))
    inputs = inputs_of(ensemble, batch)
    rows = torch.tensor([1, 0, 3, 2])
    with torch.no_grad():
        base = run(ensemble, inputs)
        for at in (Location(1, stack="0"), Location(module="members.0.bert.encoder.layer.1")):
            found = interchange(ensemble, base, base.take(rows), at).logits
            alone = run(one, inputs)
            swapped = interchange(one, alone, alone.take(rows), Location(1)).logits
            assert torch.allclose(found, (swapped + run(other, inputs).logits) / 2, atol=1e-6)
            assert not torch.allclose(found, base.logits, atol=1e-3)
        late = interchange(ensemble, base, base.take(rows), Location(0, stack="1"))
        alone = run(other, inputs)
        swapped = interchange(other, alone, alone.take(rows), Location(0)).logits
        assert torch.allclose(late.logits, (run(one, inputs).logits + swapped) / 2, atol=1e-6)
    mapping = {(Location(2, stack="0"), Location(1, stack="1")): Location(1)}
    record = next(steps(ensemble, spread(bert(2), 2), mapping, text(), schedule=SHORT))
    assert record.terms["kd_cf"] > 0


def test_layers_of_language_models_resume_without_their_caches():
    one, other = spread(gpt2_lm(2)), spread(gpt2_lm(3), 1)
    ensemble, batch = Ensemble([one, other]), text(24, 6, 6, labels=False).batch(range(4))
    inputs, rows = inputs_of(ensemble, batch), torch.tensor([1, 0, 3, 2])
    with torch.no_grad():
        base = run(ensemble, inputs)
        at = Location(1, stack="0")
        resumed = interchange(ensemble, base, base.take(rows), at).logits
        assert torch.allclose(resumed, interchange(ensemble, base, base.take(rows), at, resume=False).logits)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ensemble([]), r"Ensemble has no members: \[\]; give at least one"),
        (lambda: Ensemble([mlp(), mlp()], "mean"), "no average='mean'; use 'logits', 'probabilities' or 'geometric'"),
        (lambda: Ensemble([mlp(), mlp()], weights=[1.0]), r"of 2 teachers has weights=\[1.0\]; give one above 0"),
        (lambda: Ensemble([mlp(), mlp()], weights=[1.0, 0.0]), r"weights=\[1.0, 0.0\]; .*leave out teachers"),
        (lambda: Ensemble([mlp(), mlp()], weights=[1.0, torch.nan]), "weights must be a sequence, each a number"),
        (lambda: Ensemble([mlp()], "probabilities", temperature=0.0), "temperature above 0: 0.0"),
        (lambda: Ensemble([mlp()], temperature=4.0), r"average='logits', temperature=4.0\) is the same at every"),
        (
            lambda: Ensemble([mlp(), nn.Linear(6, 5)])(torch.zeros(2, 6)),
            r"different shapes: member 0 gives \[2, 3\] and member 1 \[2, 5\]; take members of the same classes",
        ),
    ],
)
def test_what_does_not_fit_together(make, message):
    with pytest.raises(DistillError, match=message):
        make()


def test_other_vocabularies_are_refused():
    other = bert(1)
    other.resize_token_embeddings(50)
    with pytest.raises(DistillError, match="members of Ensemble know 40 and 50 tokens: they read different"):
        Ensemble([bert(1), other])
    student = spread(bert(1))
    with pytest.raises(DistillError, match="the teacher knows 50 tokens and the student 40"):
        next(steps(Ensemble([other, LSTM()]), student, None, text(), objective=KD()))


def test_it_prints_what_it_averages():
    shown = repr(Ensemble([mlp(), mlp()], "probabilities", weights=[1, 3], temperature=2.0))
    assert re.search(r"'probabilities', weights=\[0.25, 0.75\], temperature=2.0", shown)
