"""`python -m distill.compat.xxs`: the command line of DIITO-XXS (KD_training.py), mapped onto `fit`."""

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from distill.compat.flags import flag, ignored, left_unused, parsed
from distill.compat.glue import glue_task, layout_of
from distill.compat.launch import Tracking, accelerator_of, formula, next_run, say, send, start
from distill.compat.neurons import neuron_pairs
from distill.compat.terms import AT_EMBEDDING, Patience, Spliced
from distill.errors import DistillError
from distill.evaluation.evaluate import evaluate
from distill.fit import fit
from distill.interchange.mapping import depth
from distill.interchange.positions import Span
from distill.models.pretrained import load_classifier, load_tokenizer, new_classifier
from distill.objectives import DIITO, KD, PKD, Labels, Objective
from distill.students.from_layers import from_layers
from distill.tasks import Task
from distill.training.progress import console_of
from distill.training.schedule import Schedule
from interventions import Location

PROGRAM = "distill.compat.xxs"
HOME = "data"
"""Where data_raw/ and models/ stand, unless the environment variable HOME_DATA_FOLDER says so."""
CACHED = "the teacher runs beside the student, as in the original"
NAMES = {"kd": "kd_loss", "labels": "ce_loss", "pkd": "pt_loss", "kd_cf": "loss_diito", "pkd_cf": "cf_pt_loss"}
DIFFERS = (
    "not reproduced of the original: BertAdam (AdamW here), apex (accelerate), --data_pair. Here kd_cf compares",
    "  counterfactual answers, scattered positions are real tokens, rows are shuffled in each epoch and dropout stays",
    "  on. See docs/compat.md.",
)


@dataclass(frozen=True)
class XXS:
    """Task-specific causal distillation, by the flags of DIITO-XXS."""

    task_name: str | None = flag(None, "a classification task of GLUE, read from HOME_DATA_FOLDER/data_raw/NAME")
    bert_model: str | None = flag(
        None, "what the student's first layers come from: HOME_DATA_FOLDER/models/pretrained/NAME, a folder, or a name"
    )
    output_dir: str | None = flag(None, "the folder of runs; each has a folder of its own, named after its settings")
    run_name: str | None = flag(None, "the name of the run in wandb")
    seed: int | None = flag(None, "seed of everything that is drawn; a random one is drawn and said")
    max_seq_length: int = flag(512, "tokens at which texts are cut; they are padded to the longest of the batch")
    max_training_examples: int | None = flag(None, "the number of the first training rows to use")
    do_train: bool = flag(False, "needed: without it nothing would be done")
    do_eval: bool = ignored(False, "the student is always measured at the end")

    train_batch_size: int = flag(16, "batch_size: the rows of one step of the optimizer")
    gradient_accumulation_steps: int = flag(1, "accumulate: the parts in which a step is computed")
    learning_rate: float = flag(5e-5, "lr")
    num_train_epochs: float = flag(4.0, "epochs; fractions count")
    warmup_proportion: float = flag(0.1, "warmup: the share of the steps over which the learning rate rises")
    fp16: bool = flag(False, "mixed precision, by accelerate")
    loss_scale: float = ignored(0.0, "accelerate scales the loss by itself")
    eval_batch_size: int = ignored(32, "accuracy does not depend on it")

    encoder_checkpoint_student: str | None = flag(None, "what the student's layers come from, in place of --bert_model")
    cls_checkpoint_student: str | None = flag(None, "a classifier whose head the student starts with; a new one else")
    student_hidden_layers: int | None = flag(None, "how many of the first layers the student keeps; all if not given")
    encoder_checkpoint_teacher: str | None = flag(
        None, "the teacher; HOME_DATA_FOLDER/models/finetuned/BERT_MODEL/TASK_NAME if not given"
    )
    cls_checkpoint_teacher: str | None = flag(None, "a classifier whose head the teacher is given")
    teacher_prediction: str | None = ignored(None, CACHED)

    alpha: float = flag(0.95, "weight of kd; that of labels is 1 - alpha")
    T: float = flag(10.0, 'the temperature of KD(T, reduction="mean"), × T², in kd and kd_cf')
    kd_model: str = flag("kd", "kd.cls adds the patient terms pkd and pkd_cf")
    beta: float = flag(0.0, "weight of pkd and pkd_cf")
    fc_layer_idx: str | None = flag(None, "with kd.cls: teacher layers from 0, one for each student layer but the last")
    normalize_patience: bool = flag(
        False, "PKD(layers): of normalised vectors; without it they are compared as they are"
    )
    weights: str | None = ignored(None, "it weighs layers of a kind of KD that is not offered")
    output_all_encoded_layers: bool = ignored(False, "what is compared decides what is kept")

    is_diito: bool = flag(False, "adds DIITO(): kd_cf with weight 1")
    diito_type: str = ignored("random", "sources are drawn at random, as its default says")
    neuron_mapping: str = flag("full", "full, mid (or middle), late, single, or entries teacher~student")
    interchange_prop: float = flag(0.3, "the share of the real tokens that is interchanged")
    interchange_max_token: int = flag(-1, "at most so many tokens; -1 is no limit")
    interchange_consecutive_only: bool = flag(False, "a span of tokens; scattered ones without it")
    data_augment: bool = flag(False, "tokens are interchanged in place of activations")
    data_pair: bool = ignored(False, "each row of a batch would count twice")

    log_interval: int = flag(500, "steps between two reports to wandb; log.jsonl has every step")
    log_every_step: int = ignored(1, "log.jsonl has every step")
    checkpoint_interval: int = ignored(4000, "the last states are saved every 200 steps; the original saves none")
    is_wandb: bool = flag(False, "figures are sent to wandb; without wandb it is said, and goes on")
    wandb_metadata: str = flag("", "entity:project of wandb")


