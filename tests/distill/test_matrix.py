"""Every objective beside every other, on a tiny model, for two steps; and what cannot go together says so."""

from collections.abc import Callable, Iterator
from itertools import combinations

import pytest
import torch

import distill
from distill import DistillError, Objective, Rows, Schedule, objectives, steps
from interventions import Location
from tests.distill.tiny_models import CNN, bert, gpt2_lm, images, masked_lm, same, spread, text, weights
from tests.distill.words import Words

AT = Location(0)
MAPS = {Location(module="conv1"): Location(module="conv1")}
PATTERNS = {Location(1, "attention_pattern"): Location(0, "attention_pattern")}
EVERYWHERE: dict[str, Callable[[], Objective]] = {
    "KD": lambda: distill.KD(4.0, teacher_noise=distill.losses.LogitNoise(0.1)),
    "ICD": lambda: distill.ICD(8),
    "CRD": lambda: distill.CRD(8, 16),
    "Sobolev": distill.Sobolev,
}
CLASSIFIERS = {"Labels": lambda: distill.Labels(0.1), "DKD": lambda: distill.DKD(warmup=0), "BSS": distill.BSS}
LAYERED = {
    "DIITO": distill.DIITO,
    "Augmented": distill.Augmented,
    "Cosine": distill.Cosine,
    "PKD": lambda: distill.PKD({Location(1): AT}),
    "FitNets": distill.FitNets,
    "AT": lambda: distill.AT(PATTERNS),
    "TinyBERT": distill.TinyBERT,
}
FAMILIES = {
    "classifier": EVERYWHERE | CLASSIFIERS | LAYERED,
    "masked": EVERYWHERE | LAYERED | {
        "MaskedLM": lambda: distill.MaskedLM(Words()), "DistilBERT": lambda: distill.DistilBERT(Words())
    },
    "causal": EVERYWHERE | LAYERED | {"CausalLM": distill.CausalLM},
    "images": EVERYWHERE | CLASSIFIERS | {
        "FitNets": lambda: distill.FitNets(MAPS), "AT": lambda: distill.AT(MAPS),
        "DIITO": lambda: distill.DIITO(positions=None), "Cosine": lambda: distill.Cosine(Location(module="conv2")),
    },
}  # fmt: skip
MODELS = {
    "classifier": (lambda: bert(3), lambda: bert(2), lambda: text(8)),
    "masked": (lambda: masked_lm(3), lambda: masked_lm(2), lambda: text(8, labels=False)),
    "causal": (lambda: gpt2_lm(3), lambda: gpt2_lm(2), lambda: text(8, labels=False)),
    "images": (CNN, CNN, lambda: images(8)),
}
SHORT = Schedule(steps=2, batch_size=4, lr=1e-3)


TOGETHER = 4


def groups() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield some objectives of a family at a time, until every two of them were together."""
    for family, known in FAMILIES.items():
        left = list(combinations(known, 2))
        while left:
            chosen = {*left[0]}
            while len(chosen) < TOGETHER:
                others = [name for name in known if name not in chosen]
                chosen.add(max(others, key=lambda name: sum(len(chosen & {*two}) == 1 and name in two for two in left)))
            left = [two for two in left if not {*two} <= chosen]
            yield family, tuple(name for name in known if name in chosen)


def trained(family: str, names: tuple[str, ...]):
    teacher, student, data = MODELS[family]
    above, below = spread(teacher()), spread(student(), 1)
    mapping = MAPS if family == "images" else None
    chosen = [FAMILIES[family][name]() for name in names]
    before = weights(above), weights(below)
    records = list(steps(above, below, mapping, data(), objective=chosen, schedule=SHORT))
    assert same(before[0], weights(above))
    assert all(parameter.grad is None for parameter in above.parameters())
    assert not same(before[1], weights(below))
    return chosen, records, weights(below)


def test_every_two_objectives_are_together():
    found = {(family, two) for family, names in groups() for two in combinations(names, 2)}
    assert found == {(family, two) for family, known in FAMILIES.items() for two in combinations(known, 2)}


@pytest.mark.parametrize(
    ("family", "names"), [pytest.param(*each, id="-".join([each[0], *each[1]])) for each in groups()]
)
def test_objectives_in_one_training(family, names):
    chosen, records, _ = trained(family, names)
    expected = {term for each in chosen for term in each.about.terms}
    assert records[0].terms.keys() <= expected
    for each in chosen:
        assert records[0].terms.keys() & set(each.about.terms)
    assert len(records) == 2
    assert all(torch.tensor(list(record.terms.values())).isfinite().all() for record in records)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_of_them_together_in_parts_and_twice_alike(family):
    runs = [trained(family, tuple(FAMILIES[family])) for _ in range(2)]
    assert runs[0][1] == runs[1][1]
    assert same(runs[0][2], runs[1][2])


@pytest.mark.parametrize(("family", "name"), [(f, n) for f, known in FAMILIES.items() for n in known])
def test_each_in_bf16(family, name):
    """Mixed precision changes the terms a little; and their type not at all."""
    _, exact, _ = trained(family, (name,))
    with torch.autocast("cpu", torch.bfloat16):
        _, half, _ = trained(family, (name,))
    for term, value in exact[0].terms.items():
        assert half[0].terms[term] == pytest.approx(value, rel=0.2, abs=0.02), term


def test_every_objective_is_here_or_needs_a_causal_model():
    tried = {name for known in FAMILIES.values() for name in known}
    every = {
        name
        for name in objectives.__all__
        if isinstance(getattr(objectives, name), type) and issubclass(getattr(objectives, name), Objective)
    }
    assert every - tried == {"Objective", "IIT", "DAS"} | ({"SpanKD"} & every)


@pytest.mark.parametrize("name", ["IIT", "DAS"])
@pytest.mark.parametrize("other", [distill.KD, distill.DIITO])
def test_objectives_of_causal_models_say_so(name, other):
    """With networks as teachers; and those of networks with a causal model."""
    with pytest.raises(DistillError, match="learns from a causal model and the teacher is none"):
        list(steps(bert(2), bert(2), data=text(8), objective=[other(), getattr(distill, name)()], schedule=SHORT))
    model = distill.CausalModel(
        {"x": range(3)}, {"y": lambda x: x}, "y", encode=lambda v: v["x"][:, None].float(), domains={"y": range(3)}
    )
    network = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Linear(4, 3))
    with pytest.raises(DistillError, match="the teacher is a causal model; use objective=IIT|needs a mapping"):
        list(steps(model, network, objective=[getattr(distill, name)(), other()], schedule=SHORT))


def test_rows_of_labels_and_inputs_reach_every_objective_by_name():
    rows = Rows({"inputs": torch.randn(8, 6), "labels": torch.randint(3, (8,))})
    network = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    chosen = [FAMILIES["images"][name]() for name in ("KD", "ICD", "CRD", "Sobolev", "Labels", "DKD", "BSS")]
    student = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    records = list(steps(spread(network), spread(student), data=rows, objective=chosen, schedule=SHORT))
    assert len(records[0].terms) >= 9
