"""What the commands of the command line do."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from torch import Tensor, nn

from distill.cli.report import Entry, Report
from distill.data.seen_rows import SeenRows
from distill.data.task import Task
from distill.data.trained_on import split_seed_of, without_trained_on
from distill.errors import DistillError, checked
from distill.evaluation.evaluate import Evaluation, evaluate
from distill.fit import fit
from distill.interchange.mapping import Sides, as_mapping, depth, mapping_of, pairs_of
from distill.interchange.positions import Span
from distill.interchange.sources import InContext, Shuffle
from distill.models.inputs import vocabulary_of
from distill.models.numbering import numbered_as
from distill.models.pretrained import load_classifier, load_tokenizer, new_classifier, save_teacher
from distill.objectives import (
    AT,
    BSS,
    CRD,
    DIITO,
    DKD,
    ICD,
    KD,
    PKD,
    Cosine,
    FitNets,
    Labels,
    Objective,
    Sobolev,
    TinyBERT,
)
from distill.results import FitResult
from distill.storage.files import check_folder_whole, clear_leftovers, read_json, remove_empty, write_json
from distill.storage.locks import claim, locked
from distill.students.from_layers import from_layers
from distill.tasks import load
from distill.tasks.loading import length_for
from distill.teach import check_teacher, teach, teacher_of
from distill.training.checks import check
from distill.training.progress import console_of
from distill.training.resolve import supported
from distill.training.run_folder import RESULT, STUDENT, Interrupted, Resume, read_log, refuse_used
from distill.training.schedule import Schedule
from interventions import Mixup, Noise, printable

COMMAND = "command.json"
SOURCES = ("shuffle", "in-context", "mixup", "noise")
PLAIN = {"labels": Labels, "dkd": DKD, "icd": ICD, "crd": CRD, "cosine": Cosine, "pkd": PKD, "fitnets": FitNets,
         "at": AT, "tinybert": TinyBERT, "sobolev": Sobolev, "bss": BSS}  # fmt: skip
OBJECTIVES = ("kd", "diito", *PLAIN)
NAMES = {"kd": "KD", "diito": "KD + interchange"}
"""How students are called in the table, by what was asked for."""


@dataclass(frozen=True)
class Source:
    """Which rows: a task or a file, and how much of it."""

    task: str | None = None
    data: str | None = None
    eval_data: str | None = None
    text: str | None = None
    label: str | None = None
    fraction: float = 1.0
    classes: str | None = None
    max_length: int | None = None
    split_seed: int | None = None

    def split_as(self, teacher: Path) -> "Source":
        """With the split that a teacher was trained by, unless another was asked for."""
        return self if self.split_seed is not None else replace(self, split_seed=split_seed_of(teacher))

    def load(self, tokenizer: Any, seed: int, model: nn.Module | None = None) -> Task:
        """The task; pvr where nothing was named. Texts of a file are cut to what the model reads."""
        name = "pvr" if self.task is None and self.data is None else self.task
        options: dict[str, Any] = {
            "data": self.data, "eval_data": self.eval_data, "text": self.text, "label": self.label,
            "classes": None if self.classes is None else [name.strip() for name in self.classes.split(",")],
            "max_length": self.max_length if name is not None or model is None else length_for(model, self.max_length),
        }  # fmt: skip
        split = 0 if self.split_seed is None else self.split_seed
        return load(name, tokenizer=tokenizer, fraction=self.fraction, seed=seed, split_seed=split, **options)

    @property
    def name(self) -> str:
        """For folders."""
        return self.task or (Path(self.data).name.split(".")[0] if self.data else "pvr")


@checked
@dataclass(frozen=True)
class Timing:
    """Settings of the schedule that were given."""

    epochs: float | None = None
    steps: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    param_dtype: str | None = None

    def schedule(self, task: Task, seed: int) -> Schedule:
        """Of a student: as the task says, three epochs where its teacher is given; with what was asked for."""
        schedule = Schedule.of(task.student or task.recipe, seed)
        if task.network is None or self.epochs is not None:
            schedule = replace(schedule, steps=None, epochs=3)
        return replace(schedule, **{name: value for name, value in asdict(self).items() if value is not None})


@dataclass(frozen=True)
class Interchanges:
    """How interchanges are made."""

    mapping: str = "full"
    sources: str = "shuffle"
    share: float = 0.3
    sigma: float = 1.0

    @classmethod
    def of(cls, **told: Any) -> "Interchanges":
        """As `asdict` wrote it, also that of the version before, which called the sources pairs."""
        return cls(**{"sources" if name == "pairs" else name: value for name, value in told.items()})

    def __post_init__(self) -> None:
        if self.sources not in SOURCES:
            raise DistillError(f"--sources {self.sources} does not exist: choose one of {', '.join(SOURCES)}.")
        if not 0 <= self.sigma < inf:
            raise DistillError(f"--sigma {self.sigma} is no size of noise; use a finite number of 0 or more.")
        Span(self.share)  # raises early

    @property
    def positions(self) -> Span:
        """The rule that draws positions, in training and in measuring."""
        return Span(self.share)

    def mapped(self, teacher: nn.Module, student: nn.Module) -> Sides:
        """The mapping between two models, every location checked."""
        return as_mapping(pairs_of(mapping_of(self.mapping, teacher, student), teacher, student))

    def check(self, task: Task) -> None:
        """Raise for sources that the task's rows cannot give."""
        if self.sources == "in-context" and "input_ids" not in task.train.columns:
            raise DistillError(
                f"--sources in-context replaces tokens, and the rows of {task.name} are "
                f"{', '.join(task.train.columns)}; use --sources shuffle."
            )

    def objective(self, match: Objective, words: Tensor | None) -> DIITO:
        """The interchange objective."""
        if self.sources in ("mixup", "noise"):
            op = (Mixup if self.sources == "mixup" else Noise)(self.sigma)
            return DIITO(op=op, positions=self.positions, match=match)
        sources = Shuffle() if self.sources == "shuffle" else InContext(words=words)
        return DIITO(sources, positions=self.positions, match=match)


