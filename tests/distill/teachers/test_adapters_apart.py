"""Every verb that takes several models knows the base of one's adapters, which answers without them."""

import copy
import inspect

import pytest
from torch import nn

import distill
from distill import DIITO, KD, DistillError, Schedule
from distill.losses import LogitNoise
from distill.models import head
from distill.teachers.without_adapters import WithoutAdapters, apart, teacher_and_student
from distill.training.step_times import step_ratio
from tests.distill.storage.test_adapters import adapted, loaded
from tests.distill.tiny_models import QUIET, bert, gpt2_lm, llama, spread, text
from tests.distill.writing.words import prompts

pytestmark = pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*", "ignore:.*untrained.*")
SETTINGS = {"schedule": Schedule(steps=3, batch_size=4, lr=0.05), "console": QUIET}
SEVERAL = {"teacher", "student", "students", "original", "compressed", "networks"}
"""The names of arguments that are models; a verb with two of them, or with `networks`, takes several."""
OTHERS = {
    "FitResult": "holds a student",
    "ComparedFigure": "holds a name",
    "TokenAlignment": "holds tokens",
    "layer_mapping": "counts layers",
}


def losses(*results):
    return [record.loss for each in results for record in each.records]


def counted_ratio(teacher, student, rows):
    """The ratio of two trainings, on a clock that counts the calls of it, with what the teacher answers in them."""
    answers, ticks = [], iter(range(1000))

    class Watched(KD):
        def forward(self, step):
            answers.append(float(step.teacher.logits.double().square().sum()))
            return super().forward(step)

    settings = {"one": Watched(), "other": Watched(), "schedule": SETTINGS["schedule"], "steps": 2}
    step_ratio(teacher, student, None, rows, clock=lambda: next(ticks), **settings)
    return answers


VERBS = {
    "fit": lambda t, s, rows: losses(distill.fit(t, s, "full", rows, objective=[KD(), DIITO()], **SETTINGS)),
    "steps": lambda t, s, rows: [
        each.loss for each in distill.steps(t, s, data=rows, objective=KD(), schedule=SETTINGS["schedule"])
    ],
    "chain": lambda t, s, rows: losses(
        *distill.chain([t, s, spread(type_of(t)(2), 1)], data=rows, objective=KD(), **SETTINGS)
    ),
    "evaluate": lambda t, s, rows: distill.evaluate(t, s, "full", rows, pairs=20).to_dict(),
    "interchange_accuracy": lambda t, s, rows: distill.interchange_accuracy(t, s, "full", rows, pairs=20).to_dict(),
    "headroom": lambda t, s, rows: distill.headroom(t, s, rows, "full", steps=3, batches=2, batch_size=4).to_dict(),
    "search_mapping": lambda t, s, rows: distill.search_mapping(t, s, rows, pairs=20).to_dict(),
    "audit": lambda t, s, rows: distill.audit(t, s, rows, kinds=[], examples=4).to_dict(),
    "compare": lambda t, s, rows: distill.compare(
        t, {"one": s, "other": spread(type_of(t)(3), 1)}, "full", rows, pairs=20
    ).to_dict(),
    "compare students": lambda t, s, rows: distill.compare(
        spread(type_of(t)(3), 1), {"one": s, "other": t}, "full", rows, pairs=20
    ).to_dict(),
    "step_ratio": counted_ratio,
    "written": lambda t, s, rows: losses(
        distill.fit(t, s, {}, distill.Written(prompts(), by="teacher", max_new_tokens=6), objective=KD(), **SETTINGS)
    ),
}
ONE = {"mutual": lambda t, s: distill.mutual([t, s], text(12), own=[], **SETTINGS)}
"""Verbs that refuse such models."""


def type_of(model):
    return {"bert": bert, "gpt2": gpt2_lm, "llama": llama}[model.config.model_type]


def shared_and_apart(make) -> tuple[tuple[nn.Module, nn.Module], tuple[nn.Module, nn.Module]]:
    """A base and a student made of it with adapters that change its answers; the same beside a base of its own."""
    alone, base = spread(make(3)), spread(make(3))
    return (base, adapted(base, make)), (alone, adapted(copy.deepcopy(alone), make))


MAKES = (gpt2_lm, llama, bert)
CELLS = [
    pytest.param(
        verb, llama if verb == "written" else MAKES[number % 3], marks=[] if number in (0, 1) else pytest.mark.full
    )
    for number, verb in enumerate(sorted(VERBS, key=lambda each: each not in ("steps", "evaluate")))
]


@pytest.mark.parametrize(("verb", "make"), CELLS)
def test_a_verb_gives_what_it_gives_beside_a_copy_of_the_base(verb, make):
    rows = text(12, labels=make is bert)
    shared, own = shared_and_apart(make)
    wanted = VERBS[verb](*own, rows)
    assert VERBS[verb](*shared, rows) == wanted
    with_adapters = (adapted(spread(make(3)), make), shared_and_apart(make)[1][1])
    if verb == "chain":
        with_adapters[0].config.model_type = own[0].config.model_type
    assert VERBS[verb](*with_adapters, rows) != wanted, "a teacher with the adapters would not be seen"


