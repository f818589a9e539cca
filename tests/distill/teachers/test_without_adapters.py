"""A student that is its teacher with adapters: trained as beside a second copy of the teacher, without one."""

import copy

import pytest
import torch
from torch import nn

from distill import DIITO, KD, DistillError, Schedule, evaluate, fit, from_layers, interchange_accuracy, steps
from distill.models.pretrained import load_model
from distill.teachers.without_adapters import WithoutAdapters, teacher_and_student
from distill.training.checkpoints import Checkpoints
from tests.distill.storage.test_adapters import MODULES, adapted, difference, loaded
from tests.distill.tiny_models import QUIET, bert, gpt2_lm, llama, same, spread, text, weights

pytestmark = pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*")
SHORT = Schedule(steps=6, batch_size=4, lr=0.05)
SCHEDULE = Schedule(steps=4, batch_size=4, lr=0.05)
OWN = {"lora_A", "lora_B", "modules_to_save"}
"""The names of what is the student's alone."""
OBJECTIVES = {"kd": lambda: [KD()], "diito": lambda: [KD(), DIITO()]}


def pair(make, dropout: float = 0.0) -> tuple[nn.Module, nn.Module]:
    """A teacher, and a student made of it with adapters that already change its answers."""
    settings = {"dropout": dropout} if dropout else {}
    teacher = spread(make(3, **settings))
    return teacher, adapted(teacher, make)


def trained(teacher, student, make, objective, **settings) -> list:
    given = {"schedule": SCHEDULE, "objective": OBJECTIVES[objective]()}
    rows = text(12, labels=make is bert)
    return [
        each.loss for each in steps(teacher, student, None if objective == "diito" else {}, rows, **given | settings)
    ]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("make", MODULES)
@pytest.mark.parametrize("given", ["base", "student"])
def test_the_training_is_that_beside_a_copy_of_the_teacher(make, objective, given):
    """The same losses and weights; the teacher answers as before, and holds no memory of its own."""
    alone = spread(make(3))
    teacher, student = pair(make)
    rows = text(8, labels=False)
    apart = adapted(copy.deepcopy(alone), make)
    before = {name: each.clone() for name, each in teacher.named_parameters() if OWN.isdisjoint(name.split("."))}
    wanted = trained(alone, apart, make, objective)
    found = trained(teacher if given == "base" else student, student, make, objective)
    assert found == wanted
    assert same(weights(student), weights(apart))
    for name, each in teacher.named_parameters():
        assert name not in before or torch.equal(each, before[name])
    whole, _ = teacher_and_student(teacher, student)
    assert isinstance(whole, WithoutAdapters)
    assert difference(whole, alone) == 0
    assert difference(student, alone) > 0.01
    together = {each.data_ptr(): each.nbytes for each in (*whole.parameters(), *student.parameters())}
    assert sum(together.values()) == sum(each.nbytes for each in student.parameters())
    assert evaluate(teacher, student, {}, rows) == evaluate(alone, apart, {}, rows)


def test_the_teacher_has_no_dropout_and_the_student_has():
    teacher, student = pair(gpt2_lm, dropout=0.3)
    alone = spread(gpt2_lm(3, dropout=0.3))
    wanted = trained(alone, adapted(copy.deepcopy(alone), gpt2_lm), gpt2_lm, "kd")
    assert trained(teacher, student, gpt2_lm, "kd") == wanted
    assert not student.training
    student.train()
    whole, _ = teacher_and_student(teacher, student)
    ids = torch.randint(5, 40, (2, 6))
    with torch.no_grad():
        assert torch.equal(whole(ids).logits, alone(ids).logits)
    assert all(each.training for each in teacher.modules())


def test_the_folder_holds_the_adapters_alone_and_a_run_resumes(tmp_path):
    import peft

    base = loaded(llama, tmp_path / "teacher")
    student = adapted(base, llama)
    settings = {"objective": [KD(), DIITO()], "steps": 6, "batch_size": 4, "lr": 0.05, "console": QUIET}
    rows = text(12, labels=False)
    result = fit(base, student, "full", rows, output_dir=tmp_path / "whole", **settings)
    files = {path.name for path in (tmp_path / "whole" / "student").iterdir()}
    assert "adapter_model.safetensors" in files
    assert not {"base", "model.safetensors"} & files
    assert difference(student, load_model(tmp_path / "whole" / "student")) <= 1e-6
    assert difference(student, peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "whole" / "student")) <= 1e-6
    records = []
    for stop in (4, 6):
        base = load_model(str(tmp_path / "teacher"))
        resumed = adapted(base, llama)
        kept = Checkpoints(tmp_path / "kept", every=2, resume=stop == 6)
        made = steps(base, resumed, "full", rows, objective=[KD(), DIITO()], schedule=SHORT, checkpoints=kept)
        for record in made:
            records.append(record.step)
            if record.step == stop:
                break
        made.close()
    assert records == [1, 2, 3, 4, 5, 6]
    assert same(weights(resumed), weights(student))
    assert record.loss == result.records[-1].loss


def test_interchanges_of_teacher_and_student():
    teacher, student = pair(llama)
    alone = spread(llama(3))
    apart = adapted(copy.deepcopy(alone), llama)
    rows = text(12, labels=False)
    found, wanted = (
        interchange_accuracy(*each, "full", rows, pairs=20) for each in ((teacher, student), (alone, apart))
    )
    assert found.to_dict() == wanted.to_dict()


def test_adapters_on_some_layers_in_the_memory_of_the_teacher():
    from peft import LoraConfig, get_peft_model

    teacher = spread(llama(4))
    before = weights(teacher)
    base = from_layers(teacher, 2, copy=False)
    student = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    losses = trained(teacher, student, llama, "diito")
    assert len(losses) == 4
    assert same(weights(teacher), before)
    own = {each.data_ptr() for each in teacher.parameters()}
    assert all(("lora" in name) != (each.data_ptr() in own) for name, each in student.named_parameters())
    base.requires_grad_(True)
    with pytest.raises(DistillError, match="shares .* of its parameters with the teacher"):
        trained(teacher, student, llama, "kd")


def test_what_would_change_the_teacher():
    teacher, student = pair(llama)
    teacher.lm_head.weight.requires_grad_(True)
    with pytest.raises(DistillError, match="trains 'lm_head.weight' too, which is the teacher's; freeze it"):
        trained(teacher, student, llama, "kd")
    teacher, student = pair(llama)
    student.merge_adapter()
    with pytest.raises(DistillError, match=r"merged .*student.unmerge_adapter\(\)"):
        trained(teacher, student, llama, "kd")
    network = spread(llama(2))
    with pytest.raises(DistillError, match="shares .* of its parameters with the teacher"):
        trained(network, network, llama, "kd")


def test_its_answers_are_kept_for_a_student_with_other_adapters_too(tmp_path):
    """What the adapters of a student are is nothing that its teacher answers by."""
    given = {"mapping": {}, "data": text(8, labels=False), "objective": KD(), "schedule": SHORT, "console": QUIET}
    for scale in (1.0, 2.0):
        found = []
        for cache in (None, tmp_path / "answers"):
            teacher, student = pair(llama)
            with torch.no_grad():
                for each in student.parameters():
                    each.mul_(scale if each.requires_grad else 1.0)
            fit(teacher, student, cache=cache, **given)
            found.append(weights(student))
        live, kept = found
        assert all(torch.allclose(live[name], kept[name], atol=1e-4) for name in live)