@dataclass(frozen=True)
class FitCommand:
    """`distill fit`, as asked."""

    source: Source = field(default_factory=Source)
    timing: Timing = field(default_factory=Timing)
    interchanges: Interchanges = field(default_factory=Interchanges)
    teacher: str | None = None
    student_layers: int | None = None
    objective: str | None = None
    temperature: float = 2.0
    seed: int = 0
    any_teacher: bool = False

    @classmethod
    def of(cls, told: dict[str, Any]) -> "FitCommand":
        """As `asdict` wrote it."""
        parts: dict[str, Callable[..., Any]]
        parts = {"source": Source, "timing": Timing, "interchanges": Interchanges.of}
        lacking = next((name for name in parts if name not in told), None)
        if lacking is not None:
            raise KeyError(lacking)
        return cls(**{name: parts[name](**value) if name in parts else value for name, value in told.items()})

    @property
    def students(self) -> tuple[str, ...]:
        """The students to train, by their objectives."""
        return ("kd", "diito") if self.objective is None else (self.objective,)

    def check(self, teacher: nn.Module, task: Task) -> None:
        """Raise for sources, a student, a mapping or a schedule that cannot be; the teacher need not be trained."""
        if not hasattr(teacher, "config"):
            raise DistillError(
                f"the teacher of {task.name} is a {type(teacher).__name__}, and students on the command line are some "
                f"layers of a transformer; in Python: task = distill.tasks.load({task.name!r}); distill.fit("
                "distill.teacher_of(task), distill.networks.MLP(64), data=task, objective=distill.KD(5.0))."
            )
        self.interchanges.check(task)
        self.interchanges.mapped(teacher, _smaller(teacher, self.student_layers))
        self.timing.schedule(task, self.seed)
        for student in self.students:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # fit says it again
                supported(self.objectives(student), task.train)

    def objectives(self, student: str, words: Tensor | None = None) -> list[Objective]:
        """What one student is trained on: `diito` is KD and interchange, several names stand with commas."""
        names = student.split(",")
        unknown = next((name for name in names if name not in OBJECTIVES), None)
        if unknown is not None:
            raise DistillError(
                f"--objective {unknown} does not exist: choose of {', '.join(OBJECTIVES)}, several with commas."
            )
        match = KD(self.temperature)
        made: list[Objective] = [KD(self.temperature)] if {"kd", "diito"} & set(names) else []
        made += [self.interchanges.objective(match, words)] if "diito" in names else []
        return made + [PLAIN[name]() for name in names if name in PLAIN]


