import pytest
import torch
from torch.nn import functional

from distill import AT, DIITO, KD, PKD, Cosine, DistillError, FitNets, Schedule, layer_mapping, steps
from distill.interchange.mapping import entries_of
from distill.losses import attention_transfer
from distill.models.inputs import inputs_of
from distill.tasks import Rows
from distill.training.computation import Computation
from interventions import Location, run
from tests.distill.tiny_models import CNN, LSTM, bert, gpt2, images, llama, mlp, spread, t5, text, vectors, vit

SHORT = Schedule(steps=2, batch_size=6)


def couple():
    return spread(bert(4)), spread(bert(2), 1)


def terms(teacher, student, objective, batch, mapping=None):
    pairs = () if mapping is None else entries_of(mapping, teacher, student)
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
    mapping = layer_mapping(teacher, student, "full")
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


# --- FitNets ----------------------------------------------------------------------------------------------------------


def prepared(teacher, student, objective, batch, mapping=None):
    pairs = () if mapping is None else entries_of(mapping, teacher, student)
    computation = Computation(teacher, student, pairs, [objective])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        computation.prepare(batch, torch.Generator(), Rows(dict(batch)))
    return computation


def value_of(computation, batch):
    (value,) = computation(batch, torch.Generator().manual_seed(0)).values()
    return value.item()


def test_hint_of_equal_widths_by_hand():
    teacher, student = couple()
    batch = text(6).batch(range(6))
    real = batch["attention_mask"].bool()
    a, b = states(teacher, Location(1), batch)[real], states(student, Location(0), batch)[real]
    objective = FitNets({Location(1): Location(0)})
    assert value_of(prepared(teacher, student, objective, batch), batch) == pytest.approx(
        (a - b).square().mean().item(), rel=1e-5
    )
    assert not list(objective.parameters())
    assert objective.weights == {"hint": 100.0}


def test_hint_is_taken_at_the_middle_where_nobody_says_where():
    teacher, student = couple()
    batch = text(6).batch(range(6))
    middle = prepared(teacher, student, FitNets(), batch)
    told = prepared(teacher, student, FitNets({Location(2): Location(1)}), batch)
    assert value_of(middle, batch) == value_of(told, batch)


def test_hint_behind_a_regressor():
    teacher, student = spread(bert(4)), spread(bert(2, width=8), 1)
    batch = text(6).batch(range(6))
    objective = FitNets({Location(1): Location(0), Location(3): Location(1)})
    computation = prepared(teacher, student, objective, batch)
    real = batch["attention_mask"].bool()
    expected = 0.0
    for (above, below), regressor in zip(objective.layers.items(), objective.regressors.values(), strict=True):
        assert regressor.weight.shape == (16, 8)
        a, b = states(teacher, above, batch)[real], states(student, below, batch)[real]
        expected += (regressor(b) - a).square().mean().item()
    assert value_of(computation, batch) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("channels", [(6, 6), (6, 3)])
def test_hints_of_feature_maps_of_other_sizes(channels):
    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(1, channels[1], 3, stride=2, padding=1)
            self.fc = torch.nn.Linear(channels[1], 3)

        def forward(self, pixel_values):
            return self.fc(self.conv(pixel_values).mean((2, 3)))

    teacher, student = spread(CNN()), spread(Small(), 1)
    batch = images(3).batch(range(3))
    above, below = Location(module="conv1"), Location(module="conv")
    objective = FitNets({above: below})
    found = value_of(prepared(teacher, student, objective, batch), batch)
    a, b = states(teacher, above, batch), states(student, below, batch)
    assert a.shape[2:] == (8, 8)
    assert b.shape[2:] == (4, 4)
    (regressor,) = objective.regressors.values()
    a, b = functional.avg_pool2d(a, 2).permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    assert found == pytest.approx((regressor(b) - a).square().mean().item(), rel=1e-5)


def test_regressors_learn_with_the_student_at_their_own_rate():
    teacher, moved = spread(mlp(8)), {}
    places = {Location(module="2"): Location(module="2")}
    for rate in (None, 0.1):
        objective, student = FitNets(places, lr=rate), spread(mlp(4), 1)
        starts = []
        for _ in steps(teacher, student, data=vectors(), objective=objective, schedule=SHORT):
            starts.append(next(iter(objective.regressors.values())).weight.detach().clone())
        moved[rate] = (starts[1] - starts[0]).abs().max().item()
    assert moved[0.1] > 100 * moved[None] > 0