def test_all_verbs_of_several_models_are_there():
    """A new verb has to be in the law above, or in the list of those that have no such models."""
    found = set()
    for name in distill.__all__:
        value = getattr(distill, name)
        if inspect.isfunction(value) or getattr(value, "__dataclass_fields__", None):
            names = SEVERAL & set(inspect.signature(value).parameters)
            if len(names) > 1 or names & {"networks", "students"}:
                found.add(name)
    found.add("step_ratio")
    known = {each.split()[0] for each in VERBS} - {"written"} | set(ONE)
    assert found - set(OTHERS) == known


@pytest.mark.parametrize("verb", ONE)
def test_verbs_that_train_both_refuse(verb):
    (base, student), _ = shared_and_apart(llama)
    with pytest.raises(DistillError, match=rf"networks 0 and 1 of {verb} have adapters on one base, .*copy.deepcopy"):
        ONE[verb](base, student)


def test_a_chain_beside_its_first_step():
    (base, student), _ = shared_and_apart(llama)
    other = spread(llama(3), 1)
    for networks, pair in (([other, base, student], "1 and 2"), ([base, other, student], "0 and 2")):
        with pytest.raises(DistillError, match=f"networks {pair} of chain have adapters on one base"):
            distill.chain(networks, data=text(12), **SETTINGS)


HIDDEN = {
    "ensemble": lambda base: distill.Ensemble([base, spread(llama(2))]),
    "noise": lambda base: distill.NoisyTeacher(base, LogitNoise(1.0)),
    "served": distill.Served,
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_a_teacher_that_holds_the_base_is_refused(kind):
    (base, student), _ = shared_and_apart(llama)
    teacher = HIDDEN[kind](base)
    with pytest.raises(DistillError, match=r"hold the same adapters, so .* give the base itself as teacher, or"):
        distill.evaluate(teacher, student, None, text(8, labels=False))


def test_what_cannot_be_told_apart():
    (base, student), _ = shared_and_apart(llama)
    with pytest.raises(DistillError, match="the student is the base of the teacher's adapters"):
        distill.evaluate(student, base, None, text(8, labels=False))
    with pytest.warns(UserWarning, match="multiple adapters|second time"):
        again = adapted(base, llama)
    with pytest.raises(DistillError, match="student 'a' .* and student 'b' .* hold the same adapters"):
        distill.compare(spread(llama(3), 1), {"a": student, "b": again}, "full", text(8, labels=False), pairs=5)


def test_students_with_noise_and_models_without_shared_adapters():
    (base, student), (alone, other) = shared_and_apart(llama)
    found = teacher_and_student(base, distill.NoisyTeacher(student, LogitNoise(1.0)))
    assert isinstance(found[0], WithoutAdapters)
    for given in ([alone, student], [None, student], [student, other], [alone, other, student]):
        assert all(one is two for one, two in zip(apart(given), given, strict=True))
    given = [alone, student, student]  # as a control
    assert all(one is two for one, two in zip(apart(given), given, strict=True))


def test_answers_are_kept_for_later_runs(tmp_path):
    """A cache knows its teacher, whatever the adapters have learned since."""
    base = loaded(llama, tmp_path / "teacher")
    student = adapted(base, llama)
    rows = text(12, labels=False)
    settings = {"objective": KD(), "batch_size": 4, "lr": 0.05, "console": QUIET, "cache": tmp_path / "answers"}
    calls = []
    base.register_forward_hook(
        lambda module, *_: calls.append(module.model.layers[0].self_attn.q_proj.disable_adapters)
    )
    distill.fit(base, student, None, rows, epochs=1, output_dir=tmp_path / "run", **settings)
    assert sum(calls) >= 3
    calls.clear()
    distill.fit(base, student, None, rows, epochs=1, **settings)
    assert sum(calls) <= 1  # to compare one kept answer


def test_the_head_of_the_teacher(monkeypatch):
    """A run ends before the head only where that has no adapters, which would be on outside of the model's call."""
    from peft import LoraConfig, get_peft_model

    monkeypatch.setattr(head, "LARGE", 1)
    rows = text(12, labels=False)
    for target in ("q_proj", "lm_head"):
        alone, base = spread(llama(3)), spread(llama(3))
        own, shared = (
            get_peft_model(
                each, LoraConfig(r=2, target_modules=[target], init_lora_weights=False, modules_to_save=None)
            )
            for each in (copy.deepcopy(alone), base)
        )
        shared.load_state_dict(own.state_dict())
        wanted = losses(distill.fit(alone, own, {}, rows, objective=KD(), **SETTINGS))
        assert losses(distill.fit(base, shared, {}, rows, objective=KD(), **SETTINGS)) == pytest.approx(
            wanted, rel=1e-5
        )
        whole, _ = teacher_and_student(base, shared)
        assert (head._head_module(whole) is None) == (target == "lm_head")
