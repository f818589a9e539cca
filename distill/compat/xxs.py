"""`python -m distill.compat.xxs`: the command line of DIITO-XXS (KD_training.py), mapped onto `fit`."""

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from distill.compat.flags import flag, ignored, notes_on_ignored, parse
from distill.compat.glue import glue_task, layout_of
from distill.compat.launch import Tracking, accelerator_of, formula, next_run, print_lines, send, start
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
"""The folder of data_raw/ and models/, unless the environment variable HOME_DATA_FOLDER names another."""
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
        None,
        "the encoder of the student's layers: HOME_DATA_FOLDER/models/pretrained/NAME, a folder, or a name",
    )
    output_dir: str | None = flag(None, "the folder of runs; each has a folder of its own, named after its settings")
    run_name: str | None = flag(None, "the name of the run in wandb")
    seed: int | None = flag(None, "seed of all draws; a random one is drawn and printed")
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

    encoder_checkpoint_student: str | None = flag(None, "the encoder of the student's layers, in place of --bert_model")
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
        False, "PKD(layers): of normalized vectors; without it they are compared as they are"
    )
    weights: str | None = ignored(None, "it weighs layers of a kind of KD that is not offered")
    output_all_encoded_layers: bool = ignored(False, "layers that are compared are recorded, and no others")

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
    is_wandb: bool = flag(False, "figures are sent to wandb; without wandb a line says so, and the run continues")
    wandb_metadata: str = flag("", "entity:project of wandb")


def main(arguments: Sequence[str]) -> None:
    """Train and measure the student of a command line."""
    flags = parse(XXS, arguments, PROGRAM)
    print_lines(*notes_on_ignored(flags))
    check(flags)
    if flags.seed is None:
        flags = replace(flags, seed=random.SystemRandom().randrange(10**8))
        print_lines(f"--seed {flags.seed} was drawn.")
    run(flags)


def check(flags: XXS) -> None:
    """Raise DistillError for flags that do not go together, before anything is loaded."""
    layout_of(flags.task_name)
    if not flags.do_train:
        raise DistillError("--do_train is missing, and without it nothing is done; add --do_train.")
    if flags.bert_model is None and (
        flags.encoder_checkpoint_student is None or flags.encoder_checkpoint_teacher is None
    ):
        raise DistillError("--bert_model is missing: the student's layers come from it; add e.g. bert-base-uncased.")
    if flags.kd_model.lower() not in ("kd", "kd.cls"):
        raise DistillError(f"--kd_model {flags.kd_model} does not exist; choose kd, or kd.cls for the patient terms.")
    if not 0 <= flags.alpha <= 1:
        raise DistillError(f"--alpha {flags.alpha} is the share of kd, and 1 - alpha that of the labels; use 0 to 1.")
    if flags.beta and flags.kd_model.lower() == "kd":
        raise DistillError(f"--beta {flags.beta} weighs the patient terms, and --kd_model kd has none; use kd.cls.")
    if flags.beta and flags.fc_layer_idx is None:
        raise DistillError("--kd_model kd.cls compares layers of the teacher; name them: --fc_layer_idx 1,3,5,7,9.")
    if flags.interchange_max_token != -1 and flags.interchange_max_token < 1:
        raise DistillError(
            f"--interchange_max_token {flags.interchange_max_token} interchanges nothing; use 1 or more, or -1 for no "
            "limit."
        )


def weights_of(flags: XXS) -> dict[str, float]:
    """Return the weight of each term: α kd + (1 − α) labels + β pkd, and with DIITO + kd_cf + β pkd_cf."""
    patient = flags.beta if flags.kd_model.lower() == "kd.cls" else 0.0
    causal = 1.0 if flags.is_diito else 0.0
    weights = {
        "kd": flags.alpha,
        "labels": 1 - flags.alpha,
        "pkd": patient,
        "kd_cf": causal,
        "pkd_cf": causal * patient,
    }
    return {name: weight for name, weight in weights.items() if weight}


