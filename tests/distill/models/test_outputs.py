"""`answers=` at every verb: a model whose output is wrapped is trained and measured as the one inside of it."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import distill
from distill import (
    DIITO,
    DKD,
    ICD,
    KD,
    PKD,
    Cosine,
    DistillError,
    Ensemble,
    FitNets,
    Labels,
    NoisyTeacher,
    Schedule,
    Served,
    Sobolev,
    Specialists,
)
from distill.causal.model import CausalModel
from distill.losses import LogitNoise
from interventions import Location, Rotation
from tests.distill.tiny_models import QUIET, bert, mlp, same, text, vectors, weights

SCHEDULE = Schedule(steps=2, batch_size=4, lr=0.01)
AT = Location(module="0", dims=range(4))


@dataclass
class Output:
    scores: Tensor
    other: Tensor


Pair = namedtuple("Pair", "scores other")


class Wrapped(nn.Sequential):
    """The layers of `mlp`, at the same paths, with an output of another kind."""

    def __init__(self, kind) -> None:
        super().__init__(*mlp())
        self.kind = kind

    def forward(self, inputs):
        logits = super().forward(inputs)
        return self.kind(logits, logits.detach()[:, :2] * 0)


# {kind: (how an output is made of logits and something else, what says where the logits are)}
KINDS = {
    "logits and None": (lambda logits, other: (logits, None), None),
    "logits and loss": (lambda logits, other: (logits, other.sum()), None),
    "a tuple": (lambda logits, other: (other, logits), 1),
    "a list": (lambda logits, other: [logits, other], 0),
    "a dict": (lambda logits, other: {"scores": logits, "other": other}, "scores"),
    "a dataclass": (Output, "scores"),
    "a named tuple": (Pair, "scores"),
    "a function": (lambda logits, other: ((other, logits), None), lambda output: output[0][1]),
}


def pair(kind) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    teacher, student = Wrapped(kind).eval(), Wrapped(kind).eval()
    return teacher, student


def plain() -> tuple[nn.Module, nn.Module]:
    return pair(lambda logits, other: logits)


def trained(teacher, student, objective, mapping={(AT,): AT}, **settings):  # noqa: B006
    data = vectors()
    return distill.fit(
        teacher, student, mapping, data, objective=objective, schedule=SCHEDULE, console=QUIET, **settings
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrapped_answer_is_trained_and_measured_as_the_answer(kind):
    make, answers = KINDS[kind]
    objectives = lambda: [KD(), Labels(), DKD(warmup=0), DIITO(), Sobolev()]  # noqa: E731
    ours, theirs = trained(*pair(make), objectives(), answers=answers), trained(*plain(), objectives())
    assert [record.terms for record in ours.records] == [record.terms for record in theirs.records]
    assert same(weights(ours.student), weights(theirs.student))


def test_fit_measures_the_answer():
    teacher, student = pair(KINDS["a tuple"][0])
    found = trained(teacher, student, KD(), answers=1, eval_data=vectors(), pairs=50).evaluation
    measured = distill.evaluate(teacher, student, {(AT,): AT}, vectors(), answers=1, pairs=50)
    assert found.accuracy is not None
    assert found.interchange is not None
    assert str(found) == str(measured)


def several(make, answers=None):
    """Each kind of model that reads the outputs of others, of models whose outputs are made by `make`."""
    (one, two), noise = pair(make), LogitNoise(0.5)
    three = nn.Linear(6, 3)
    yield "Ensemble", Ensemble([one, two], **answers_of("members", answers, 2))
    yield "NoisyTeacher", NoisyTeacher(one, noise, **answers_of("one", answers))
    yield "of an Ensemble", NoisyTeacher(Ensemble([one, two], **answers_of("members", answers, 2)), noise)
    rules = [answers, None] if answers is not None else None
    yield "Specialists", Specialists(one, {three: [0, 1]}, answers=rules)
    yield "Served", Served(one, answers=answers)
    yield "Served, top 2", Served(one, top_k=2, answers=answers)


def answers_of(kind, answers, count=1):
    return {} if answers is None else {"answers": [answers] * count if kind == "members" else answers}


COMBINED = [name for name, _ in several(lambda logits, other: logits)]


@pytest.mark.parametrize("name", COMBINED)
@pytest.mark.parametrize("kind", KINDS)
def test_models_that_read_others_read_them_as_they_are_told(kind, name):
    """At the model itself, where it is made; the student's output is read by what `fit` is told."""
    make, answers = KINDS[kind]
    found = [
        trained(dict(several(make, answers))[name], pair(make)[1], KD(), {}, answers={"student": answers}),
        trained(dict(several(lambda logits, other: logits))[name], plain()[1], KD(), {}),
    ]
    terms = [[record.terms for record in each.records] for each in found]
    assert terms[0] == terms[1]
    assert same(*(weights(each.student) for each in found))


