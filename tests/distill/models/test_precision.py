"""Weights that were loaded in half precision are trained as in float32, and nothing else about a model changes."""

import copy
import json
import warnings
from itertools import islice

import pytest
import torch
from torch import nn

import distill
from distill import DistillError, Rows, Schedule
from distill.models.precision import upcast
from interventions import Location
from tests.distill.test_matrix import FAMILIES, MAPS, MODELS
from tests.distill.tiny_models import (
    CNN,
    QUIET,
    bert,
    gpt2,
    gpt2_lm,
    images,
    llama,
    masked_lm,
    same,
    spread,
    t5,
    text,
    vit,
)
from tests.distill.tiny_models import weights as states
from tests.distill.wired import Wired

SAID = "trained in float32, and handed back and saved so"
SHORT = Schedule(steps=3, batch_size=4)
KINDS = {"bert": bert, "gpt2": gpt2, "gpt2 lm": gpt2_lm, "llama": llama, "masked": masked_lm, "t5": t5, "vit": vit}


def data_of(kind: str) -> Rows:
    if kind == "vit":
        return images(8)
    rows = text(8, labels=kind in ("bert", "gpt2"))
    return Rows({**rows.table, "decoder_input_ids": rows.table["input_ids"]}) if kind == "t5" else rows


def moved(before: dict, after: dict) -> float:
    pairs = [(before[name].float(), after[name].float()) for name in before if before[name].is_floating_point()]
    return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, torch.bfloat16) for kind in KINDS), ("bert", torch.float16)])
def test_half_weights_train_as_the_same_in_float32(kind, dtype):
    """Bit for bit, at the default learning rate; nearly all weights move, and none of the teacher."""
    teacher, half = spread(KINDS[kind](2)).to(dtype), spread(KINDS[kind](2), 1).to(dtype)
    whole, before, theirs = copy.deepcopy(half).float(), states(half), states(teacher)
    with pytest.warns(UserWarning, match=SAID):
        found = list(distill.steps(teacher, half, data=data_of(kind), objective=distill.KD(), schedule=SHORT))
    wanted = list(distill.steps(teacher, whole, data=data_of(kind), objective=distill.KD(), schedule=SHORT))
    assert found == wanted
    assert same(states(half), states(whole))
    assert moved(before, states(half)) > 0.5  # pixels and words that no row has get no gradient
    assert same(states(teacher), theirs)
    assert {p.dtype for p in half.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *(("classifier", name) for name in FAMILIES["classifier"]),
        *(("images", name) for name in FAMILIES["images"] if name != "DKD"),
        ("causal", "CausalLM"),
        ("masked", "MaskedLM"),
    ],
)
def test_each_objective_takes_a_half_teacher_and_a_half_student(family, name):
    make_teacher, make_student, data = MODELS[family]
    teacher, half = spread(make_teacher()).bfloat16(), spread(make_student(), 1).bfloat16()
    whole, mapping = copy.deepcopy(half).float(), MAPS if family == "images" else None
    found = []
    for student in (half, whole):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            training = distill.steps(
                teacher, student, mapping, data(), objective=FAMILIES[family][name](), schedule=SHORT
            )
            found.append(list(training))
    assert found[0] == found[1]
    assert same(states(half), states(whole))


def test_as_loaded_trains_them_as_they_are():
    """What `Schedule(param_dtype='as loaded')` asks for: most weights stay where they were, and nothing is said."""
    teacher, student = spread(bert(2)).bfloat16(), spread(bert(2), 1).bfloat16()
    before = states(student)
    list(distill.steps(teacher, student, data=text(8), objective=distill.KD(),
                       schedule=Schedule(steps=3, batch_size=4, param_dtype="as loaded")))  # fmt: skip
    assert moved(before, states(student)) < 0.3
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    with pytest.raises(DistillError, match="param_dtype='fp32' is none of 'float32', 'as loaded'"):
        Schedule(param_dtype="fp32")


def test_what_fails_before_the_first_step_changes_nothing():
    teacher, student = spread(bert(2)).bfloat16(), spread(bert(2), 1).bfloat16()
    before = states(student)
    with pytest.warns(UserWarning, match=SAID), pytest.raises(DistillError, match="weights names 'nothing'"):
        list(distill.steps(teacher, student, data=text(8), objective=distill.KD(), weights={"nothing": 1.0}))
    assert same(before, states(student))
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}