def sources_of(sources: str | None, pairs: str | None) -> str:
    """Return what `--sources` says, or `--pairs`, as the version before called it."""
    if pairs is None:
        return SOURCES[0] if sources is None else sources
    if sources is not None:
        raise DistillError(f"--sources {sources} and --pairs {pairs} are one option; leave --pairs out.")
    print(printable(f"distill: --pairs is deprecated; write --sources {pairs}."), file=sys.stderr)
    return pairs


def run_fit(command: FitCommand, output: Path | None = None) -> Path | None:
    """Train the students that were asked for, compare them with the teacher, and write the report; returns its path."""
    for student in command.students:
        command.objectives(student)
    if output is not None:
        refuse_used(output)
    with _claimed(command.source.name) if output is None else _made(output) as folder, locked(folder):
        refuse_used(folder)
        return _fit(command, folder, resume=False)


def resume_fit(folder: Path, *, anyway: bool = False) -> Path | None:
    """Go on with a run that was stopped, as it was started; with `anyway` also where its data or teacher changed."""
    told = folder / COMMAND
    if not told.exists():
        raise DistillError(
            f"{folder} holds no run of distill fit to go on with; start one: distill fit --output {folder}."
        )
    with locked(folder):
        clear_leftovers(folder)
        return _fit(_command_of(folder), folder, resume="anyway" if anyway else True)


def _command_of(folder: Path) -> FitCommand:
    """What a run was started with."""
    path = folder / COMMAND
    told = read_json(path, f"start it anew with the same options: distill fit --output {folder}-2")
    try:
        return FitCommand.of(told)
    except (TypeError, KeyError, AttributeError) as error:
        raise DistillError(
            f"{path} is none of this version's ({error}); start the run anew: distill fit --output {folder}-2."
        ) from None


@contextmanager
def _claimed(name: str) -> Iterator[Path]:
    """`runs/NAME-N` with the first N that is free, made now, so that no other job takes it; gone if nothing is kept."""
    folder = claim(lambda number: Path("runs") / f"{name}-{number}")
    try:
        yield folder
    finally:
        remove_empty(folder)
        remove_empty(folder.parent)