def objectives_of(flags: XXS, student_layers: int, teacher_layers: int) -> list[Objective]:
    """Return the objectives whose terms have a weight."""
    weights = weights_of(flags)
    patient = [_patience(flags, student_layers, teacher_layers)] if "pkd" in weights else []
    made: list[Objective] = [KD(flags.T, reduction="mean")] if "kd" in weights else []
    made += [Labels()] if "labels" in weights else []
    made += patient
    return made + ([_interchange(flags, [KD(flags.T, reduction="mean"), *patient])] if flags.is_diito else [])


def schedule_of(flags: XXS) -> Schedule:
    """Return the schedule of the training."""
    return Schedule(
        epochs=flags.num_train_epochs,
        batch_size=flags.train_batch_size,
        accumulate=flags.gradient_accumulation_steps,
        lr=flags.learning_rate,
        warmup=flags.warmup_proportion,
        weight_decay=0.01,
        clip=1.0,
        seed=flags.seed or 0,
    )


def run_name(flags: XXS, layers: int) -> str:
    """Return the name of the run's folder, as the original makes it."""
    model = f"{flags.kd_model}.{flags.normalize_patience}" if flags.kd_model == "kd.cls" else flags.kd_model
    return (
        f"{model}_{flags.task_name}_nlayer.{layers}_lr.{flags.learning_rate}_T.{flags.T}_alpha.{flags.alpha}"
        f"_beta.{flags.beta}_bs.{flags.train_batch_size}_diito.{flags.is_diito}_nm.{flags.neuron_mapping}"
        f"_intprop.{flags.interchange_prop}_intmax.{flags.interchange_max_token}"
        f"_intconsec.{flags.interchange_consecutive_only}_dtaug.{flags.data_augment}_dtpair.{flags.data_pair}"
        f"_maxex.{flags.max_training_examples}"
    ).replace("/", "-")


def tracking_of(flags: XXS, name: str) -> Tracking | None:
    """Return the settings of reports to wandb; None where none are requested."""
    if not flags.is_wandb:
        return None
    entity, _, project = flags.wandb_metadata.rpartition(":")
    run = flags.run_name or name
    return Tracking(project or "DIITO-XXS", entity or None, run, flags.log_interval, NAMES, asdict(flags))


def run(flags: XXS) -> None:
    """Load models and rows, train, measure, and print the figures."""
    weights = weights_of(flags)
    teacher = _teacher(flags) if weights.keys() - {"labels"} else None
    task, tokenizer = _task(flags, teacher)
    student = _student(flags, task)
    layers = depth(student)
    name = run_name(flags, layers)
    tracking = tracking_of(flags, name)
    objectives = objectives_of(flags, layers, depth(teacher or student))
    mapping = None if teacher is None else neuron_pairs(flags.neuron_mapping, teacher, student)
    trained = AT_EMBEDDING if flags.data_augment else mapping
    accelerator = accelerator_of(flags.fp16, tracking)
    folder = next_run(Path(flags.output_dir or home() / "outputs") / name)
    print_lines(
        formula(weights),
        *(f"  {' '.join(repr(objective).split())}" for objective in objectives),
        *([f"  interchanged: {', '.join(map(str, trained or ()))}"] if flags.is_diito else []),
        f"student of {layers} layers, {len(task.train)} training rows, {len(task.test)} held out",
        *DIFFERS,
    )
    result = fit(
        teacher,
        student,
        trained if flags.is_diito and trained else None,
        data=task.train,
        objective=objectives,
        weights=weights,
        schedule=schedule_of(flags),
        output_dir=folder,
        console=console_of(),
        title=task.name,
        accelerator=accelerator,
        tokenizer=tokenizer,
    )
    print_lines("measuring on the held-out rows: accuracy, and interchange accuracy, which takes a while")
    result = replace(result, evaluation=evaluate(teacher, student, mapping, task, positions=_span(flags)))
    result.save(folder)
    send(accelerator, tracking, result)
    print_lines(str(result), f"accuracy {result.accuracy}", f"results: {folder}")


def home() -> Path:
    """Return the folder of data and models."""
    return Path(os.environ.get("HOME_DATA_FOLDER", HOME))