def main(arguments: Sequence[str]) -> None:
    """Train and measure the student that was asked for."""
    asked = parsed(XXS, arguments, PROGRAM)
    say(*left_unused(asked))
    check(asked)
    if asked.seed is None:
        asked = replace(asked, seed=random.SystemRandom().randrange(10**8))
        say(f"--seed {asked.seed} was drawn.")
    run(asked)


def check(asked: XXS) -> None:
    """Raise for flags that do not go together, before anything is loaded."""
    layout_of(asked.task_name)
    if not asked.do_train:
        raise DistillError("--do_train is missing, and without it nothing is done; add --do_train.")
    if asked.bert_model is None and (
        asked.encoder_checkpoint_student is None or asked.encoder_checkpoint_teacher is None
    ):
        raise DistillError("--bert_model is missing: the student's layers come from it; add e.g. bert-base-uncased.")
    if asked.kd_model.lower() not in ("kd", "kd.cls"):
        raise DistillError(f"--kd_model {asked.kd_model} does not exist; choose kd, or kd.cls for the patient terms.")
    if not 0 <= asked.alpha <= 1:
        raise DistillError(f"--alpha {asked.alpha} is the share of kd, and 1 - alpha that of the labels; use 0 to 1.")
    if asked.beta and asked.kd_model.lower() == "kd":
        raise DistillError(f"--beta {asked.beta} weighs the patient terms, and --kd_model kd has none; use kd.cls.")
    if asked.beta and asked.fc_layer_idx is None:
        raise DistillError("--kd_model kd.cls compares layers of the teacher; name them: --fc_layer_idx 1,3,5,7,9.")
    if asked.interchange_max_token != -1 and asked.interchange_max_token < 1:
        raise DistillError(
            f"--interchange_max_token {asked.interchange_max_token} interchanges nothing; use 1 or more, or -1 for no "
            "limit."
        )


def weights_of(asked: XXS) -> dict[str, float]:
    """The weight of each term: α kd + (1 − α) labels + β pkd, and with DIITO + kd_cf + β pkd_cf."""
    patient = asked.beta if asked.kd_model.lower() == "kd.cls" else 0.0
    causal = 1.0 if asked.is_diito else 0.0
    weights = {
        "kd": asked.alpha,
        "labels": 1 - asked.alpha,
        "pkd": patient,
        "kd_cf": causal,
        "pkd_cf": causal * patient,
    }
    return {name: weight for name, weight in weights.items() if weight}