@contextmanager
def _made(folder: Path) -> Iterator[Path]:
    """A folder, made if need be; gone if nothing is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        remove_empty(folder)


def _fit(command: FitCommand, folder: Path, *, resume: Resume) -> Path | None:
    console = console_of()
    task, teacher, tokenizer = _task_and_teacher(command.source, command.teacher, command.seed, console, command.check)
    measured = None if command.any_teacher else check_teacher(teacher, task)
    told = Evaluation(measured, None) if measured is not None else _told(teacher, task)
    student = _smaller(teacher, command.student_layers)
    mapping = command.interchanges.mapped(teacher, student)
    schedule = command.timing.schedule(task, command.seed)
    write_json(folder / COMMAND, asdict(command))
    entries = [Entry("teacher", depth(teacher), _parameters(teacher), told)]
    for name in command.students:
        result = _student(
            teacher,
            _smaller(teacher, command.student_layers),
            mapping,
            task,
            objective=command.objectives(name, _words(tokenizer)),
            schedule=schedule,
            output_dir=folder / name.replace(",", "+"),
            resume=resume,
            console=console,
            title=NAMES.get(name, name),
            positions=command.interchanges.positions,
            tokenizer=tokenizer,
        )
        evaluation, seconds = result.evaluation, result.seconds
        entries.append(Entry(NAMES.get(name, name), depth(student), _parameters(student), evaluation, seconds, result))
    title = f"{task.name}: a teacher of {depth(teacher)} layers, students of {depth(student)}"
    settings = {**asdict(command), "schedule": asdict(schedule)}
    return _show(Report(title, task, entries, settings), console, folder)


def _student(
    teacher: nn.Module,
    student: nn.Module,
    mapping: Sides,
    task: Task,
    *,
    positions: Span,
    output_dir: Path,
    **settings: Any,
) -> FitResult:
    """Train and measure one student, every one by the same rule of positions."""
    result = _trained(teacher, student, mapping, task, output_dir=output_dir, **settings)
    result = replace(result, evaluation=evaluate(teacher, student, mapping, task, positions=positions))
    result.save(output_dir)
    return result


def _trained(
    teacher: nn.Module,
    student: nn.Module,
    mapping: Sides,
    task: Task,
    *,
    output_dir: Path,
    resume: Resume,
    **settings: Any,
) -> FitResult:
    """Train one student; in a resumed run, one that is finished is read back and one that never began is begun."""
    if resume and (output_dir / RESULT).exists():
        try:
            with locked(output_dir):
                clear_leftovers(output_dir)
                return _finished(student, output_dir)
        except DistillError as error:
            warnings.warn(f"{error} The student goes on from its last checkpoint.", stacklevel=2)
    resume = resume if output_dir.exists() else False
    try:
        return fit(teacher, student, mapping, task.train, output_dir=output_dir, resume=resume, **settings)
    except Interrupted as stop:
        raise Interrupted(
            f"{str(stop).split('; go on')[0]}; go on with: distill fit --resume {output_dir.parent}"
        ) from None


def _finished(student: nn.Module, folder: Path) -> FitResult:
    """What a student became that is finished, put back into it.

    Raises:
        DistillError: a file is damaged.
    """
    told, trained_on = read_json(folder / RESULT, "it is made again"), SeenRows.load(folder / STUDENT)
    check_folder_whole(folder / STUDENT, "it is made again")
    saved = load_classifier(folder / STUDENT)
    student.to(next(saved.parameters()).dtype).load_state_dict(saved.state_dict())
    records, nothing = tuple(read_log(folder)), Evaluation(None, None)
    return FitResult(student, records, nothing, told["settings"], told["seconds"], folder, trained_on)


def run_evaluate(
    run: Path | None,
    source: Source,
    teacher: str | None,
    student: Path | None,
    interchanges: Interchanges,
    pairs: int,
    seed: int,
) -> None:
    """Measure the students of a run, or one student against its teacher, and print the table."""
    console = console_of()
    if run is not None:
        _refuse_other_than_run(run, student, teacher, source, interchanges)
        if not (run / COMMAND).exists():
            raise DistillError(f"{run} holds no run of distill fit; name its folder, or give --student and --teacher.")
        command = _command_of(run)
        source, teacher, interchanges = command.source, command.teacher, command.interchanges
        found = {NAMES.get(name, name): run / name.replace(",", "+") / "student" for name in command.students}
        first_seed = command.seed
    elif student is not None:
        found, first_seed = {student.name: student}, seed
    else:
        raise DistillError("nothing to evaluate was named: give the folder of a run, or --student FOLDER.")
    task, model, _ = _task_and_teacher(source, teacher, first_seed, console, lambda _, task: interchanges.check(task))
    for name, folder in found.items():
        task = _unseen(task, folder, f"student {name}", console)
    entries = [Entry("teacher", depth(model), _parameters(model), _told(model, task))]
    for name, folder in found.items():
        loaded = load_classifier(folder)
        check(model, loaded, task.test)
        mapping = interchanges.mapped(model, loaded)
        evaluation = evaluate(model, loaded, mapping, task, positions=interchanges.positions, pairs=pairs, seed=seed)
        entries.append(Entry(name, depth(loaded), _parameters(loaded), evaluation))
    _show(Report(f"{task.name}: held-out pairs, seed {seed}", task, entries, {}), console, None)


def _refuse_other_than_run(
    run: Path, student: Path | None, teacher: str | None, source: Source, interchanges: Interchanges
) -> None:
    """Raise where a run is to be measured, whose data, models and mapping are its own, and others were named too."""
    named = {"--student": student, "--teacher": teacher, **{f"--{key}": value for key, value in asdict(source).items()}}
    given = [name.replace("_", "-") for name, value in named.items() if value not in (None, 1.0)]
    given += [] if interchanges == Interchanges() else ["--mapping or --share"]
    if given:
        raise DistillError(
            f"{run} is measured as it was trained, on its own data, and {', '.join(given)} was given too; leave that "
            "out, or the run: --student FOLDER --teacher FOLDER --data FILE."
        )


def run_teach(source: Source, encoder: str | None, timing: Timing, seed: int, output: Path, *, resume: Resume) -> None:
    """Train a teacher and save it with its tokenizer."""
    console = console_of()
    if not resume:
        refuse_used(output)
    if encoder is None and (source.task == "sst2" or source.data is not None):
        raise DistillError(f"{source.name!r} needs an encoder to fine-tune; name one: --from FOLDER_OR_NAME.")
    tokenizer = load_tokenizer(encoder) if encoder is not None and source.task not in ("pvr",) else None
    with _noted(console):
        task = source.load(tokenizer, seed)
    if not task.classes:
        raise DistillError(
            f"{source.name!r} has no labels to teach; add a column of them, 'label', or name it: --label COLUMN."
        )
    if encoder is not None:
        network = new_classifier(encoder, task, seed)
    elif task.network is not None:
        network = task.network(seed)
    else:
        raise DistillError(f"task {task.name!r} needs an encoder to fine-tune; name one: --from FOLDER_OR_NAME.")
    given: dict[str, Any] = {name: value for name, value in asdict(timing).items() if value is not None}
    schedule = replace(Schedule.of(task.recipe, seed), **{**({"steps": None} if "epochs" in given else {}), **given})
    result = teach(network, task, schedule=schedule, output_dir=output, resume=resume, console=console)
    save_teacher(network, tokenizer, output, result.seen, source.split_seed or 0)
    console.print(f"accuracy {result.evaluation.accuracy}, the most common class {task.majority:.3f}", highlight=False)
    console.print(f"teacher: {output}", markup=False, highlight=False, soft_wrap=True)


def _task_and_teacher(
    source: Source,
    teacher: str | None,
    seed: int,
    console: Console,
    check_fits: Callable[[nn.Module, Task], None],
) -> tuple[Task, nn.Module, Any]:
    """The task with its teacher and the tokenizer that both read with, if any; all is checked before any training."""
    if teacher is None:
        if source.task == "sst2" or (source.task is None and source.data is not None):
            _needs_teacher(source)
        task = source.load(None, seed)
        if task.network is not None:
            check_fits(task.network(seed), task)
        return task, teacher_of(task, seed=seed, console=console), None
    model = load_classifier(teacher)
    tokenizer = None if vocabulary_of(model) is None or source.name == "agreement" else load_tokenizer(teacher)
    with _noted(console):
        task = numbered_as(source.split_as(Path(teacher)).load(tokenizer, seed, model), model)
    task = _unseen(task, Path(teacher), "the teacher", console)
    check(None, model, task.train)
    check(None, model, task.test)
    check_fits(model, task)
    return task, model, tokenizer


def _unseen(task: Task, folder: Path, whose: str, console: Console) -> Task:
    """The task without the held-out rows that a saved network was trained on, which are counted."""
    task, told = without_trained_on(task, folder, whose)
    if told:
        console.print(f"note: {told}", markup=False, highlight=False, soft_wrap=True)
    return task


@contextmanager
def _noted(console: Console) -> Iterator[None]:
    """Print what the packages warn of inside the block, each in one line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for message in dict.fromkeys(str(each.message) for each in caught if each.category is UserWarning):
        console.print(f"note: {message}", markup=False, highlight=False, soft_wrap=True)


