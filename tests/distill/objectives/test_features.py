import pytest
import torch
from torch.nn import functional

from distill import DIITO, KD, PKD, Cosine, DistillError, layers
from distill.inputs import inputs_of
from distill.loop import Computation
from distill.mapping import pairs_of
from interventions import Location, run
from tests.distill.models import CNN, LSTM, bert, images, spread, text, vit


def couple():
    return spread(bert(4)), spread(bert(2), 1)


def terms(teacher, student, objective, batch, mapping=None):
    pairs = () if mapping is None else pairs_of(mapping, teacher, student)
    return Computation(teacher, student, pairs, [objective])(batch, torch.Generator().manual_seed(0))


def states(model, at, batch):
    return run(model, inputs_of(model, batch), [at]).activations[at]


def test_cosine_is_that_of_the_last_hidden_states_over_real_tokens():
    teacher, student = couple()
    batch = text(6).batch(range(6))
    distance = 1 - functional.cosine_similarity(
        states(teacher, Location(3), batch), states(student, Location(1), batch), dim=-1
    )
    real = batch["attention_mask"].bool()
    value = terms(teacher, student, Cosine(), batch)["cosine"].item()
    assert value == pytest.approx(distance[real].mean().item(), rel=1e-5)
    assert value != pytest.approx(distance.mean().item(), rel=1e-4)
    elsewhere = terms(teacher, student, Cosine(Location(0)), batch)["cosine"].item()
    assert elsewhere != pytest.approx(value, rel=1e-4)


def test_cosine_of_a_model_with_itself_is_0_and_of_its_negative_2():
    teacher = spread(bert(2))
    batch = text(4).batch(range(4))
    assert terms(teacher, teacher, Cosine(), batch)["cosine"].item() == pytest.approx(0, abs=1e-6)


def test_cosine_at_other_places():
    """Dims are the last axis of vectors, wherever the module keeps them: channels of a feature map are in the "
    "second."""
    teacher, student = spread(CNN()), spread(CNN(), 1)
    batch = images(3).batch(range(3))
    at = Location(module="conv1")
    a, b = (states(model, at, batch) for model in (teacher, student))
    expected = (1 - functional.cosine_similarity(a, b, dim=1)).mean().item()
    assert terms(teacher, student, Cosine(at), batch)["cosine"].item() == pytest.approx(expected, rel=1e-5)


def test_pkd_by_hand():
    teacher, student = couple()
    batch = text(6).batch(range(6))
    chosen = {Location(1): Location(0), Location(2): Location(1)}
    value = terms(teacher, student, PKD(chosen), batch)["pkd"].item()
    total = 0.0
    for above, below in chosen.items():
        a, b = states(teacher, above, batch)[:, 0], states(student, below, batch)[:, 0]
        total += ((a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)) ** 2).mean().item()
    assert value == pytest.approx(total / 2, rel=1e-5)


def test_pkd_takes_the_last_teacher_layer_of_each_pair_below_the_last():
    teacher, student = couple()
    batch = text(6).batch(range(6))
    mapping = layers(teacher, student, "full")
    value = terms(teacher, student, PKD(), batch, mapping)["pkd"].item()
    assert value == pytest.approx(
        terms(teacher, student, PKD({Location(1): Location(0)}), batch)["pkd"].item(), rel=1e-6
    )


def test_features_of_counterfactual_runs_are_those_after_the_write():
    teacher, student = couple()
    batch = text(6).batch(range(6))
    at = {Location(2): Location(1)}
    together = DIITO(match=[Cosine(), PKD(at)])
    found = terms(teacher, student, together, batch, {Location(1): Location(0)})
    base = {**terms(teacher, student, Cosine(), batch), **terms(teacher, student, PKD(at), batch)}
    assert list(found) == ["cosine_cf", "pkd_cf"]
    for name, value in base.items():
        assert found[f"{name}_cf"].item() != pytest.approx(value.item(), rel=1e-4)
    found["cosine_cf"].backward()
    assert student.bert.encoder.layer[0].output.dense.weight.grad.norm() > 0


def test_different_widths_are_refused():
    teacher, student = spread(bert(2)), spread(bert(2, width=8))
    batch = text(4).batch(range(4))
    with pytest.raises(DistillError, match="needs the same width on both sides"):
        terms(teacher, student, Cosine(), batch)
    with pytest.raises(DistillError, match="needs the same width on both sides"):
        terms(teacher, student, PKD({Location(0): Location(0)}), batch)


def test_a_place_that_does_not_exist():
    from interventions import InterventionError

    with pytest.raises(InterventionError, match="needs blocks and this LSTM has none"):
        terms(spread(LSTM()), spread(LSTM(), 1), Cosine(), text(4, 5, 5).batch(range(4)))


def test_pictures():
    teacher, student = spread(vit(3)), spread(vit(2), 1)
    found = Computation(teacher, student, (), [KD(), Cosine()])(images(4).batch(range(4)), torch.Generator())
    assert 0 < found["cosine"].item() < 2


def test_pkd_without_anything_to_compare():
    teacher, student = couple()
    with pytest.raises(
        DistillError, match=r"PKD\(\) compares the layers of a mapping and there is none below the last; give PKD\(\{"
    ):
        terms(teacher, student, PKD(), text(4).batch(range(4)))
