"""The command line of DIITO-XXS, end to end on tiny models; and GLUE's tables."""

import contextlib
import gzip
import io
import json
import re
import sys
from functools import partial

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from rich.console import Console

from distill import DIITO, KD, DistillError, Interrupted, Labels, Schedule, Span, fit
from distill.compat import launch, xxs
from distill.compat.glue import LAYOUTS, glue_task, layout_of
from distill.models.pretrained import load_classifier, load_tokenizer
from distill.students.from_layers import from_layers
from distill.training.progress import Record
from tests.distill.conftest import save_bert, sentences

COMMAND = (
    "--task_name SST-2 --bert_model tiny --output_dir out --max_seq_length 16 --train_batch_size 8 "
    "--learning_rate 1e-3 --num_train_epochs 1 --do_train --fp16 False --student_hidden_layers 2 --fc_layer_idx 1 "
    "--kd_model kd --alpha 0.7 --T 20 --neuron_mapping full --is_diito --interchange_prop 0.3 --seed 1"
).split()


def command(main, *arguments, monkeypatch):
    """Exit status, standard output and error of a command line."""
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "argv", ["compat", *map(str, arguments)])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            launch.start(main, "compat")
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
    return status, out.getvalue(), err.getvalue()


def write_tsv(path, rows, header="sentence\tlabel"):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [header, *(f"{text}\t{int(label == 'positive')}" for text, label in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The folders of the original: GLUE's tables, a pretrained encoder, a fine-tuned classifier."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    monkeypatch.setattr(xxs, "evaluate", partial(xxs.evaluate, pairs=20))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME_DATA_FOLDER", raising=False)
    write_tsv(tmp_path / "data/data_raw/SST-2/train.tsv", sentences(24))
    write_tsv(tmp_path / "data/data_raw/SST-2/dev.tsv", sentences(10, seed=1))
    save_bert(tmp_path / "data/models/pretrained/tiny", classifier=False, layers=4)
    save_bert(tmp_path / "data/models/finetuned/tiny/SST-2", classifier=True, layers=4)
    return tmp_path


@pytest.fixture
def ran(home, monkeypatch):
    return lambda *arguments: command(xxs.main, *arguments, monkeypatch=monkeypatch)


def test_the_command_trains_a_student_and_says_how_well_it_answers(ran, home):
    status, out, err = ran(*COMMAND)
    assert (status, err) == (0, "")
    assert "loss = 0.7 kd + 0.3 labels + 1 kd_cf" in out
    assert "KD(temperature=20.0, reduction='mean')" in out
    assert "interchanged: block_output.0 + block_output.1 ↔ block_output.0" in out
    assert "student of 2 layers, 24 training rows, 10 held out" in out
    assert "not reproduced of the original: BertAdam" in out
    for defect in ("factual", "augments nothing", "never shuffled", "assertions", "refuses"):  # of drafts, not of what
        assert not re.search(rf"original[^.]*{defect}", out), defect  # was published
    accuracy = re.search(r"^accuracy ([\d.]+)$", out, re.M)
    folder = home / re.search(r"^results: (.*)$", out, re.M)[1]
    assert folder.name == xxs.run_name(xxs.parse(xxs.XXS, COMMAND, "xxs"), 2) + "-run-1"
    told = json.loads((folder / "result.json").read_text())
    assert told["evaluation"]["accuracy"]["value"] == pytest.approx(float(accuracy[1]))
    assert told["evaluation"]["accuracy"]["count"] == 10
    assert told["settings"]["weights"] == pytest.approx({"kd": 0.7, "labels": 0.3, "kd_cf": 1.0})
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert len(records) == 3
    for record in records:
        terms = record["terms"]
        assert record["loss"] == pytest.approx(0.7 * terms["kd"] + 0.3 * terms["labels"] + terms["kd_cf"], rel=1e-5)
    assert load_classifier(folder / "student").config.num_hidden_layers == 2
    assert load_tokenizer(folder / "student").cls_token == "[CLS]"


def test_the_command_is_the_call_of_fit_that_it_stands_for(ran, home):
    _, out, _ = ran(*COMMAND)
    folder = home / re.search(r"^results: (.*)$", out, re.M)[1]
    asked = xxs.parse(xxs.XXS, COMMAND, "xxs")
    teacher = xxs._teacher(asked)
    task, _ = xxs._task(asked, teacher)
    causal = DIITO(positions=Span(0.3, consecutive=False), match=KD(20.0, reduction="mean"), vacuous="keep")
    result = fit(
        teacher,
        xxs._student(asked, task),
        "full",
        task.train,
        objective=[KD(20.0, reduction="mean"), Labels(), causal],
        weights={"kd": 0.7, "labels": 0.3, "kd_cf": 1.0},
        schedule=Schedule(epochs=1, batch_size=8, lr=1e-3, warmup=0.1, seed=1),
        console=Console(quiet=True),
    )
    logged = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [record.loss for record in result.records] == pytest.approx(logged, rel=1e-6)


def test_a_second_run_has_a_folder_of_its_own(ran, home):
    quick = [*COMMAND, "--max_training_examples", "8"]
    ran(*quick)
    status, out, _ = ran(*quick)
    assert status == 0
    assert out.rstrip().endswith("_maxex.8-run-2")
    assert "student of 2 layers, 8 training rows" in out


def test_the_student_begins_as_the_first_layers_of_the_pretrained_encoder(home):
    asked = xxs.parse(xxs.XXS, COMMAND, "xxs")
    teacher = xxs._teacher(asked)
    task, _ = xxs._task(asked, teacher)
    student = xxs._student(asked, task)
    encoder = transformers.AutoModel.from_pretrained(home / "data/models/pretrained/tiny")
    expected = from_layers(encoder, [0, 1]).state_dict()
    for name, value in student.bert.state_dict().items():
        assert torch.equal(value, expected[name]), name
    again = xxs._student(asked, task)
    assert torch.equal(student.classifier.weight, again.classifier.weight)  # drawn by the seed


def test_checkpoints_by_the_original_paths(home, ran):
    save_bert(home / "data/models/mine", classifier=True, layers=4)
    head = load_classifier(home / "data/models/mine").classifier.weight
    asked = xxs.parse(
        xxs.XXS,
        [*COMMAND, "--encoder_checkpoint_teacher", "mine/pytorch_model.bin", "--cls_checkpoint_student", "mine"],
        "xxs",
    )
    assert xxs._teacher_folder(asked) == "data/models/mine"
    task, _ = xxs._task(asked, xxs._teacher(asked))
    assert torch.equal(xxs._student(asked, task).classifier.weight, head)


def test_patience_and_augmentation_and_accumulation(ran):
    more = "--kd_model kd.cls --beta 10 --normalize_patience --interchange_consecutive_only --neuron_mapping mid"
    status, out, err = ran(*COMMAND, *more.split(), "--gradient_accumulation_steps", "2")
    assert (status, err) == (0, "")
    assert "loss = 0.7 kd + 0.3 labels + 10 pkd + 1 kd_cf + 10 pkd_cf" in out
    assert "interchanged: block_output.2 ↔ block_output.1" in out
    status, out, err = ran(*COMMAND, "--data_augment", "--kd_model", "kd.cls", "--beta", "10")
    assert (status, err) == (0, "")
    assert "interchanged: embedding ↔ embedding" in out
    assert "Patience(block_output.1 ↔ block_output.0)" in out


def test_alpha_0_is_fine_tuning_without_a_teacher(ran, home):
    import shutil

    shutil.rmtree(home / "data/models/finetuned")
    alone = [each for each in COMMAND if each != "--is_diito"]
    status, out, err = ran(*alone, "--alpha", "0")
    assert (status, err) == (0, "")
    assert "loss = 1 labels" in out
    status, _, err = ran(*COMMAND)
    assert status == 2
    assert "there is no teacher in data/models/finetuned/tiny/SST-2; name one: --encoder_checkpoint_teacher" in err


def test_a_seed_that_was_not_given_is_drawn_and_said(ran):
    at = COMMAND.index("--seed")
    status, out, _ = ran(*COMMAND[:at], *COMMAND[at + 2 :])
    assert status == 0
    assert re.search(r"^--seed \d+ was drawn", out, re.M)


def test_the_folder_of_data_may_be_elsewhere(ran, home, monkeypatch):
    (home / "data").rename(home / "elsewhere")
    monkeypatch.setenv("HOME_DATA_FOLDER", "elsewhere")
    assert ran(*COMMAND)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--alpa", "1"], "compat: there is no flag --alpa; did you mean --alpha?"),
        (["--task_name", "SST"], "is no classification task of GLUE; did you mean SST-2?"),
        (["--encoder_checkpoint_teacher", "nowhere"], "teacher 'nowhere' cannot be loaded"),
        (["--student_hidden_layers", "9"], "cannot be taken from a teacher of 4 layers"),
        (["--neuron_mapping", "fulll"], "--neuron_mapping fulll is no file, and no mapping"),
        (["--interchange_prop", "1.5"], "Span(share=1.5) is not a share"),
        (["--T", "0"], "KD(temperature=0.0) softens nothing"),
        (["--max_training_examples", "0"], "--max_training_examples 0 leaves no training row"),
    ],
)
def test_bad_input_is_one_line_and_status_2(ran, home, arguments, message):
    status, _, err = ran(*COMMAND, *arguments)
    assert status == 2
    assert err.count("\n") == 1
    assert message in err
    assert not (home / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_half_precision_without_a_gpu_is_refused(ran):
    status, _, err = ran(*COMMAND, "--fp16", "True")
    assert (status, err) == (2, "compat: --fp16 True needs a GPU, and there is none; leave it out, or give --fp16 "
                                "False.\n")  # fmt: skip


def test_ctrl_c_is_130_and_one_line(monkeypatch):
    def stopped(arguments):
        raise Interrupted("stopped after step 3 of 9; the state is in here; go on with the same call and resume=True.")

    status, _, err = command(stopped, monkeypatch=monkeypatch)
    assert (status, err) == (130, "\ncompat: stopped after step 3 of 9; the state is in here.\n")


# --- wandb ------------------------------------------------------------------------------------------------------------


def test_without_wandb_a_run_warns_and_goes_on(ran, monkeypatch):
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    status, out, err = ran(*COMMAND, "--is_wandb", "--wandb_metadata", "wuzhengx:DIITO-XXS")
    assert (status, err) == (0, "")
    assert "warning: --is_wandb asks for wandb, which is not installed: nothing is sent (pip install wandb)." in out
    assert "accuracy" in out


class Remembered(GeneralTracker):
    """Keeps what it is sent."""

    name, requires_logging_directory = "remembered", False

    def __init__(self):
        super().__init__()
        self.logged, self.finished = [], False

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **settings):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def finished_run():
    from distill.evaluation.evaluate import Evaluation
    from distill.results import FitResult
    from distill.statistics.intervals import Share

    records = tuple(Record(n, 5, 3.0, {"kd": 1.0, "labels": 2.0, "kd_cf": 0.5}, 1e-3) for n in range(1, 6))
    return FitResult(torch.nn.Linear(1, 1), records, Evaluation(Share(0.9, 0.8, 0.95, 10), None))