def objectives_of(asked: XXS, student_layers: int, teacher_layers: int) -> list[Objective]:
    """The objectives whose terms have a weight."""
    weights = weights_of(asked)
    patient = [_patience(asked, student_layers, teacher_layers)] if "pkd" in weights else []
    made: list[Objective] = [KD(asked.T, reduction="mean")] if "kd" in weights else []
    made += [Labels()] if "labels" in weights else []
    made += patient
    return made + ([_interchange(asked, [KD(asked.T, reduction="mean"), *patient])] if asked.is_diito else [])


def schedule_of(asked: XXS) -> Schedule:
    """Time and speed."""
    return Schedule(
        epochs=asked.num_train_epochs,
        batch_size=asked.train_batch_size,
        accumulate=asked.gradient_accumulation_steps,
        lr=asked.learning_rate,
        warmup=asked.warmup_proportion,
        weight_decay=0.01,
        clip=1.0,
        seed=asked.seed or 0,
    )


def run_name(asked: XXS, layers: int) -> str:
    """The name of the run's folder, as the original makes it."""
    model = f"{asked.kd_model}.{asked.normalize_patience}" if asked.kd_model == "kd.cls" else asked.kd_model
    return (
        f"{model}_{asked.task_name}_nlayer.{layers}_lr.{asked.learning_rate}_T.{asked.T}_alpha.{asked.alpha}"
        f"_beta.{asked.beta}_bs.{asked.train_batch_size}_diito.{asked.is_diito}_nm.{asked.neuron_mapping}"
        f"_intprop.{asked.interchange_prop}_intmax.{asked.interchange_max_token}"
        f"_intconsec.{asked.interchange_consecutive_only}_dtaug.{asked.data_augment}_dtpair.{asked.data_pair}"
        f"_maxex.{asked.max_training_examples}"
    ).replace("/", "-")


def tracking_of(asked: XXS, name: str) -> Tracking | None:
    """Where figures are sent, if anywhere."""
    if not asked.is_wandb:
        return None
    entity, _, project = asked.wandb_metadata.rpartition(":")
    run = asked.run_name or name
    return Tracking(project or "DIITO-XXS", entity or None, run, asked.log_interval, NAMES, asdict(asked))


def run(asked: XXS) -> None:
    """Load what was asked for, train, and say how well the student answers."""
    weights = weights_of(asked)
    teacher = _teacher(asked) if weights.keys() - {"labels"} else None
    task, tokenizer = _task(asked, teacher)
    student = _student(asked, task)
    layers = depth(student)
    name = run_name(asked, layers)
    tracking = tracking_of(asked, name)
    objectives = objectives_of(asked, layers, depth(teacher or student))
    mapping = None if teacher is None else neuron_pairs(asked.neuron_mapping, teacher, student)
    trained = AT_EMBEDDING if asked.data_augment else mapping
    accelerator = accelerator_of(asked.fp16, tracking)
    folder = next_run(Path(asked.output_dir or home() / "outputs") / name)
    say(
        formula(weights),
        *(f"  {' '.join(repr(objective).split())}" for objective in objectives),
        *([f"  interchanged: {', '.join(map(str, trained or ()))}"] if asked.is_diito else []),
        f"student of {layers} layers, {len(task.train)} training rows, {len(task.test)} held out",
        *DIFFERS,
    )
    result = fit(
        teacher,
        student,
        trained if asked.is_diito and trained else None,
        data=task.train,
        objective=objectives,
        weights=weights,
        schedule=schedule_of(asked),
        output_dir=folder,
        console=console_of(),
        title=task.name,
        accelerator=accelerator,
        tokenizer=tokenizer,
    )
    say("measuring on the held-out rows: accuracy, and interchange accuracy, which takes a while")
    result = replace(result, evaluation=evaluate(teacher, student, mapping, task, positions=_span(asked)))
    result.save(folder)
    send(accelerator, tracking, result)
    say(str(result), f"accuracy {result.accuracy}", f"results: {folder}")


def home() -> Path:
    """Where data and models stand."""
    return Path(os.environ.get("HOME_DATA_FOLDER", HOME))


