"""The options that several commands share, as typer reads them, with their help, and in groups."""

from pathlib import Path
from typing import Annotated

import typer

from distill.cli.options import choices
from distill.cli.options.choices import among, several
from distill.cli.options.config import read_config

Task = Annotated[
    str | None,
    typer.Option(
        autocompletion=among(choices.TASKS),
        help="pvr, agreement or sst2; text or chat for language models on your data; pvr where neither task nor data "
        "is given (digits, mnist: in Python).",
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="A folder for the task, or a .csv, .tsv or .jsonl file with a text and a label column, or texts alone."
    ),
]
EvalData = Annotated[
    Path | None, typer.Option(help="A file of held-out rows; a fifth of the data is held out otherwise.")
]
Text = Annotated[str | None, typer.Option(help="The text column of a file.")]
Label = Annotated[str | None, typer.Option(help="The label column of a file.")]
Classes = Annotated[
    str | None,
    typer.Option(
        help="The labels of the data in the order of the model's outputs, with commas; matched with the names in "
        "its configuration by default."
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option(help="Tokens at which texts of a file are cut; 128 by default, at most what the model reads."),
]
ParamDtype = Annotated[
    str | None,
    typer.Option(help="How half-precision weights are trained: float32, the default, or 'as loaded'."),
]
Clusters = Annotated[str | None, typer.Option(help="The column of what rows of a file share, for intervals.")]
SplitSeed = Annotated[
    int | None,
    typer.Option(help="Which rows of a file are held out; by default as for the teacher, whatever --seed is."),
]
Fraction = Annotated[float, typer.Option(help="The share of the training rows to use.")]
Epochs = Annotated[float | None, typer.Option(help="Passes over the training rows.")]
Steps = Annotated[int | None, typer.Option(help="Training steps, instead of epochs.")]
BatchSize = Annotated[int | None, typer.Option(help="Rows of a step.")]
LearningRate = Annotated[float | None, typer.Option(help="The learning rate.")]
Share = Annotated[float, typer.Option(help="The share of positions that are interchanged.")]
Seed = Annotated[int, typer.Option(help="Decides everything that is drawn.")]
Seeds = Annotated[
    list[int] | None,
    typer.Option(help="Train every student once with each, e.g. --seeds 0 1 2; rows and teacher are those of --seed."),
]
Teacher = Annotated[
    str | None,
    typer.Option(help="A classifier or language model: folder or hub name. Embedded tasks train their own."),
]
Packing = Annotated[
    str | None, typer.Option(help="Several texts in each row of a language model: best-fit, or 'in order'.")
]
BlockSize = Annotated[int | None, typer.Option(help="Tokens of a row in which several texts are packed.")]
StudentWidth = Annotated[int | None, typer.Option(help="Width of the student; the teacher's by default.")]
StudentUnits = Annotated[
    int | None, typer.Option(help="Feed-forward units of each layer of the student; the teacher's by default.")
]
StudentBy = Annotated[
    str,
    typer.Option(
        autocompletion=among(choices.CHOSEN_BY),
        help="Which layers and units a student has: by position, by importance on the data, or the layers of a search.",
    ),
]
OnPolicy = Annotated[
    float, typer.Option(help="The share of the steps on text that the student writes, for language models.")
]
NewTokens = Annotated[int, typer.Option(help="The most tokens that a student writes after a prompt.")]
PromptTokens = Annotated[
    int | None, typer.Option(help="The tokens at the beginning of a text after which the student writes (--task text).")
]
Cache = Annotated[Path | None, typer.Option(help="A folder that keeps the teacher's answers.")]
TopK = Annotated[int | None, typer.Option(help="The largest logits of an answer that are kept there; all by default.")]
EvalPairs = Annotated[
    int | None,
    typer.Option(
        help="Pairs of base and source that students are measured on; by default 100 to 2000, by the length of the "
        "training, and at most 200 of language models."
    ),
]
NoIIA = Annotated[bool, typer.Option("--no-iia", help="Measure no interchange accuracy (IIA).")]
Warmup = Annotated[float | None, typer.Option(help="The share of the steps over which the learning rate rises.")]
WeightDecay = Annotated[float | None, typer.Option(help="The weight decay.")]
Clip = Annotated[float | None, typer.Option(help="The largest norm of the gradient.")]
Accumulate = Annotated[int | None, typer.Option(help="Parts in which a step is computed, for less memory.")]
Optimizer = Annotated[str | None, typer.Option(autocompletion=among(choices.OPTIMIZERS), help="adamw, adam or sgd.")]
Decay = Annotated[
    str | None,
    typer.Option(
        autocompletion=among(choices.DECAYS),
        help="How the learning rate falls: linear, cosine, constant, or a name of transformers: cosine_with_restarts, "
        "…",
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        autocompletion=among(choices.PRECISIONS),
        help="Precision of the computation: bf16, fp16 or fp32; the weights stay in float32.",
    ),
]
Checkpointing = Annotated[
    bool | None, typer.Option(help="Compute activations of the student again for the gradients, for less memory.")
]
DecayOn = Annotated[
    str | None, typer.Option(autocompletion=among(choices.DECAYING), help="What weight decay is on: all, or matrices.")
]
Grouping = Annotated[
    bool | None, typer.Option(help="Batches of rows of similar length; where lengths differ, by default.")
]
Workers = Annotated[int | None, typer.Option(help="Processes that read rows in the background.")]
StudentLayers = Annotated[int | None, typer.Option(help="Layers of the student; half of the teacher's by default.")]
ObjectiveNames = Annotated[
    str | None,
    typer.Option(
        autocompletion=several(choices.OBJECTIVES),
        help="kd, diito (KD + interchange), augmented (KD, on texts with words replaced too), labels, dkd, icd, … (see "
        "distill objectives), or several with commas. By default kd, kd for as long as diito, diito, and on texts "
        "augmented, compared.",
    ),
]
ResumeFolder = Annotated[
    Path | None,
    typer.Option(
        help="The folder of a run that was stopped: continue it, as it was started. auto: start it in --output, or go "
        "on with it if it is there."
    ),
]
Every = Annotated[str, typer.Option(help='From one checkpoint to the next: steps, or a time as "10 minutes".')]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
SourceRule = Annotated[
    str | None,
    typer.Option(
        autocompletion=among(choices.SOURCES),
        help="Sources of interchanges: shuffle (the default), in-context, mixup or noise.",
    ),
]
Anyway = Annotated[
    bool, typer.Option("--anyway", help="Resume although the data, the teacher or a version has changed.")
]
Original = Annotated[str, typer.Argument(help="The original: the folder of a saved model, or its name on the hub.")]
Compressed = Annotated[str, typer.Argument(help="The compressed model, or adapters of peft, in the same way.")]
TextsOrTask = Annotated[
    str, typer.Option(help="A .csv, .tsv, .jsonl or .txt file of texts, all of its rows, or the name of a task.")
]
SliceBy = Annotated[str | None, typer.Option("--slice", help="A column of the file: agreement by its values.")]
MappedBlocks = Annotated[
    str | None, typer.Option(help="Blocks that stand for each other, as 0~0 3~1, or search; by default by weights.")
]
Temperature = Annotated[float, typer.Option(help="Of the softened answers.")]
Sigma = Annotated[float, typer.Option(help="Of mixup and noise, in units of each vector's own size.")]
AnyTeacher = Annotated[bool, typer.Option("--any-teacher", help="Accept a teacher no better than the majority class.")]

EvalEvery = Annotated[
    str | None, typer.Option(help='From one evaluation while training to the next: steps, or a time as "10 minutes".')
]
EvalRows = Annotated[int | None, typer.Option(help="Held-out rows that these take at most.")]
SaveBest = Annotated[
    str | None,
    typer.Option(
        help="Keep the student of the best evaluation: by perplexity, kl, error, accuracy, agreement or iia; best is "
        "the first of them that there is."
    ),
]
EarlyStopping = Annotated[
    int | None, typer.Option(help="End a training after so many evaluations in a row that were not better.")
]
Keep = Annotated[int | None, typer.Option(help="The number of checkpoints that stay.")]
Track = Annotated[
    list[str] | None, typer.Option(help="Trackers of the training: tensorboard, wandb, mlflow, …; may be given again.")
]
Push = Annotated[
    str | None,
    typer.Option(
        help="Upload the student to this repository of the hub, name/student, private if it is new; of several each to "
        "one with its own name behind."
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        is_eager=True,
        callback=read_config,
        help="A .toml or .yaml file with any of these options; what is given here too wins.",
    ),
]
Mapping = Annotated[
    str,
    typer.Option(
        autocompletion=among(choices.MAPPINGS),
        help="full, middle, late, single, search (by the first steps), or entries teacher~student.",
    ),
]
Pairs = Annotated[str | None, typer.Option(metavar="INTEGER", help="What --eval-pairs says.")]


class RowFlags:
    """The rows of a command: a task or a file."""

    task: Task = None
    data: Data = None
    eval_data: EvalData = None
    text: Text = None
    label: Label = None
    classes: Classes = None
    max_length: MaxLength = None
    split_seed: SplitSeed = None


class ClusterFlags:
    """The column of clusters."""

    clusters: Clusters = None


class PackingFlags:
    """The packing of texts for language models."""

    packing: Packing = None
    block_size: BlockSize = None


class LanguageFlags:
    """The training of language models: the text that they write, and the answers that are kept."""

    on_policy: OnPolicy = 0.0
    max_new_tokens: NewTokens = 128
    prompt_tokens: PromptTokens = None
    cache: Cache = None
    top_k: TopK = None
    eval_pairs: EvalPairs = None
    no_iia: NoIIA = False


class MonitorFlags:
    """The evaluation of a student while it is trained, and what comes of it."""

    eval_every: EvalEvery = None
    eval_rows: EvalRows = None
    save_best: SaveBest = None
    early_stopping: EarlyStopping = None
    keep: Keep = None
    track: Track = None


class StudentFlags:
    """The student: its layers, and the objectives that it is trained on."""

    teacher: Teacher = None
    student_layers: StudentLayers = None
    student_width: StudentWidth = None
    student_intermediate: StudentUnits = None
    student_by: StudentBy = "position"
    mapping: Mapping = "full"
    objective: ObjectiveNames = None
    sources: SourceRule = None
    pairs: Pairs = None
    temperature: Temperature = 2.0
    share: Share = 0.3
    sigma: Sigma = 1.0


class ScheduleFlags:
    """The schedule of a training."""

    fraction: Fraction = 1.0
    epochs: Epochs = None
    steps: Steps = None
    batch_size: BatchSize = None
    lr: LearningRate = None
    param_dtype: ParamDtype = None
    warmup: Warmup = None
    weight_decay: WeightDecay = None
    clip: Clip = None
    accumulate: Accumulate = None
    optimizer: Optimizer = None
    decay: Decay = None
    workers: Workers = None
    precision: Precision = None
    gradient_checkpointing: Checkpointing = None
    weight_decay_on: DecayOn = None
    group_by_length: Grouping = None