def test_figures_are_sent_under_the_original_names(monkeypatch):
    tracker, tracking = Remembered(), launch.Tracking("p", None, "r", 2, xxs.NAMES)
    monkeypatch.setattr(launch, "find_spec", lambda name: True)
    monkeypatch.setattr(launch, "Accelerator", lambda mixed_precision, log_with: Accelerator(log_with=tracker))
    accelerator = launch.accelerator_of(False, tracking)
    for record in finished_run().records:
        accelerator.log({"loss": record.loss, "lr": record.lr, **record.terms}, step=record.step)
    assert [step for step, _ in tracker.logged] == [2, 4]
    assert tracker.logged[0][1] == {
        "train/loss": 3.0, "train/kd_loss": 1.0, "train/ce_loss": 2.0, "train/loss_diito": 0.5,
        "train/learning_rate": 1e-3,
    }  # fmt: skip
    launch.send(accelerator, None, finished_run())
    assert not tracker.finished
    launch.send(accelerator, tracking, finished_run())
    assert tracker.logged[-1] == (5, {"epoch/eval_acc": 0.9})
    assert tracker.finished


def test_with_wandb_the_run_is_its_own(monkeypatch):
    asked = {}

    class Recording(Accelerator):
        def __init__(self, *, mixed_precision, log_with):
            asked["log_with"] = log_with
            super().__init__(mixed_precision=mixed_precision)

        def init_trackers(self, project_name, config=None, init_kwargs=None):
            self.trackers = []
            asked.update(project=project_name, settings=init_kwargs, config=config)

    monkeypatch.setattr(launch, "find_spec", lambda name: True)
    monkeypatch.setattr(launch, "Accelerator", Recording)
    launch.accelerator_of(False, launch.Tracking("DIITO-XXS", "wuzhengx", "r", 10, {}, {"alpha": 0.7}))
    assert asked == {
        "log_with": "wandb", "project": "DIITO-XXS", "config": {"alpha": 0.7},
        "settings": {"wandb": {"entity": "wuzhengx", "name": "r"}},
    }  # fmt: skip


