"""Command lines as dataclasses: the original commands are read as they stand, and what is wrong is one line."""

import shlex
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from distill import DistillError
from distill.compat.diito import Trainer
from distill.compat.flags import flag, ignored, notes_on_ignored, parse
from distill.compat.xxs import XXS

REPOSITORY = Path(__file__).parents[3]
XXS_COMMAND = """
--task_name SST-2 --output_dir data/outputs/KD/SST-2/teacher_12layer/ --bert_model bert-base-uncased
--max_seq_length 128 --train_batch_size 32 --learning_rate 2e-5 --num_train_epochs 5 --eval_batch_size 32
--gradient_accumulation_steps 1 --log_interval 10 --checkpoint_interval 100 --do_train --fp16 False
--student_hidden_layers 6 --fc_layer_idx 1,3,5,7,9 --kd_model kd --alpha 0.7 --T 20 --is_wandb
--wandb_metadata wuzhengx:DIITO-XXS --neuron_mapping full --is_diito --interchange_prop 0.3
"""
DIITO_COMMAND = """
--force --n_gpu 4 --log_interval 10 --student_type distilbert
--student_config ./training_configs/distilbert-base-uncased-large.json
--student_pretrained_weights ./distillation_checkpoints/bert-base-uncased_num_layer_6.pth --teacher_type bert
--teacher_name bert-base-uncased --neuron_mapping ./training_configs/single_middle_layer_6.nm --mlm --alpha_ce 0.25
--alpha_mlm 0.25 --alpha_cos 0.25 --alpha_clm 0.0 --alpha_causal_ce 0.25 --alpha_causal_cos 0.0 --interchange_prop 0.3
--interchange_max_token -1 --interchange_consecutive_only --freeze_pos_embs --dump_path ./results/
--data_file ./wikitext-dataset/binarized_text.train.bert-base-uncased.pickle
--token_counts ./wikitext-dataset/binarized_text.train.token_counts.bert-base-uncased.pickle --seed 42 --n_epoch 3
--gradient_accumulation_steps 6 --batch_size 40
"""


def xxs(text: str = XXS_COMMAND, *more: str) -> XXS:
    return parse(XXS, [*shlex.split(text), *more], "xxs")


def diito(text: str = DIITO_COMMAND, *more: str) -> Trainer:
    return parse(Trainer, [*shlex.split(text), *more], "diito")


def test_the_command_of_xxs_is_read_as_it_stands():
    asked = xxs()
    assert (asked.task_name, asked.bert_model, asked.max_seq_length) == ("SST-2", "bert-base-uncased", 128)
    assert (asked.train_batch_size, asked.learning_rate, asked.num_train_epochs) == (32, 2e-5, 5.0)
    assert (asked.alpha, asked.T, asked.beta, asked.kd_model, asked.fc_layer_idx) == (0.7, 20.0, 0.0, "kd", "1,3,5,7,9")
    assert (asked.is_diito, asked.fp16, asked.do_train, asked.is_wandb) == (True, False, True, True)
    assert (asked.wandb_metadata, asked.interchange_prop, asked.seed) == ("wuzhengx:DIITO-XXS", 0.3, None)
    assert notes_on_ignored(asked) == [
        "--checkpoint_interval is ignored: the last states are saved every 200 steps; the original saves none."
    ]


def test_the_command_of_the_language_model_trainer_is_read_as_it_stands():
    asked = diito()
    assert (asked.force, asked.mlm, asked.freeze_pos_embs, asked.interchange_consecutive_only) == (True,) * 4
    assert (asked.alpha_ce, asked.alpha_mlm, asked.alpha_cos, asked.alpha_clm) == (0.25, 0.25, 0.25, 0.0)
    assert (asked.alpha_causal_ce, asked.alpha_causal_cos, asked.interchange_max_token) == (0.25, 0.0, -1)
    assert (asked.batch_size, asked.gradient_accumulation_steps, asked.n_epoch, asked.seed) == (40, 6, 3, 42)
    assert [line.split()[0] for line in notes_on_ignored(asked)] == ["--n_gpu"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--fp16"], True),
        (["--fp16", "True"], True),
        (["--fp16", "False"], False),
        (["--fp16=false"], False),
        ([], False),
        (["--fp16", "--do_train"], True),
    ],
)
def test_switches_may_have_a_value(given, expected):
    assert parse(XXS, given, "xxs").fp16 is expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--alpa", "0.7"], r"there is no flag --alpa; did you mean --alpha\?"),
        (["--alpa=0.7"], r"there is no flag --alpa; did you mean --alpha\?"),
        (["--alph", "0.7"], r"there is no flag --alph; did you mean --alpha\?"),  # no abbreviations
        (["--qqqqqqq"], "there is no flag --qqqqqqq; see --help"),
        (["SST-2"], "'SST-2' belongs to no flag; put its flag before it"),
        (["--alpha"], "argument --alpha: expected one argument; see --help"),
        (["--alpha", "much"], "argument --alpha: invalid float value: 'much'"),
        (["--fp16", "perhaps"], "argument --fp16: 'perhaps' is neither True nor False"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, message):
    with pytest.raises(DistillError, match=message) as caught:
        parse(XXS, arguments, "xxs")
    assert "\n" not in str(caught.value)


def test_help_names_every_flag_and_what_becomes_of_it(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Trainer, ["--help"], "diito")
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for each in fields(Trainer):
        assert f"--{each.name}" in shown
        assert (each.metadata.get("becomes") or f"ignored: {each.metadata['ignored']}").split("%")[0][:40] in shown


@pytest.mark.parametrize(("kind", "command"), [(XXS, "xxs"), (Trainer, "diito")])
def test_the_page_tells_of_every_flag(kind, command):
    page = (REPOSITORY / "docs" / "compat.md").read_text(encoding="utf-8")
    for each in fields(kind):
        assert f"| `--{each.name}`" in page, each.name
    assert f"python -m distill.compat.{command}" in page


def test_only_flags_that_were_given_another_value_are_said_to_be_ignored():
    @dataclass(frozen=True)
    class Small:
        a: int = flag(1, "a")
        b: int = ignored(2, "of no use")

    assert notes_on_ignored(parse(Small, ["--b", "2"], "small")) == []
    assert notes_on_ignored(parse(Small, ["--a", "5", "--b", "3"], "small")) == ["--b is ignored: of no use."]
