"""A saved student on a hub: what is uploaded and what is not, loaded again, and refusals before a training."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from distill import KD, DistillError, fit
from distill.publishing.push import check_repo, push_folder
from tests.fake_hub import running


def language_model(layers=2):
    torch.manual_seed(layers)
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=layers, n_head=2)).eval()


@pytest.fixture
def hub():
    with running() as hub:
        yield hub


@pytest.fixture
def result(tmp_path):
    tokens = torch.randint(20, (8, 6), generator=torch.Generator().manual_seed(0))
    teacher, student, data = language_model(), language_model(1), {"input_ids": tokens, "labels": tokens}
    return fit(teacher, student, {}, data, objective=KD(), steps=2, batch_size=4, output_dir=tmp_path / "run")


def test_a_student_is_uploaded_with_its_card_and_loads_again(result, hub, tmp_path):
    assert result.push("me/small") == f"{hub.address}/me/small"
    repo = hub.repos["me/small"]
    assert repo["private"]
    assert set(repo["files"]) == {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    for name, content in repo["files"].items():
        (tmp_path / name).write_bytes(content)
    found = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in result.student.state_dict().items())


def test_a_repository_that_is_there_stays_as_it_is(result, hub):
    result.push("me/small", private=False)
    result.push("me/small")
    assert (hub.repos["me/small"]["private"], hub.repos["me/small"]["commits"]) == (False, 2)


def test_a_hub_that_refuses_loses_nothing(result, hub):
    hub.refuses = "/api/models"
    with pytest.raises(DistillError, match=r"403 Forbidden: You may not write here; upload it later: hf upload me/a /"):
        result.push("me/a")
    assert (result.output_dir / "student" / "model.safetensors").is_file()


def test_a_token_is_in_no_message(result, hub):
    with pytest.raises(DistillError) as refusal:
        result.push("me/a", token="hf_other")
    assert "hf_other" not in str(refusal.value)


@pytest.mark.parametrize("repo", ["a/b/c", "", "a b", "me/" + "x" * 100])
def test_names_that_no_hub_takes_are_refused(repo):
    with pytest.raises(DistillError, match="is no name on a hub"):
        check_repo(repo)


def test_no_login_and_no_hub_are_found_before_a_training(hub, monkeypatch):
    check_repo("me/a")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(DistillError, match=r"log in first: hf auth login"):
        check_repo("me/a")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DistillError, match=r"HF_HUB_OFFLINE is set"):
        check_repo("me/a")


def test_what_is_not_saved_cannot_be_uploaded(tmp_path, hub):
    tokens = torch.zeros(4, 6, dtype=torch.long)
    result = fit(language_model(), language_model(1), {}, {"input_ids": tokens}, objective=KD(), steps=1)
    with pytest.raises(DistillError, match=r"uploads a saved student, and this one is not"):
        result.push("me/a")
    with pytest.raises(DistillError, match=r"nothing to upload"):
        push_folder(tmp_path / "none", "me/a")


def test_adapters_on_a_model_of_this_machine_are_refused(tmp_path, hub):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/home/me/base"}')
    with pytest.raises(DistillError, match=r"adapters for the model in /home/me/base, which is on this machine alone"):
        push_folder(tmp_path, "me/a")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    assert push_folder(tmp_path, "me/a")