def test_a_regressor_of_ones_own_is_kept():
    own = torch.nn.Linear(4, 8)
    before = own.weight.detach().clone()
    objective = FitNets({Location(module="2"): Location(module="2")}, regressors={Location(module="2"): own})
    list(steps(spread(mlp(8)), spread(mlp(4), 1), data=vectors(), objective=objective, schedule=SHORT))
    assert next(iter(objective.regressors.values())) is own
    assert not torch.equal(before, own.weight)


def test_features_of_other_positions_are_refused():
    objective = FitNets({Location(1): Location(module="conv1")})
    with pytest.raises(DistillError, match=r"FitNets compares module:conv1 of the student.*choose places of the same"):
        prepared(spread(vit(4)), spread(CNN(), 1), objective, images(3).batch([0]))


# --- attention transfer -----------------------------------------------------------------------------------------------


def test_attention_transfer_of_feature_maps():
    teacher, student = spread(CNN()), spread(CNN(), 1)
    batch = images(3).batch(range(3))
    places = {Location(module="conv1"): Location(module="conv1"), Location(module="conv2"): Location(module="conv2")}
    expected = sum(
        attention_transfer(states(student, below, batch), states(teacher, above, batch)).item()
        for above, below in places.items()
    )
    assert value_of(prepared(teacher, student, AT(places), batch), batch) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("make", [bert, gpt2])
def test_attention_transfer_of_patterns_is_that_of_the_mapping_and_knows_padding(make):
    teacher, student = spread(make(4)), spread(make(2), 1)
    batch = text(5, labels=False).batch(range(5))
    mapping = layer_mapping(teacher, student, "full")
    found = value_of(prepared(teacher, student, AT(), batch, mapping), batch)
    expected = 0.0
    for above, below in ((1, 0), (3, 1)):
        a = states(teacher, Location(above, "attention_pattern"), batch)
        b = states(student, Location(below, "attention_pattern"), batch)
        each = []
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            q = [m[row, :, :length, :length].square().sum(0).flatten() for m in (a, b)]
            each.append((q[0] / q[0].norm() - q[1] / q[1].norm()).square().mean().item())
        expected += sum(each) / len(each)
    assert found == pytest.approx(expected, rel=1e-4)
    wider = {name: functional.pad(c, (0, 3), value=int(name[0] == "s")) for name, c in batch.items()}
    assert value_of(prepared(teacher, student, AT(), wider, mapping), wider) == pytest.approx(found, rel=1e-4)


def test_attention_transfer_without_a_place():
    with pytest.raises(DistillError, match=r"AT\(\) compares the attention of the layers of a mapping and there"):
        terms(*couple(), AT(), text(4).batch(range(4)))


@pytest.mark.parametrize("objective", [FitNets, AT, Cosine, lambda: PKD({Location(1): Location(0)})])
def test_features_under_autocast(objective):
    teacher, student = couple()
    batch = text(6).batch(range(6))
    mapping = layer_mapping(teacher, student, "full")
    exact = value_of(prepared(teacher, student, objective(), batch, mapping), batch)
    with torch.autocast("cpu", torch.bfloat16):
        (value,) = prepared(teacher, student, objective(), batch, mapping)(batch, torch.Generator()).values()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("make", [bert, gpt2, llama, t5])
def test_cosine_is_of_the_last_hidden_states(make):
    """What transformers returns last: behind the final norm where there is one."""
    teacher, student = spread(make(3)), spread(make(2), 1)
    batch = text(4, labels=False).batch(range(4))
    if make is t5:
        batch |= {"decoder_input_ids": batch["input_ids"], "decoder_attention_mask": batch["attention_mask"]}
    computation = Computation(teacher, student, (), [Cosine()])
    computation.prepare(batch, torch.Generator(), Rows(dict(batch)))
    name = "decoder_hidden_states" if make is t5 else "hidden_states"
    with torch.no_grad():
        last = [m(**inputs_of(m, batch), output_hidden_states=True)[name][-1] for m in (teacher, student)]
    real = batch["attention_mask"].bool()
    expected = (1 - functional.cosine_similarity(*last, dim=-1))[real].mean().item()
    assert computation(batch, torch.Generator())["cosine"].item() == pytest.approx(expected, rel=1e-5)
    before = Computation(teacher, student, (), [Cosine(Location(-1))])(batch, torch.Generator())["cosine"].item()
    assert (before == pytest.approx(expected, rel=1e-5)) == (make is bert)
