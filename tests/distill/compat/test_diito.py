"""The command line of Causal-Distill's language model trainer, end to end on tiny models."""

import json
import pickle
import re

import numpy as np
import pytest
import torch
import transformers

from distill.compat import diito
from distill.compat.flags import parse
from distill.compat.models import freeze, load_language_model, load_weights, new_student
from distill.models.pretrained import load_tokenizer
from tests.distill.compat.test_xxs import command
from tests.distill.conftest import WORDS, save_bert, sentences

WIDTH, LAYERS = 16, 4
SIZE = 5 + len(WORDS)
ENTRY = {"teacher_variable_names": ["$L:2$H:[0:12]$[0:64]"], "student_variable_names": ["$L:1$H:[0:12]$[0:64]"]}
COMMAND = (
    "--force --n_gpu 4 --log_interval 10 --student_type distilbert --student_config student.json "
    "--student_pretrained_weights student.pth --teacher_type bert --teacher_name teacher --neuron_mapping middle.nm "
    "--mlm --alpha_ce 0.25 --alpha_mlm 0.25 --alpha_cos 0.25 --alpha_clm 0.0 --alpha_causal_ce 0.25 "
    "--alpha_causal_cos 0.0 --interchange_prop 0.3 --interchange_max_token -1 --interchange_consecutive_only "
    "--freeze_pos_embs --dump_path results/ --data_file wiki/texts.pickle --token_counts wiki/counts.pickle --seed 42 "
    "--n_epoch 1 --gradient_accumulation_steps 2 --batch_size 4"
).split()


