"""The settings of `distill fit`, and the file `command.json` of a run that keeps them."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distill.alignment.after_kd import SEARCH
from distill.cli.options.config import RUN, as_toml
from distill.cli.options.groups import (
    DataOptions,
    InterchangeOptions,
    MonitorOptions,
    ScheduleOptions,
    StudentOptions,
    pairs_of_options,
    sources_of,
)
from distill.cli.students import ON_KD, USUAL, StudentPlan, is_language, plan_of
from distill.data.task import Task
from distill.errors import DistillError
from distill.evaluation.measurement import check_pairs, usual_pairs
from distill.interchange.sources import InContext
from distill.objectives import (
    AT,
    BSS,
    CRD,
    DKD,
    ICD,
    KD,
    PKD,
    Augmented,
    Cosine,
    FitNets,
    Labels,
    Objective,
    Sobolev,
    TinyBERT,
)
from distill.storage.files import read_json, write, write_json
from distill.training.checkpoints import STEPS, Every
from distill.training.resolve import keep_supported
from distill.training.run_folder import STUDENT
from distill.writing.written import Written

COMMAND = "command.json"
PLAIN = {"labels": Labels, "dkd": DKD, "icd": ICD, "crd": CRD, "cosine": Cosine, "pkd": PKD, "fitnets": FitNets,
         "at": AT, "tinybert": TinyBERT, "sobolev": Sobolev, "bss": BSS}  # fmt: skip
GROUPS: Mapping[str, Any]
GROUPS = {
    "source": DataOptions, "timing": ScheduleOptions, "interchanges": InterchangeOptions, "smaller": StudentOptions,
    "monitored": MonitorOptions,
}  # fmt: skip
"""The settings that are groups of options."""
FULL = "full"
KINDS_COMPARED = 8
"""The kinds of interchange over which several students are compared: the usual ones and that of the training."""
PAIRS_OF_LANGUAGE = 200
"""Pairs of base and source that language models are measured on at most, as their answers are long."""
OF_WRITING = ("prompt_tokens", "max_new_tokens")
"""Options that mean nothing without `--on-policy`."""
OBJECTIVES = ("kd", *ON_KD, *PLAIN)


@dataclass(frozen=True)
class FitCommand:
    """The settings of one `distill fit`."""

    source: DataOptions = field(default_factory=DataOptions)
    timing: ScheduleOptions = field(default_factory=ScheduleOptions)
    interchanges: InterchangeOptions = field(default_factory=InterchangeOptions)
    smaller: StudentOptions = field(default_factory=StudentOptions)
    monitored: MonitorOptions = field(default_factory=MonitorOptions)
    teacher: str | None = None
    objective: str | None = None
    temperature: float = 2.0
    seed: int = 0
    any_teacher: bool = False
    seeds: tuple[int, ...] = ()
    every: int | str = STEPS
    on_policy: float = 0.0
    max_new_tokens: int = 128
    prompt_tokens: int | None = None
    cache: str | None = None
    top_k: int | None = None
    eval_pairs: int | None = None
    no_iia: bool = False

    def __post_init__(self) -> None:
        Every.of(self.every)
        if self.eval_pairs is not None:
            check_pairs(self.eval_pairs)
            if self.no_iia:
                raise DistillError(
                    f"--no-iia measures no interchanges and --pairs {self.eval_pairs} says on how many; leave one of "
                    "them out."
                )
        unused = next((name for name in OF_WRITING if getattr(self, name) != getattr(type(self), name)), None)
        if unused is not None and not self.on_policy:
            option = f"--{unused.replace('_', '-')} {getattr(self, unused)}"
            raise DistillError(
                f"{option} is about text that the student writes, and it writes none; add the share of the steps, "
                f"{option} --on-policy 0.5, or leave it out."
            )
        twice = next((each for each in self.seeds if self.seeds.count(each) > 1), None)
        if twice is not None:
            raise DistillError(
                f"--seeds {' '.join(map(str, self.seeds))} names {twice} twice, and one seed gives one student; name "
                "different ones: --seeds 0 1 2."
            )

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "FitCommand":
        """Build it from what `asdict` returned.

        Raises:
            KeyError: a group of options is missing.
            TypeError: a setting is not known.
        """
        groups: dict[str, Callable[..., Any]] = {**GROUPS, "interchanges": InterchangeOptions.of}
        settings = {**settings, "seeds": tuple(settings.get("seeds", ()))}  # runs of an earlier version had one seed
        layers = settings.pop("student_layers", None)  # as did those that had no other parts to choose
        settings = {"smaller": {"student_layers": layers}, "monitored": {}, **settings}
        missing = next((name for name in groups if name not in settings), None)
        if missing is not None:
            raise KeyError(missing)
        return cls(**{name: groups[name](**value) if name in groups else value for name, value in settings.items()})

    @classmethod
    def of_options(cls, options: Mapping[str, Any]) -> "FitCommand":
        """Build it from the options of the command line, by their names."""
        pairs, eval_pairs = pairs_of_options(options.get("pairs"), options.get("eval_pairs"))
        sources = sources_of(options["sources"], pairs)
        cache = options.get("cache")
        given = {**options, "sources": sources, "seeds": tuple(options.get("seeds") or ()), "eval_pairs": eval_pairs}
        given["cache"] = None if cache is None else str(cache)
        own = {each.name for each in fields(cls)} - GROUPS.keys()
        groups = {name: group.of_options(given) for name, group in GROUPS.items()}
        return cls(**groups, **{name: value for name, value in given.items() if name in own})

    @property
    def options(self) -> dict[str, Any]:
        """The options of the command line that stand for these settings, by name."""
        settings = asdict(self)
        shared = {name: value for group in GROUPS for name, value in settings.pop(group).items()}
        return {**shared, **settings}

    @classmethod
    def read(cls, run: Path) -> "FitCommand":
        """Read the settings that a run was started with.

        Raises:
            DistillError: the file is damaged, or of a version whose settings are not known.
        """
        path = run / COMMAND
        settings = read_json(path, f"start it anew with the same options: distill fit --output {run}-2")
        try:
            return cls.of(settings)
        except (TypeError, KeyError, AttributeError) as error:
            raise DistillError(
                f"{path} is none of this version's ({error}); start the run anew: distill fit --output {run}-2."
            ) from None

    def write(self, run: Path) -> None:
        """Write the settings into the folder of a run, also as a file for `--config`."""
        write_json(run / COMMAND, asdict(self))
        write(run / RUN, as_toml(self.options))

    @property
    def training_seeds(self) -> tuple[int, ...]:
        """The seeds of the trainings of each student; the first is that of the rows and the teacher too."""
        return self.seeds or (self.seed,)

    @property
    def students(self) -> tuple[StudentPlan, ...]:
        """The students to train, on a task that suits them."""
        return USUAL if self.objective is None else (plan_of(self.objective),)

    def interchanges_of(self, run: Path) -> InterchangeOptions:
        """Return the settings of the interchanges of a run, with the mapping that it searched, if it did."""
        kept = run / "mapping.json"
        if not kept.is_file():
            return self.interchanges
        searched = read_json(kept, f"search it again: distill fit --resume {run}")["mapping"]
        return replace(self.interchanges, mapping=searched)

    def folder_of(self, run: Path, plan: StudentPlan, seed: int) -> Path:
        """Return the folder in which a run keeps one of its students, of one seed."""
        return plan.saved_in(run / f"seed-{seed}" if len(self.training_seeds) > 1 else run)

    def title_of(self, plan: StudentPlan, seed: int) -> str:
        """Return the name of a student of one seed in tables."""
        return f"{plan.title}, seed {seed}" if len(self.training_seeds) > 1 else plan.title

    def plans_by_seed(self, run: Path) -> list[tuple[StudentPlan, int]]:
        """Return the students that a run has begun, each with its seed: some of the usual ones are on texts alone."""
        return [
            (plan, seed)
            for plan in self.students
            for seed in self.training_seeds
            if self.objective is not None or self.folder_of(run, plan, seed).exists()
        ]

    def folders(self, run: Path) -> dict[str, Path]:
        """Return the folders of the saved students of a run, by their names in tables."""
        folders = {self.title_of(*each): self.folder_of(run, *each) / STUDENT for each in self.plans_by_seed(run)}
        return {title: folder for title, folder in folders.items() if folder.exists()}

    def student(self, teacher: nn.Module, task: Task) -> nn.Module:
        """Make a student of parts of the teacher: of half as many layers, unless a number was requested."""
        return self.smaller.make(teacher, task.train)

    def data(self, task: Task) -> Any:
        """Return what the students are trained on: the rows of the task, or those that they write themselves."""
        if not self.on_policy:
            return task.train
        return Written(
            task.train, share=self.on_policy, max_new_tokens=self.max_new_tokens, prompt_tokens=self.prompt_tokens
        )

    def pairs_of(self, task: Task, places: int) -> int:
        """Return the number of pairs that each student is measured on; 0 where no interchange is measured.

        Unless it is given, it is chosen so that measuring takes about a third of the training at most, and is at most
        `PAIRS_OF_LANGUAGE` for language models.

        Args:
            task: what is learned.
            places: how many places are mapped.
        """
        if self.eval_pairs is not None:
            return self.eval_pairs
        plans = [plan for plan in self.students if plan.suits(task)]
        trained = any(each.interchanges for plan in plans for each in self.objectives(plan.objectives))
        if self.no_iia or not (trained or self.interchanges.mapping != FULL):
            return 0
        schedule = self.timing.schedule(task, self.seed)
        rows = schedule.total(len(task.train)) * schedule.batch_size
        compared = len(plans) > 1 and not is_language(task)  # over the usual kinds too, and the untrained student
        usual = usual_pairs(rows, places * (1 + KINDS_COMPARED * compared))
        return min(usual, PAIRS_OF_LANGUAGE) if is_language(task) else usual

    def check(self, teacher: nn.Module, task: Task) -> None:
        """Raise DistillError for sources, a student, a mapping or a schedule that are impossible.

        The teacher need not be trained.
        """
        if not hasattr(teacher, "config"):
            raise DistillError(
                f"the teacher of {task.name} is a {type(teacher).__name__}, and students on the command line are some "
                f"layers of a transformer; in Python: task = distill.tasks.load({task.name!r}); distill.fit("
                "distill.teacher_of(task), distill.networks.MLP(64), data=task, objective=distill.KD(5.0))."
            )
        self._check_columns(task)
        self.interchanges.check(task)
        smaller = replace(self.smaller, student_by="position").make(teacher, task.train)
        mapping = "full" if self.interchanges.mapping == SEARCH else self.interchanges.mapping  # both have layers
        replace(self.interchanges, mapping=mapping).mapped(teacher, smaller)
        self._check_language(task)
        self.timing.schedule(task, self.seed)
        for plan in (each for each in self.students if each.suits(task)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # fit gives the same warnings
                keep_supported(self.objectives(plan.objectives), task.train)

    def _check_columns(self, task: Task) -> None:
        """Raise DistillError for objectives that replace words of rows without any."""
        if self.objective is not None and not self.students[0].suits(task):
            raise DistillError(
                f"--objective augmented replaces tokens, and the rows of {task.name} are "
                f"{', '.join(task.train.columns)}; use --objective kd."
            )

    def _check_language(self, task: Task) -> None:
        """Raise DistillError for settings of language models beside rows of another kind."""
        given = [name for name, value in (("--on-policy", self.on_policy), ("--block-size", self.source.block_size),
                                          ("--packing", self.source.packing)) if value]  # fmt: skip
        if given and not is_language(task):
            raise DistillError(
                f"{given[0]} is for language models, and the rows of {task.name} are of others; use --task text or "
                "--task chat, or leave it out."
            )
        if self.on_policy:
            self.data(task)  # raises DistillError for a share that is none

    def objectives(self, student: str, words: Tensor | None = None) -> list[Objective]:
        """Return the objectives of one student.

        Args:
            student: names of objectives with commas between them; `diito` stands for KD and interchange, `augmented`
                for KD on the rows and on the same with words replaced.
            words: ids of whole words, by which others are replaced; None where there is no tokenizer.
        """
        names = student.split(",")
        unknown = next((name for name in names if name not in OBJECTIVES), None)
        if unknown is not None:
            raise DistillError(
                f"--objective {unknown} does not exist: choose of {', '.join(OBJECTIVES)}, several with commas."
            )
        match = KD(self.temperature)
        made: list[Objective] = [KD(self.temperature)] if {"kd", *ON_KD} & set(names) else []
        made += [self.interchanges.objective(match, words)] if "diito" in names else []
        made += [Augmented(InContext(words=words), match=match)] if "augmented" in names else []
        return made + [PLAIN[name]() for name in names if name in PLAIN]