def _told(teacher: nn.Module, task: Task) -> Evaluation:
    """The accuracy of a teacher; nothing where there are no labels, which is said of its students."""
    return Evaluation(None, None) if task.majority is None else evaluate(None, teacher, None, task)


def _needs_teacher(source: Source) -> NoReturn:
    if source.data is not None and not Path(source.data).exists():
        raise DistillError(f"--data {source.data} does not exist; name a file or folder that does.")
    told = f"--task {source.task}" if source.task else f"--data {source.data}"
    raise DistillError(
        f"{told} has no teacher of its own; give a classifier trained on it (--teacher NAME_OR_FOLDER), or make one: "
        f"distill teach {told} --from ENCODER --output teacher."
    )


def _smaller(teacher: nn.Module, count: int | None) -> nn.Module:
    return from_layers(teacher, max(1, depth(teacher) // 2) if count is None else count)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _words(tokenizer: Any) -> Tensor | None:
    """The ids of whole words, for in-context sources; None for a model without a tokenizer."""
    if tokenizer is None:
        return None
    special = set(tokenizer.all_special_ids)
    words = [
        i for word, i in tokenizer.get_vocab().items() if i not in special and not word.startswith(("##", "[unused"))
    ]
    return torch.tensor(sorted(words))


def _show(report: Report, console: Console, folder: Path | None) -> Path | None:
    console.print(report.table())
    measured = [entry.evaluation.interchange for entry in report.entries]
    notes = [note for each in measured if each is not None for note in each.notes]
    for note in dict.fromkeys([*notes, *(entry.evaluation.note for entry in report.entries if entry.evaluation.note)]):
        console.print(note, markup=False, highlight=False)
    if folder is None:
        return None
    path = report.save(folder)
    console.print(f"report: {path}", markup=False, highlight=False, soft_wrap=True)
    return path