def extracted(teacher) -> dict[str, torch.Tensor]:
    """What extract_distilbert.py writes, of the first and last layer."""
    weights = teacher.state_dict()
    found = {}
    for name in ("word_embeddings.weight", "position_embeddings.weight", "LayerNorm.weight", "LayerNorm.bias"):
        found[f"distilbert.embeddings.{name}"] = weights[f"bert.embeddings.{name}"]
    parts = {
        "attention.q_lin": "attention.self.query", "attention.k_lin": "attention.self.key",
        "attention.v_lin": "attention.self.value", "attention.out_lin": "attention.output.dense",
        "sa_layer_norm": "attention.output.LayerNorm", "ffn.lin1": "intermediate.dense", "ffn.lin2": "output.dense",
        "output_layer_norm": "output.LayerNorm",
    }  # fmt: skip
    for below, above in enumerate((0, LAYERS - 1)):
        for part, source in parts.items():
            for kind in ("weight", "bias"):
                name = f"distilbert.transformer.layer.{below}.{part}.{kind}"
                found[name] = weights[f"bert.encoder.layer.{above}.{source}.{kind}"]
    found["vocab_projector.weight"] = weights["cls.predictions.decoder.weight"]
    found["vocab_projector.bias"] = weights["cls.predictions.bias"]
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files that the command names."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    monkeypatch.chdir(tmp_path)
    save_bert(tmp_path / "teacher", classifier=False)  # for its tokenizer
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = transformers.BertForMaskedLM(
            transformers.BertConfig(
                vocab_size=SIZE, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2,
                intermediate_size=24, max_position_embeddings=32, hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )  # fmt: skip
    teacher.save_pretrained(tmp_path / "teacher")
    torch.save(extracted(teacher), tmp_path / "student.pth")
    config = {
        "activation": "gelu", "attention_dropout": 0.1, "dim": WIDTH, "dropout": 0.1, "hidden_dim": 24,
        "initializer_range": 0.02, "max_position_embeddings": 32, "n_heads": 2, "n_layers": 2,
        "sinusoidal_pos_embds": True, "tie_weights_": True, "vocab_size": SIZE,
    }  # fmt: skip
    (tmp_path / "student.json").write_text(json.dumps(config))
    (tmp_path / "middle.nm").write_text(json.dumps({"interchange_variable_mappings": [ENTRY]}))
    tokenizer = load_tokenizer(tmp_path / "teacher")
    texts = [" ".join(text for text, _ in sentences(4, seed)) for seed in range(12)]
    ids = [np.uint16(tokenizer(text)["input_ids"]) for text in texts]
    counts = np.bincount(np.concatenate(ids), minlength=SIZE).tolist()
    (tmp_path / "wiki").mkdir()
    (tmp_path / "wiki/texts.pickle").write_bytes(pickle.dumps(ids))
    (tmp_path / "wiki/counts.pickle").write_bytes(pickle.dumps(counts))
    return tmp_path


@pytest.fixture
def ran(folder, monkeypatch):
    return lambda *arguments: command(diito.main, *arguments, monkeypatch=monkeypatch)


def logged(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_command_trains_a_student(ran, folder):
    status, out, err = ran(*COMMAND)
    assert (status, err) == (0, "")
    assert "--n_gpu is ignored: accelerate places the models" in out
    assert "loss = 0.25 kd + 0.25 mlm + 0.25 cosine + 0.25 kd_cf" in out
    assert "interchanged: block_output.2 ↔ block_output.1" in out
    assert "not reproduced of the original" in out
    run = folder / re.search(r"^results: (.*)$", out, re.M)[1]
    assert run.parent == folder / "results"
    assert run.name == diito.run_name(parse(diito.Trainer, COMMAND, "diito"))
    records = logged(run)
    texts = int(re.search(r"teacher of 4, (\d+) texts", out)[1])
    assert len(records) == -(-texts // 8)
    for record in records:
        terms = record["terms"]
        assert terms.keys() == {"kd", "mlm", "cosine", "kd_cf"}
        assert record["loss"] == pytest.approx(sum(terms.values()) / 4, rel=1e-5)
    student = transformers.DistilBertForMaskedLM.from_pretrained(run / "student")
    assert student.config.n_layers == 2
    assert load_tokenizer(run / "student").mask_token == "[MASK]"
    assert json.loads((run / "parameters.json").read_text())["alpha_ce"] == 0.25


def test_the_same_seed_gives_the_same_losses(ran, folder):
    losses = []
    for seed in (1, 1, 2):
        status, out, _ = ran(*COMMAND, "--seed", seed)
        assert status == 0
        losses.append([record["loss"] for record in logged(folder / re.search(r"^results: (.*)$", out, re.M)[1])])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("more", "terms"),
    [
        ("--alpha_mse 0.1 --alpha_causal_cos 0.2 --include_crossway",
         {"kd", "mlm", "mse", "cosine", "kd_cf", "cosine_cf"}),
        ("--restrict_ce_to_mask --interchange_masked_token_only --interchange_consecutive_only False",
         {"kd", "mlm", "cosine", "kd_cf"}),
        ("--data_augment --neuron_mapping full", {"kd", "mlm", "cosine", "kd_cf"}),
        ("--alpha_causal_ce 0", {"kd", "mlm", "cosine"}),
    ],
)  # fmt: skip
def test_other_flags(ran, folder, more, terms):
    status, out, err = ran(*COMMAND, *more.split())
    assert (status, err) == (0, "")
    assert logged(folder / re.search(r"^results: (.*)$", out, re.M)[1])[-1]["terms"].keys() == terms


def test_an_earlier_run_is_replaced_by_force_alone(ran, folder):
    assert ran(*COMMAND)[0] == 0
    status, _, err = ran(*COMMAND[1:])
    assert status == 2
    assert "exists; replace it with --force" in err
    (run,) = (folder / "results").iterdir()
    (run / "old").touch()
    assert ran(*COMMAND)[0] == 0
    assert not (run / "old").exists()
    (run / "settings.json").unlink()
    status, _, err = ran(*COMMAND)
    assert status == 2
    assert "holds something else than a run, which --force would delete" in err


def test_causal_language_models(ran, folder):
    config = transformers.GPT2Config(
        vocab_size=SIZE, n_embd=WIDTH, n_layer=LAYERS, n_head=2, n_positions=32, bos_token_id=2, eos_token_id=3
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    tokenizer = load_tokenizer(folder / "teacher")
    tokenizer.bos_token, tokenizer.eos_token = "[CLS]", "[SEP]"
    tokenizer.save_pretrained(folder / "gpt2")
    (folder / "gpt2.json").write_text(json.dumps({**config.to_dict(), "n_layer": 2}))
    flags = (
        "--student_type gpt2 --student_config gpt2.json --teacher_type gpt2 --teacher_name gpt2 --alpha_ce 0.5 "
        "--alpha_clm 0.5 --alpha_causal_ce 0.5 --dump_path results --data_file wiki/texts.pickle --n_epoch 1 "
        "--gradient_accumulation_steps 1 --batch_size 4 --neuron_mapping full"
    )
    status, out, err = ran(*flags.split())
    assert (status, err) == (0, "")
    assert "loss = 0.5 kd + 0.5 clm + 0.5 kd_cf" in out
    assert logged(folder / re.search(r"^results: (.*)$", out, re.M)[1])[-1]["terms"].keys() == {"kd", "clm", "kd_cf"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--alpha_cee", "1"], "compat: there is no flag --alpha_cee; did you mean --alpha_ce?"),
        (["--teacher_name", "nowhere"], "--teacher_name nowhere cannot be loaded"),
        (["--student_config", "nowhere"], "--student_config nowhere cannot be read"),
        (["--student_pretrained_weights", "nowhere"], "--student_pretrained_weights nowhere cannot be loaded"),
        (["--data_file", "wiki/nowhere"], "wiki/nowhere does not exist; make it with scripts/binarized_data.py"),
        (["--token_counts", "wiki/texts.pickle"], "counts and the models know 20 tokens"),
        (["--neuron_mapping", "nowhere.nm"], "--neuron_mapping nowhere.nm is no file"),
        (["--teacher_type", "roberta", "--student_type", "roberta"], "is a bert, and --teacher_type roberta was given"),
    ],
)
def test_bad_input_is_one_line_and_status_2(ran, folder, arguments, message):
    status, _, err = ran(*COMMAND, *arguments)
    assert status == 2
    assert err.count("\n") == 1
    assert message in err
    assert not (folder / "results").exists()


def test_without_wandb_a_run_warns_and_goes_on(ran, monkeypatch):
    from distill.compat import launch

    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    status, out, _ = ran(*COMMAND, "--is_wandb")
    assert status == 0
    assert "warning: --is_wandb asks for wandb, which is not installed" in out


# --- models -----------------------------------------------------------------------------------------------------------


def test_extracted_weights_are_taken(folder):
    teacher = load_language_model("teacher", "bert", masked=True)
    student = new_student(folder / "student.json", "distilbert", masked=True, seed=0)
    before = student.vocab_transform.weight.clone()
    load_weights(student, folder / "student.pth")
    weights = teacher.state_dict()
    last = student.distilbert.transformer.layer[1].ffn.lin2.weight
    assert torch.equal(last, weights[f"bert.encoder.layer.{LAYERS - 1}.output.dense.weight"])
    assert torch.equal(student.vocab_transform.weight, before)  # no such thing in BERT's file
    again = new_student(folder / "student.json", "distilbert", masked=True, seed=0)
    assert torch.equal(again.vocab_transform.weight, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.pop("vocab_projector.bias"), "lacks vocab_projector.bias"),
        (lambda found: found.update(extra=torch.zeros(1)), "has extra, which the student has not"),
        (lambda found: found.update({"vocab_projector.bias": torch.zeros(3)}), "cannot be loaded: .*size mismatch"),
    ],
)
def test_weights_of_another_model(folder, change, message):
    student = new_student(folder / "student.json", "distilbert", masked=True, seed=0)
    found = torch.load(folder / "student.pth", weights_only=True)
    change(found)
    torch.save(found, folder / "other.pth")
    with pytest.raises(diito.DistillError, match=message):
        load_weights(student, folder / "other.pth")


@pytest.mark.parametrize("name", ["vocab_size", "dim", "max_position_embeddings"])
def test_a_student_of_another_size(folder, ran, name):
    told = json.loads((folder / "student.json").read_text())
    (folder / "student.json").write_text(json.dumps({**told, name: 2 * told[name]}))
    status, _, err = ran(*COMMAND)
    assert status == 2
    assert f"the teacher has {'hidden_size' if name == 'dim' else name} {told[name]} and the student" in err


def test_frozen_embeddings():
    config = transformers.RobertaConfig(
        vocab_size=SIZE, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=34,
    )  # fmt: skip
    student = transformers.RobertaForMaskedLM(config)
    freeze(student, positions=True, token_types=True)
    frozen = {name for name, parameter in student.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"roberta.embeddings.{kind}_embeddings.weight" for kind in ("position", "token_type")}