def test_it_is_saved_and_resumed_in_float32(tmp_path):
    """A run that is stopped and goes on is that without a stop, from a half-precision model on both times."""
    teacher, first = spread(bert(3)).bfloat16(), spread(bert(2), 1).bfloat16()
    again, settings = copy.deepcopy(first), dict(objective=distill.KD(), steps=6, batch_size=4, console=QUIET)
    with pytest.warns(UserWarning, match=SAID):
        whole = distill.fit(teacher, first, {}, text(12), output_dir=tmp_path / "a", **settings)
    assert json.loads((tmp_path / "a/student/config.json").read_text())["dtype"] == "float32"
    loaded = type(first).from_pretrained(tmp_path / "a/student")
    assert same(states(loaded), states(first))
    checkpoints = distill.training.checkpoints.Checkpoints(tmp_path / "c", every=2)
    stopped = distill.steps(teacher, again, {}, text(12), objective=distill.KD(), checkpoints=checkpoints,
                            schedule=Schedule(steps=6, batch_size=4))  # fmt: skip
    with pytest.warns(UserWarning, match=SAID):
        assert [record.step for record in islice(stopped, 5)] == [1, 2, 3, 4, 5]
    stopped.close()
    fresh = spread(bert(2), 1).bfloat16()
    with pytest.warns(UserWarning, match=SAID):
        rest = list(
            distill.steps(
                teacher, fresh, {}, text(12), objective=distill.KD(), schedule=Schedule(steps=6, batch_size=4),
                checkpoints=distill.training.checkpoints.Checkpoints(tmp_path / "c", every=2, resume=True),
            )
        )  # fmt: skip
    assert rest == list(whole.records[-len(rest) :])
    assert same(states(fresh), states(first))


def test_networks_that_learn_together_and_chains():
    networks = [spread(bert(2), seed).bfloat16() for seed in range(3)]
    wholes = [copy.deepcopy(each).float() for each in networks]
    settings = dict(schedule=SHORT, console=QUIET)
    with pytest.warns(UserWarning, match=SAID):
        found = distill.mutual(networks[:2], text(8), **settings)
    wanted = distill.mutual(wholes[:2], text(8), **settings)
    assert [each.records for each in found] == [each.records for each in wanted]
    with pytest.warns(UserWarning, match=SAID):
        found = distill.chain([networks[0], networks[2]], data=text(8), objective=distill.KD(), **settings)
    wanted = distill.chain([wholes[0], wholes[2]], data=text(8), objective=distill.KD(), **settings)
    assert [each.records for each in found] == [each.records for each in wanted]


def test_a_causal_model_whose_numbers_are_half_as_the_network_was():
    """Interchange intervention training: what `encode` makes is put into the type of the weights."""
    model = distill.CausalModel(
        {"a": range(3), "b": range(3)}, {"inner": lambda a, b: (a + b) % 3, "y": lambda inner: inner}, "y",
        domains={"inner": range(3), "y": range(3)},
        encode=lambda v: nn.functional.one_hot(torch.stack([v["a"], v["b"]], 1), 3).flatten(1).bfloat16(),
    )  # fmt: skip
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).bfloat16()
    mapping = {"inner": Location(module="0", dims=range(4))}
    with pytest.warns(UserWarning, match=SAID):
        result = distill.fit(model, network, mapping, steps=2, batch_size=4, console=QUIET)
    assert result.evaluation.interchange is not None
    assert network[0].weight.dtype == torch.float32


def test_a_network_that_shares_frozen_weights_stays_and_says_so():
    teacher = spread(bert(2)).bfloat16()
    student = copy.deepcopy(teacher)
    student.bert.embeddings = teacher.bert.embeddings.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"weights \('.*', …\) are trained in bfloat16"):
        list(distill.steps(teacher, student, {}, text(8), objective=distill.KD(), schedule=SHORT))
    assert {p.dtype for p in (*teacher.parameters(), *student.parameters())} == {torch.bfloat16}


def test_adapters_alone_are_raised():
    """Below an adapter the frozen weights stay as they are, and what is trained beside it is named."""
    from peft import LoraConfig, get_peft_model

    teacher = spread(bert(2)).bfloat16()
    student = get_peft_model(
        copy.deepcopy(teacher), LoraConfig(target_modules=["query"], modules_to_save=["classifier"]),
        autocast_adapter_dtype=False,
    )  # fmt: skip
    with pytest.warns(UserWarning, match=SAID), pytest.warns(UserWarning, match=r"2 weights \("):
        list(distill.steps(teacher, student, {}, text(8), objective=distill.KD(), schedule=SHORT))
    types = {name: p.dtype for name, p in student.named_parameters()}
    assert {t for name, t in types.items() if "lora_" in name} == {torch.float32}
    assert {t for name, t in types.items() if "lora_" not in name} == {torch.bfloat16}


def test_weights_tied_in_a_network_stay_tied_and_wider_types_stay():
    tied = gpt2_lm(1).bfloat16()
    with pytest.warns(UserWarning, match=SAID), upcast(tied):
        pass
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert tied.lm_head.weight.dtype == torch.float32
    for network in (Wired().double(), CNN()):
        before = {p.dtype for p in network.parameters()}
        with upcast(network):
            assert {p.dtype for p in network.parameters()} == before


def test_half_pixels_meet_the_student_that_was_half():
    """Data in the type that both models were loaded in goes on to fit, and to measure."""
    rows = images(8)
    half = Rows({**rows.table, "pixel_values": rows.table["pixel_values"].bfloat16()})
    teacher, student = spread(CNN()).bfloat16(), spread(CNN(), 1).bfloat16()
    with pytest.warns(UserWarning, match=SAID):
        list(distill.steps(teacher, student, {}, half, objective=distill.KD(), schedule=SHORT))
    assert distill.metrics.accuracy(student, half).count == 8
    assert distill.metrics.accuracy(teacher, rows).count == 8