@pytest.mark.parametrize("name", ["Ensemble", "NoisyTeacher", "of an Ensemble"])
@pytest.mark.parametrize("kind", ["a tuple", "a dict", "a function"])
def test_the_rule_of_a_verb_is_that_of_the_models_inside(kind, name):
    make, answers = KINDS[kind]
    wanted = trained(dict(several(lambda logits, other: logits))[name], plain()[1], KD(), {})
    for rule in (answers, {"teacher": answers, "student": answers}):
        found = trained(dict(several(make))[name], pair(make)[1], KD(), {}, answers=rule)
        assert [record.terms for record in found.records] == [record.terms for record in wanted.records]


def test_each_model_of_an_ensemble_has_its_own_rule():
    one, two = pair(KINDS["a tuple"][0])[0], pair(KINDS["a dict"][0])[1]
    wanted = distill.accuracy(Ensemble(plain()), vectors())
    assert str(distill.accuracy(Ensemble([one, two], answers=[1, "scores"]), vectors())) == str(wanted)
    assert str(distill.accuracy(Ensemble([one, two]), vectors(), answers=[[1, "scores"]])) == str(wanted)
    with pytest.raises(DistillError, match=r"answers has 3 rules for the 2 models of Ensemble; give one for each"):
        distill.accuracy(Ensemble([one, two], answers=[1, "scores", 0]), vectors())
    with pytest.raises(DistillError, match=r"of member 0 of Ensemble, which part of a tuple .* say which: answers=0"):
        distill.accuracy(Ensemble([one, two]), vectors())


def test_a_served_teacher_says_where_its_rule_is_given(tmp_path):
    make, answers = KINDS["a tuple"]
    teacher, student = pair(make)
    with pytest.raises(DistillError, match=r"say which: .*where it is served: Served\(model, answers=…\)"):
        trained(Served(teacher), student, KD(), {}, answers=answers)
    with pytest.raises(DistillError, match=r"leave that side out, .*, and give it to Served"):
        trained(Served(teacher), student, KD(), {}, answers=(1, 1))
    Served(teacher, answers=1, cache=tmp_path / "kept").fetch(vectors())
    with pytest.raises(DistillError, match="cache"):  # the other part of the output is another teacher's answer
        Served(teacher, answers=0, cache=tmp_path / "kept")


def measures(teacher, student, answers):
    """What each verb says of the models."""
    data, mapping = vectors(), {(AT,): AT}
    at = {AT: Location(module="0", subspace=Rotation(2))}
    yield distill.accuracy(student, data, answers=answers)
    yield distill.calibration(student, data, answers=answers)
    yield distill.evaluate(teacher, student, mapping, data, pairs=8, answers=answers)
    yield distill.interchange_accuracy(teacher, student, mapping, data, pairs=8, controls="network", answers=answers)
    yield distill.linear_probe(student, data, data, answers=answers)
    aligned = distill.align(teacher, student, at, data, steps=2, batch_size=4, pairs=8, console=QUIET, answers=answers)
    yield aligned.accuracy
    yield [each.terms for each in distill.steps(teacher, student, {}, data, objective=KD(), schedule=SCHEDULE,
                                                answers=answers)]  # fmt: skip
    yield distill.representations(student, data, "logits", answers=answers)
    settings = {"schedule": SCHEDULE, "console": QUIET, "answers": answers}
    yield [[r.terms for r in each.records] for each in distill.mutual([teacher, student], data, **settings)]
    chained = distill.chain([teacher, student], mapping={}, data=data, objective=KD(), **settings)
    yield [[r.terms for r in each.records] for each in chained]


@pytest.mark.parametrize("kind", ["a tuple", "a dict"])
def test_every_verb_takes_answers(kind):
    make, answers = KINDS[kind]
    for ours, theirs in zip(measures(*pair(make), answers), measures(*plain(), None), strict=True):
        assert str(ours) == str(theirs)


