"""Adapters that are saved reload onto the model that they were trained on, whatever they name."""

import json
import shutil

import pytest
import torch
from torch import nn

from distill import KD, fit, from_layers
from distill.models.pretrained import load_model, save_model
from distill.storage.adapters import BASE
from tests.distill.tiny_models import QUIET, bert, gpt2_lm, llama, spread, text

MODULES = {llama: ["q_proj", "v_proj"], gpt2_lm: ["c_attn"], bert: ["query", "value"]}


def loaded(make, folder) -> nn.Module:
    """The teacher as it is loaded from a folder, whose name it keeps."""
    spread(make(4)).save_pretrained(folder)
    return load_model(str(folder))


def adapted(model, make, **settings) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    kind = "SEQ_CLS" if make is bert else "CAUSAL_LM"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=MODULES[make], task_type=kind, init_lora_weights=False, **settings)
        return get_peft_model(model, config).eval()


def difference(one: nn.Module, other: nn.Module) -> float:
    batch = {name: column for name, column in text(8).batch(range(8)).items() if name != "labels"}
    with torch.no_grad():
        return float((one.eval()(**batch).logits - other.eval()(**batch).logits).abs().max())


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*")
@pytest.mark.parametrize("layers", [(0, 3), (0, 1)], ids=["spread", "first"])
@pytest.mark.parametrize("make", MODULES)
def test_adapters_of_some_layers_of_a_teacher_reload_onto_these(make, layers, tmp_path):
    import peft

    teacher = loaded(make, tmp_path / "teacher")
    student = adapted(from_layers(teacher, layers), make)
    run = tmp_path / "run"
    rows = text(8, labels=make is bert)
    fit(teacher, student, {}, rows, objective=KD(), steps=2, batch_size=4, lr=0.01, output_dir=run, console=QUIET)
    auto = peft.AutoPeftModelForSequenceClassification if make is bert else peft.AutoPeftModelForCausalLM
    more = {"num_labels": 3} if make is bert else {}
    assert difference(student, load_model(run / "student")) <= 1e-6
    assert difference(student, auto.from_pretrained(run / "student", **more)) <= 1e-6
    shutil.move(run, tmp_path / "moved")
    assert difference(student, load_model(tmp_path / "moved" / "student")) <= 1e-6


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*")
@pytest.mark.parametrize("make", MODULES)
def test_adapters_on_the_model_that_they_name_are_saved_alone(make, tmp_path):
    """The model is the one that they name, up to a weight of it that was trained too."""
    student = adapted(loaded(make, tmp_path / "whole"), make)
    save_model(student, tmp_path / "student")
    named = json.loads((tmp_path / "student" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path / "whole")
    assert not (tmp_path / "student" / BASE).exists()
    assert difference(student, load_model(tmp_path / "student")) <= 1e-6
    with torch.no_grad():
        next(p for name, p in student.named_parameters() if "lora" not in name).add_(0.1)
    save_model(student, tmp_path / "other")
    assert (tmp_path / "other" / BASE).is_dir()
    assert difference(student, load_model(tmp_path / "other")) <= 1e-6


def test_other_adapters_and_modules_that_are_saved_with_them(tmp_path):
    from peft import IA3Config, PromptTuningConfig, get_peft_model

    teacher = loaded(llama, tmp_path / "teacher")
    kinds = [
        IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ]
    students = [get_peft_model(from_layers(teacher, 2), kind) for kind in kinds]
    students.append(adapted(from_layers(teacher, 2), llama, modules_to_save=["lm_head"]))
    for number, student in enumerate(students):
        save_model(student, tmp_path / str(number))
        assert difference(student, load_model(tmp_path / str(number))) <= 1e-6