# --- GLUE -------------------------------------------------------------------------------------------------------------

TABLES = {
    "CoLA": ("", "gj04\t1\t\tthe cat sees the dog", ["the cat sees the dog"], 1),
    "SST-2": ("sentence\tlabel", 'the " film\t0', ['the " film'], 0),
    "MRPC": ("Quality\tA\tB\tC\tD", "1\t7\t8\tthe cat\tthe dog", ["the cat", "the dog"], 1),
    "QQP": ("id\ta\tb\tc\td\te", "1\t2\t3\tthe cat\tthe dog\t0", ["the cat", "the dog"], 0),
    "RTE": ("index\ta\tb\tlabel", "0\tthe cat\tthe dog\tnot_entailment", ["the cat", "the dog"], 1),
    "QNLI": ("index\ta\tb\tlabel", "0\tthe cat\tthe dog\tentailment", ["the cat", "the dog"], 0),
    "WNLI": ("index\ta\tb\tlabel", "0\tthe cat\tthe dog\t1", ["the cat", "the dog"], 1),
    "MNLI": ("\t".join("abcdefghij"), "\t".join([*"abcdefgh", "the cat", "the dog", "neutral"]),
             ["the cat", "the dog"], 2),
    "MNLI-mm": ("\t".join("abcdefghij"), "\t".join([*"abcdefgh", "the cat", "the dog", "entailment"]),
                ["the cat", "the dog"], 1),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_glue(name, tmp_path, encoder):
    header, row, texts, label = TABLES[name]
    for split in ("train", layout_of(name).dev):
        lines = [*([header] if header else []), row, row]
        (tmp_path / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    tokenizer = load_tokenizer(encoder)
    task = glue_task(name, tmp_path, tokenizer)
    assert (len(task.train), len(task.test)) == (2, 2)
    assert task.train[0]["labels"] == label
    assert task.train[0]["input_ids"].tolist() == tokenizer(*texts)["input_ids"]
    assert name.lower() in LAYOUTS


def test_classes_stand_in_the_order_of_the_teacher(tmp_path, encoder):
    header, row, _, _ = TABLES["MNLI"]
    for split in ("train", "dev_matched"):
        (tmp_path / f"{split}.tsv").write_text(f"{header}\n{row}\n")
    names = ["ENTAILMENT", "NEUTRAL", "CONTRADICTION"]
    task = glue_task("MNLI", tmp_path, load_tokenizer(encoder), names=names)
    assert task.classes == ("entailment", "neutral", "contradiction")
    assert task.train[0]["labels"] == 1
    other = glue_task("MNLI", tmp_path, load_tokenizer(encoder), names=["LABEL_0", "LABEL_1", "LABEL_2"])
    assert other.train[0]["labels"] == 2


def test_compressed_tables_the_first_rows_and_cut_texts(tmp_path, encoder):
    table = "sentence\tlabel\n" + "".join(f"the cat sees the dog {n}\t{n % 2}\n" for n in range(6))
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv.gz").write_bytes(gzip.compress(table.encode()))
    task = glue_task("SST-2", tmp_path, load_tokenizer(encoder), max_length=5, first=3)
    assert (len(task.train), len(task.test)) == (3, 6)
    assert task.train.table["labels"].tolist() == [0, 1, 0]
    assert {len(ids) for ids in task.train.table["input_ids"]} == {5}


def test_rows_with_too_few_columns_are_left_out(tmp_path, encoder):
    header, row, _, _ = TABLES["QQP"]
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text(f"{header}\n{row}\n1\tbroken\n{row}\n")
    assert len(glue_task("QQP", tmp_path, load_tokenizer(encoder)).train) == 2


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (None, "has no train.tsv; put the tables of GLUE there, or say where"),
        ("sentence\tlabel\nthe cat\t2\n", "line 2 of .*train.tsv has label '2', and the classes are 0, 1"),
        ("sentence\tlabel\n", "has no row of 2 columns"),
    ],
)
def test_tables_that_cannot_be_used(table, message, tmp_path, encoder):
    if table is not None:
        (tmp_path / "train.tsv").write_text(table)
    with pytest.raises(DistillError, match=message):
        glue_task("SST-2", tmp_path, load_tokenizer(encoder))