def test_each_side_has_its_own():
    (teacher, _), (_, student) = pair(KINDS["a tuple"][0]), plain()
    wanted = trained(*plain(), KD())
    for answers in ((1, None), {"teacher": 1}):
        found = trained(teacher, plain()[1], KD(), answers=answers)
        assert [r.terms for r in found.records] == [r.terms for r in wanted.records]
    with pytest.raises(DistillError, match=r"answers=1 asks for a part of an output that is a Tensor .*answers=\(0, N"):
        trained(teacher, student, KD(), answers=1)


@pytest.mark.parametrize(
    ("answers", "match"),
    [
        ((1, None, 2), r"answers has 3 rules for 2 models; give one for each"),
        ({"pupil": 1}, r"answers=\{'pupil': …\} names no side, or others than 'teacher' and 'student'"),
        (1.5, r"answers=1\.5 does not say what of an output is the answer"),
        ("nothing", r"answers='nothing' names no part of a tuple"),
    ],
)
def test_rules_that_cannot_be(answers, match):
    with pytest.raises(DistillError, match=match):
        trained(*pair(KINDS["a tuple"][0]), KD(), answers=answers)


def test_the_callers_loop_sees_no_rule():
    teacher, student = pair(KINDS["a tuple"][0])
    for _ in distill.steps(teacher, student, {}, vectors(), objective=KD(), schedule=SCHEDULE, answers=1):
        with pytest.raises(DistillError, match="answers=0"):
            distill.accuracy(student, vectors())