def _patience(flags: XXS, student_layers: int, teacher_layers: int) -> Objective:
    """Return the objective of the term `pkd`.

    Raises:
        DistillError: teacher layers that do not exist, or another number than one for each student layer but the last.
    """
    try:
        above = [int(number) for number in (flags.fc_layer_idx or "").split(",")]
    except ValueError:
        above = []
    if not above or min(above) < 0 or max(above) >= teacher_layers:
        raise DistillError(
            f"--fc_layer_idx {flags.fc_layer_idx} does not name layers of this teacher, 0 to {teacher_layers - 1}; "
            "write numbers with commas, e.g. 1,3,5."
        )
    if len(above) != student_layers - 1:
        raise DistillError(
            f"--fc_layer_idx {flags.fc_layer_idx} names {len(above)} teacher layers, and the student has "
            f"{student_layers - 1} below its last; name one for each."
        )
    layers = {Location(layer): Location(below) for below, layer in enumerate(above)}
    return PKD(layers) if flags.normalize_patience else Patience(layers)


def _interchange(flags: XXS, match: Sequence[Objective]) -> DIITO:
    """Return the interchange objective, with what compares the counterfactual runs."""
    if flags.data_augment:
        return DIITO(Spliced(_span(flags)), positions=None, match=match, vacuous="keep")
    return DIITO(positions=_span(flags), match=match, vacuous="keep")


def _span(flags: XXS) -> Span:
    """Return the rule that draws positions."""
    most = None if flags.interchange_max_token == -1 else flags.interchange_max_token
    return Span(flags.interchange_prop, consecutive=flags.interchange_consecutive_only, most=most)


def _teacher(flags: XXS) -> nn.Module:
    """Load the teacher, with the head of another classifier where one is named."""
    teacher = load_classifier(_teacher_folder(flags))
    if flags.cls_checkpoint_teacher is not None:
        _take_head(teacher, _find_model(flags.cls_checkpoint_teacher))
    return teacher


def _teacher_folder(flags: XXS) -> str:
    """Return the folder or name of the teacher.

    Raises:
        DistillError: none is named, and there is none where the original keeps it.
    """
    if flags.encoder_checkpoint_teacher is not None:
        return _find_model(flags.encoder_checkpoint_teacher)
    folder = home() / "models" / "finetuned" / str(flags.bert_model) / str(flags.task_name)
    if not folder.is_dir():
        raise DistillError(
            f"there is no teacher in {folder}; name one: --encoder_checkpoint_teacher FOLDER_OR_NAME, or make one: "
            f"distill teach --task sst2 --data {home() / 'data_raw' / str(flags.task_name)} --from {flags.bert_model} "
            f"--output {folder}."
        )
    return str(folder)


def _student(flags: XXS, task: Task) -> nn.Module:
    """Make the student: the first layers of the encoder, and a new head."""
    encoder = flags.encoder_checkpoint_student
    whole = new_classifier(_pretrained(flags) if encoder is None else _find_model(encoder), task, flags.seed or 0)
    if flags.cls_checkpoint_student is not None:
        _take_head(whole, _find_model(flags.cls_checkpoint_student))
    count = depth(whole) if flags.student_hidden_layers is None else flags.student_hidden_layers
    return from_layers(whole, range(count))


def _task(flags: XXS, teacher: nn.Module | None) -> tuple[Task, Any]:
    """Return the task, and the tokenizer that it is read with."""
    tokenizer = load_tokenizer(_pretrained(flags) if teacher is None else _teacher_folder(flags))
    config: Any = getattr(teacher, "config", None)
    names: Mapping[int, str] = {} if config is None else config.id2label
    task = glue_task(
        str(flags.task_name),
        home() / "data_raw" / str(flags.task_name),
        tokenizer,
        max_length=flags.max_seq_length,
        first=flags.max_training_examples,
        names=[names[number] for number in sorted(names)],
    )
    return task, tokenizer


def _pretrained(flags: XXS) -> str:
    """Return the folder or name of the pretrained encoder."""
    folder = home() / "models" / "pretrained" / str(flags.bert_model)
    return str(folder) if folder.is_dir() else str(flags.bert_model)


def _find_model(name: str) -> str:
    """Return the folder of a model by its path below HOME_DATA_FOLDER/models, as the original does, or its name."""
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