def _patience(asked: XXS, student_layers: int, teacher_layers: int) -> Objective:
    try:
        above = [int(number) for number in (asked.fc_layer_idx or "").split(",")]
    except ValueError:
        above = []
    if not above or min(above) < 0 or max(above) >= teacher_layers:
        raise DistillError(
            f"--fc_layer_idx {asked.fc_layer_idx} does not name layers of this teacher, 0 to {teacher_layers - 1}; "
            "write numbers with commas, e.g. 1,3,5."
        )
    if len(above) != student_layers - 1:
        raise DistillError(
            f"--fc_layer_idx {asked.fc_layer_idx} names {len(above)} teacher layers, and the student has "
            f"{student_layers - 1} below its last; name one for each."
        )
    layers = {Location(layer): Location(below) for below, layer in enumerate(above)}
    return PKD(layers) if asked.normalize_patience else Patience(layers)


def _interchange(asked: XXS, match: Sequence[Objective]) -> DIITO:
    if asked.data_augment:
        return DIITO(Spliced(_span(asked)), positions=None, match=match)
    return DIITO(positions=_span(asked), match=match)


def _span(asked: XXS) -> Span:
    most = None if asked.interchange_max_token == -1 else asked.interchange_max_token
    return Span(asked.interchange_prop, consecutive=asked.interchange_consecutive_only, most=most)


def _teacher(asked: XXS) -> nn.Module:
    teacher = load_classifier(_teacher_folder(asked))
    if asked.cls_checkpoint_teacher is not None:
        _take_head(teacher, _found(asked.cls_checkpoint_teacher))
    return teacher


def _teacher_folder(asked: XXS) -> str:
    if asked.encoder_checkpoint_teacher is not None:
        return _found(asked.encoder_checkpoint_teacher)
    folder = home() / "models" / "finetuned" / str(asked.bert_model) / str(asked.task_name)
    if not folder.is_dir():
        raise DistillError(
            f"there is no teacher in {folder}; name one: --encoder_checkpoint_teacher FOLDER_OR_NAME, or make one: "
            f"distill teach --task sst2 --data {home() / 'data_raw' / str(asked.task_name)} --from {asked.bert_model} "
            f"--output {folder}."
        )
    return str(folder)


def _student(asked: XXS, task: Task) -> nn.Module:
    """The first layers of the encoder, and a new head."""
    encoder = asked.encoder_checkpoint_student
    whole = new_classifier(_pretrained(asked) if encoder is None else _found(encoder), task, asked.seed or 0)
    if asked.cls_checkpoint_student is not None:
        _take_head(whole, _found(asked.cls_checkpoint_student))
    count = depth(whole) if asked.student_hidden_layers is None else asked.student_hidden_layers
    return from_layers(whole, range(count))


def _task(asked: XXS, teacher: nn.Module | None) -> tuple[Task, Any]:
    """The task, and the tokenizer that it is read with."""
    tokenizer = load_tokenizer(_pretrained(asked) if teacher is None else _teacher_folder(asked))
    config: Any = getattr(teacher, "config", None)
    names: Mapping[int, str] = {} if config is None else config.id2label
    task = glue_task(
        str(asked.task_name),
        home() / "data_raw" / str(asked.task_name),
        tokenizer,
        max_length=asked.max_seq_length,
        first=asked.max_training_examples,
        names=[names[number] for number in sorted(names)],
    )
    return task, tokenizer


def _pretrained(asked: XXS) -> str:
    folder = home() / "models" / "pretrained" / str(asked.bert_model)
    return str(folder) if folder.is_dir() else str(asked.bert_model)


def _found(name: str) -> str:
    """A model by the original's path, of a file below HOME_DATA_FOLDER/models; or a folder or name as it is."""
    for path in (home() / "models" / name, Path(name)):
        folder = path.parent if path.suffix == ".bin" else path
        if folder.is_dir():
            return str(folder)
    return name


def _take_head(model: nn.Module, folder: str) -> None:
    """Give a classifier the head of another."""
    head = {
        name: value for name, value in load_classifier(folder).state_dict().items() if name.startswith("classifier.")
    }
    own = model.state_dict()
    unfit = [name for name, value in head.items() if name not in own or own[name].shape != value.shape]
    if not head or unfit:
        raise DistillError(f"the classifier of {folder} does not fit; name one of the same width and classes.")
    model.load_state_dict({**own, **head})


if __name__ == "__main__":
    start(main, PROGRAM)