class Embeds(nn.Module):
    """As a sentence encoder: token embeddings and their mean, no logits."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = bert().bert

    def forward(self, input_ids, attention_mask):
        states = self.bert(input_ids, attention_mask).last_hidden_state
        return {"token_embeddings": states, "sentence_embedding": states.mean(1)}


@pytest.mark.parametrize("objective", [FitNets, PKD, Cosine, ICD], ids=lambda each: each.__name__)
@pytest.mark.parametrize("make", [lambda: bert().bert, Embeds], ids=["BertModel", "sentence encoder"])
def test_features_need_no_answer(make, objective):
    teacher, student = make().eval(), make().eval()
    before, chosen = weights(student), objective(at=Location(-1)) if objective is ICD else objective()
    mapping = {Location(1): Location(1), Location(-1): Location(-1)}
    result = distill.fit(teacher, student, mapping, text(), objective=chosen, schedule=SCHEDULE, eval_data=text(),
                         console=QUIET)  # fmt: skip
    assert not same(before, weights(student))
    assert "has no logits" in str(result.evaluation)
    with pytest.raises(DistillError, match=r"is the answer is not known; say which: answers="):
        distill.fit(teacher, student, {}, text(), objective=KD(), schedule=SCHEDULE, console=QUIET)


def test_a_network_under_a_causal_model():
    class Net(nn.Sequential):
        def forward(self, x):
            return x, super().forward(x)

    model = CausalModel(
        inputs={"a": range(2), "b": range(2)},
        mechanisms={"both": lambda a, b: a + b == 2, "answer": lambda both: both},
        output="answer",
        encode=lambda values: torch.stack([values["a"], values["b"]], 1).float(),
    )
    net = Net(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    mapping = {"both": Location(module="0", dims=range(4))}
    result = distill.fit(model, net, mapping, steps=2, batch_size=8, console=QUIET, answers=1)
    assert result.evaluation.accuracy is not None
    assert distill.interchange_accuracy(model, net, mapping, pairs=8, controls="network", answers=1).overall is not None
    assert distill.accuracy(net, model, values=model.sample(4, torch.Generator()), answers=1).count == 4
    for subspace in (None, lambda: Rotation(2)):
        asked = {"at": list(mapping.values()), "subspace": subspace, "steps": 2, "pairs": 50, "console": QUIET}
        plain = nn.Sequential(*net)
        found = distill.search_alignment(model, net, "both", answers=1, **asked)
        assert torch.equal(found.iia, distill.search_alignment(model, plain, "both", **asked).iia)


@pytest.mark.parametrize("seed", ["0", float("nan"), 1.5, True, None, 2**70])
def test_a_seed_is_a_whole_number(seed):
    for call in (
        lambda: Schedule(seed=seed),
        lambda: distill.interchange_accuracy(mlp().eval(), mlp().eval(), {AT: AT}, vectors(), pairs=4, seed=seed),
        lambda: distill.evaluate(None, mlp().eval(), None, vectors(), seed=seed),
        lambda: distill.align(mlp(), mlp(), {AT: AT}, vectors(), seed=seed),
    ):
        with pytest.raises(DistillError, match=r"is no whole number that 64 bits hold; use e\.g\. seed=0"):
            call()
    if seed is not None:
        with pytest.raises(DistillError, match="is no whole number"):
            distill.fit(mlp(), mlp(), {}, vectors(), objective=KD(), steps=1, seed=seed, console=QUIET)


def test_models_that_are_wrapped_by_torch_compile_are_looked_through():
    teacher, student = bert(2).eval(), bert(2)
    before = weights(student)
    compiled = torch.compile(student, backend="eager")
    result = distill.fit(torch.compile(teacher, backend="eager"), compiled, "full", text(), objective=[KD(), DIITO()],
                         schedule=SCHEDULE, console=QUIET)  # fmt: skip
    assert result.student is student
    assert not same(before, weights(student))
    assert distill.accuracy(torch.compile(teacher), text()).count == len(text())
    assert distill.from_layers(torch.compile(teacher), 1).config.num_hidden_layers == 1
    assert distill.from_width(torch.compile(teacher), 8).config.hidden_size == 8
    assert type(distill.reinitialized(torch.compile(teacher))) is type(teacher)
    with pytest.raises(DistillError, match=r"torch\.compile\(module\), .*compile in place with model\.compile\(\)"):
        next(distill.steps(distill.Served(torch.compile(teacher)), student, data=text(), objective=KD()))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("verb", ["fit", "steps"])
def test_compiled_models_are_trained_compiled_by_kd(verb, in_place):
    """Both run compiled in every step, and the student becomes what it becomes without; then all is as it was."""
    torch._dynamo.reset()
    calls = []

    def counting(graph, example):
        return lambda *args: (calls.append(1), graph(*args))[1]

    teacher, student, expected = bert(2).eval(), bert(2), bert(2)
    expected.load_state_dict(student.state_dict())
    torch.nn.init.normal_(teacher.classifier.weight, generator=torch.Generator().manual_seed(1))
    distill.fit(teacher, expected, {}, text(), objective=KD(), schedule=SCHEDULE, console=QUIET)
    given = []
    for model in (teacher, student):
        if in_place:
            model.compile(backend=counting)
        given.append(model if in_place else torch.compile(model, backend=counting))
    before = [vars(model).get("_compiled_call_impl") for model in (teacher, student)]
    if verb == "fit":
        distill.fit(*given, {}, text(), objective=KD(), schedule=SCHEDULE, console=QUIET)
    else:
        list(distill.steps(*given, {}, text(), objective=KD(), schedule=SCHEDULE))
    assert len(calls) >= 2 * SCHEDULE.steps
    assert same(weights(student), weights(expected))
    assert [vars(model).get("_compiled_call_impl") for model in (teacher, student)] == before


def test_adapters_are_trained_alone_and_not_cut():
    from peft import LoraConfig, get_peft_model

    student = get_peft_model(bert(2), LoraConfig(r=2, target_modules=["query", "value"]))
    before = weights(student)
    distill.fit(bert(2), student, "full", text(), objective=[KD(), DIITO()], schedule=SCHEDULE, console=QUIET)
    changed = {name for name, value in weights(student).items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    for cut in (distill.from_layers, distill.from_width):
        with pytest.raises(DistillError, match=r"adapters hold a part of .*; merge them first: .*merge_and_unload\(\)"):
            cut(student, 8 if cut is distill.from_width else 1)


@pytest.mark.parametrize("path", ["bert", "bert.encoder.layer.0"])
def test_models_with_compiled_parts_are_not_cut(path):
    model = bert(2)
    model.set_submodule(path, torch.compile(model.get_submodule(path), backend="eager"))
    for cut in (distill.from_layers, distill.from_width):
        with pytest.raises(
            DistillError, match=rf"{path} of this \w+ went through torch\.compile.*set_submodule\('{path}'"
        ):
            cut(model, 8 if cut is distill.from_width else 1)


@pytest.mark.filterwarnings("ignore")
def test_quantized_models_are_not_cut():
    quantized = torch.ao.quantization.quantize_dynamic(bert(2), {nn.Linear}, dtype=torch.qint8)
    named = bert(2)
    named.config.quantization_config = {"load_in_8bit": True}
    for model in (quantized, named):
        for cut in (distill.from_layers, distill.from_width):
            with pytest.raises(DistillError, match=r"are quantized \(\w+\); take them from the model as it was: from_"):
                cut(model, 8 if cut is distill.from_width else 1)
