"""The arguments of a training, read and checked once: rows, objectives, entries, schedule and folder."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from distill.causal.feed import SAMPLED_STEPS, Feed, Given, Samples, given
from distill.causal.model import CausalModel
from distill.data.rows import Rows
from distill.data.seen_rows import CHUNK, MASK, PassedRows, SeenRows, identifying
from distill.data.sources.lazy_columns import is_lazy, parts_of_table, take_columns
from distill.data.sources.stream import Stream
from distill.errors import DistillError
from distill.interchange.mapping import Entry, Sides, entries_of
from distill.models.inputs import NEVER, device_of, inputs_of, refuse_valueless, students, to_device
from distill.objectives import DIITO, IIT, KD, MaskedLM, Objective
from distill.objectives.term_weights import Weight, describe_function
from distill.tasks.loading import training_rows
from distill.tasks.named import tokenizer_of
from distill.tasks.streams import streamed
from distill.teachers.served import Served
from distill.teachers.served_checks import refuse_inside
from distill.training.checkpoints import KEPT, STEPS, Checkpoints
from distill.training.checks import check, check_softening, name_of
from distill.training.computation import Computation, weights_of
from distill.training.fingerprints import fingerprints
from distill.training.readings import refuse_unfit_for_stream
from distill.training.run_folder import FINGERPRINTS, Resume, RunFolder, run_folder
from distill.training.schedule import Schedule, lengths_to_group, order, weigh
from distill.training.watches import Watches
from distill.writing.generation import reads_by_encoder
from distill.writing.prompts import as_tokens
from distill.writing.writing import Writing
from distill.writing.written import Written, data_of
from interventions import Model


@dataclass(frozen=True, eq=False)
class Training:
    """The arguments of a training, read and checked once.

    `fit`, `steps`, `mutual` and `align` make one, the loop takes it, and the result of `fit` remembers its rows.

    Attributes:
        computation: all runs of a step: a `Computation`, or another module with its interface.
        rows: the rows of data, or the samples of a causal model.
        schedule: the duration and the learning rate.
        objectives: the requested objectives.
        entries: the mapping between a teacher and a student.
        weights: {term: weight}.
        writing: who writes the completions of the rows, if they are `Written`.
        left_out: terms that `weights` may name although they do not exist.
        settings: the requested settings, as they are written into the folder.
        folder: the folder of the run, if it has one.
        checkpoints: the checkpoints of the run, if it has any.
        watch: is shown each step, evaluates it, and may end the training; None evaluates none.
    """

    computation: Any
    rows: Rows | Feed
    schedule: Schedule
    objectives: Sequence[Objective] = ()
    entries: tuple[Entry, ...] = ()
    weights: Mapping[str, Weight] = field(default_factory=dict)
    writing: Writing | None = None
    left_out: Sequence[str] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    folder: RunFolder | None = None
    checkpoints: Checkpoints | None = None
    watch: Watches | None = None

    @cached_property
    def seen(self) -> SeenRows:
        """The rows that are trained on, by their content when this is first read."""
        return rows_seen_by(self.computation.learning[0], self.rows, self.schedule)

    @property
    def stream(self) -> Stream | None:
        """The rows that are read in order, if they are."""
        return self.rows.stream if isinstance(self.rows, Rows) else None

    def rewind(self) -> None:
        """Give a stream back as it was before the training."""
        if self.stream is not None:
            self.stream.rewind()

    @property
    def loss(self) -> Callable[..., Tensor]:
        """The loss as a function of the terms."""
        default = weights_of(self.computation.objectives)
        return partial(weigh, weights=self.weights, default=default, left_out=self.left_out)

    @property
    def weights_as_text(self) -> dict[str, Any]:
        """The weights as plain data, for JSON."""
        return {name: describe_function(each) if callable(each) else each for name, each in self.weights.items()}

    @property
    def written_as_text(self) -> list[dict[str, Any]]:
        """The settings of what models write as plain data, for JSON; an empty list where they write nothing."""
        levels = () if self.writing is None else self.writing.levels
        return [
            {
                "by": level.by,
                "share": describe_function(level.share) if callable(level.share) else level.share,
                "max_new_tokens": level.max_new_tokens,
                **({} if level.prompt_tokens is None else {"prompt_tokens": level.prompt_tokens}),
                **level.settings.settings,
            }
            for level in levels
        ]

    def kept(
        self,
        output_dir: str | Path | None,
        settings: Mapping[str, Any],
        networks: Mapping[str, Any],
        *,
        tokenizer: Any = None,
        resume: Resume = False,
        every: Any = STEPS,
        keep: int = KEPT,
    ) -> "Training":
        """Return the same training with its settings, and with a folder if one is named.

        Args:
            output_dir: the folder; None saves nothing.
            settings: the requested settings.
            networks: {name: network}, whose fingerprints the folder holds.
            tokenizer: the tokenizer that the data was read with.
            resume: continue from the newest checkpoint in the folder.
            every: the interval between two checkpoints.
            keep: how many of the newest checkpoints stay.

        Raises:
            DistillError: the folder holds something else, or a run that was started with other settings.
        """
        written = dict(settings)
        if output_dir is not None:
            levels = () if self.writing is None else self.writing.levels
            shares = {f"Written {place}": level.share for place, level in enumerate(levels)}
            written[FINGERPRINTS] = fingerprints(
                data=self.rows, networks=networks, tokenizer=tokenizer, objectives=self.objectives,
                weights={**self.weights, **shares, **self.schedule.functions},
            )  # fmt: skip
        folder = run_folder(output_dir, written, resume, every, keep)
        return replace(
            self, settings=written, folder=folder, checkpoints=None if folder is None else folder.checkpoints
        )


def training_of(
    teacher: Model | Served | CausalModel | None,
    student: nn.Module,
    mapping: Sides | tuple[Entry, ...] | str | None,
    data: Any,
    *,
    objective: Objective | Sequence[Objective] | None,
    weights: Mapping[str, Weight] | None,
    schedule: Schedule,
    trained: nn.Module | None = None,
) -> Training:
    """Return the training of a student by a teacher, or by labels alone; the arguments are those of `steps`.

    Raises:
        DistillError: the arguments do not fit together.
    """
    requested = objectives_of(objective, teacher, mapping)
    entries = resolve_mapping(teacher, student, mapping, requested)
    rows, writing = rows_for(teacher, student, data, schedule), None
    if isinstance(data, Written):
        assert isinstance(rows, Rows)
        writing = Writing.of(data, rows, teacher, student, schedule.seed)
        rows = writing.rows
    refuse_unfit_for_stream(rows, schedule)
    objectives, left_out = keep_supported(requested, rows, ("labels",) if writing is not None else ())
    check(teacher, student, rows, entries)
    if not any(parameter.requires_grad for parameter in (student if trained is None else trained).parameters()):
        raise DistillError(
            "the student has no parameter that is trained, as all have requires_grad=False; set it where it shall "
            "learn: student.requires_grad_(True)."
        )
    check_softening(teacher, objectives)
    if trained is not None:
        refuse_valueless(trained, "steps(trained=…)")
    network = None if isinstance(teacher, CausalModel) else teacher
    feed = rows if not isinstance(rows, Rows) else None
    computation = Computation(network, student, entries, objectives, feed=feed, trained=trained)
    computation.of_prompts = writing is not None and not writing.has_completions
    return Training(computation, rows, schedule, requested, entries, dict(weights or {}), writing, left_out)


def objectives_of(
    objective: Objective | Sequence[Objective] | None,
    teacher: Model | Served | CausalModel | None,
    mapping: Any = None,
) -> list[Objective]:
    """Return the objectives as a list; by default KD and DIITO, KD where the mapping is empty, IIT for a causal model.

    Raises:
        DistillError: something else than objectives, or none without a teacher.
    """
    if objective is None and isinstance(teacher, CausalModel):
        return [IIT()]
    if objective is None:
        if teacher is None:
            raise DistillError(
                "without a teacher there is nothing to imitate; pass objective=Labels() to train on labels."
            )
        return [KD()] if mapping == {} else [KD(), DIITO()]
    chosen = [objective] if isinstance(objective, Objective) else list(objective)
    _refuse_two_masks(chosen)
    wrong = next((each for each in chosen if not isinstance(each, Objective)), None)
    if wrong is not None or not chosen:
        raise DistillError(f"objective={objective!r} is not an objective; use e.g. [KD(temperature=2.0), DIITO()].")
    return chosen


def _refuse_two_masks(objectives: Sequence[Any]) -> None:
    """Raise DistillError if two objectives would mask the text differently, as one mask serves all."""
    found = [part for each in objectives if isinstance(each, Objective) for part in each.modules()]
    masks = {repr(part) for part in found if isinstance(part, MaskedLM) and part.mask_token is not None}
    if len(masks) > 1:
        raise DistillError(
            f"two objectives mask the text in two ways, {' and '.join(sorted(masks))}, and one mask serves both; give "
            "both the same settings."
        )


def keep_supported(
    objectives: Sequence[Objective], rows: Rows | Feed, made: Sequence[str] = ()
) -> tuple[list[Objective], tuple[str, ...]]:
    """Return the objectives for which the data has all columns, and the terms of those that are left out.

    Objectives that need labels are left out, with a warning, if the data has none, as a transfer set may.

    Args:
        objectives: the requested objectives.
        rows: the data, or the samples of a causal model.
        made: columns that are added to the data in each step.

    Raises:
        DistillError: another column is missing, or no objective remains.
    """
    if not isinstance(rows, Rows):
        return list(objectives), ()
    lacking = {each: [name for name in each.needs if name not in (*rows.columns, *made)] for each in objectives}
    kept = [each for each in objectives if not lacking[each]]
    for objective, missing in lacking.items():
        if not missing:
            continue
        name = name_of(objective)
        if missing != ["labels"] or not kept:
            raise DistillError(
                f"{name}() needs a column {missing[0]!r} and the data has {', '.join(rows.columns)}; add it, or use "
                "objective=[KD()], which needs the teacher alone."
            )
        warnings.warn(
            f"the data has no labels, so {name}() is left out; what remains: {', '.join(map(name_of, kept))}.",
            stacklevel=2,
        )
    dropped = [each.about.terms for each in objectives if lacking[each] and each.about is not None]
    return kept, tuple(term for terms in dropped for term in terms)


def rows_for(
    teacher: Model | Served | CausalModel | None, student: nn.Module, data: Any, schedule: Schedule
) -> Rows | Feed:
    """Return the rows of a training: rows of the data, prompts that models complete, or the samples of a causal model.

    Raises:
        DistillError: data that cannot be used.
    """
    if isinstance(data, Written):
        if isinstance(teacher, CausalModel):
            raise DistillError(
                "a causal model samples its own inputs, which no model writes; give values of its inputs: data={…}, or "
                "leave data out."
            )
        model = student if teacher is None else teacher
        data = as_tokens(data_of(data), lambda: tokenizer_of(model), by_encoder=reads_by_encoder(student))
    if isinstance(data, Feed) and not isinstance(data, Rows):
        return data
    if not isinstance(teacher, CausalModel):
        known = student if teacher is None else teacher
        return training_rows(streamed(data, known), known, schedule.seed, student)
    return feed_of(teacher, data, schedule)


def feed_of(model: CausalModel, data: Any, schedule: Schedule) -> Feed:
    """Return the data of a causal model: given rows, or its samples."""
    if data is not None:
        return given(model, data)
    return Samples(model, schedule.seed, (schedule.steps or SAMPLED_STEPS) * schedule.batch_size)


def resolve_mapping(
    teacher: Model | Served | CausalModel | None,
    student: nn.Module,
    mapping: Sides | tuple[Entry, ...] | str | None,
    objectives: Sequence[Objective],
) -> tuple[Entry, ...]:
    """Return the mapping as checked entries; by default "full" if an objective interchanges, else empty."""
    if teacher is None or (mapping is None and not any(objective.interchanges for objective in objectives)):
        return ()
    if isinstance(teacher, CausalModel):
        positions = next((each.positions for each in objectives if isinstance(each, IIT)), None)
        return () if mapping in (None, {}, ()) else entries_of(cast(Sides, mapping), teacher, student, positions)
    if isinstance(mapping, tuple) or mapping == {}:
        return tuple(cast(tuple[Entry, ...], mapping))
    if isinstance(teacher, Served):
        refuse_inside(teacher.model)
    return entries_of("full" if mapping is None else mapping, teacher, student)


def rows_seen_by(student: nn.Module, rows: Rows | Feed, schedule: Schedule) -> SeenRows:
    """Return the rows that a student is trained on: all rows of data as they are now, or sampled bases."""
    if isinstance(rows, Rows):
        read = _columns_read(student, rows)
        if rows.stream is not None:
            rows.stream.passed = PassedRows(identifying(rows.columns, read))
            return SeenRows(marks=rows.stream.passed)
        return SeenRows(partial(_drawn, rows, schedule, read)) if is_lazy(rows.table) else SeenRows.of(rows.table, read)
    if isinstance(rows, Given):
        return SeenRows.of(rows.batch(range(len(rows))))

    def batches() -> Iterator[Mapping[str, Any]]:
        for chosen in order(len(rows), schedule, range(schedule.total(len(rows)))):
            yield rows.batch(chosen)

    return SeenRows(batches)


def _drawn(rows: Rows, schedule: Schedule, read: Sequence[str] | None) -> Iterator[Mapping[str, Any]]:
    """Yield the columns, of those that are read, that identify the rows of a training, each row once."""
    chosen = torch.zeros(len(rows), dtype=torch.bool)
    steps = min(schedule.total(len(rows)), schedule.per_epoch(len(rows)))
    for numbers in order(len(rows), schedule, range(steps), lengths=lengths_to_group(rows, schedule)):
        chosen[numbers] = True
    kept = set(identifying(rows.columns, read))
    table = {name: column for name, column in rows.table.items() if name in kept or name.endswith(MASK)}
    yield from parts_of_table(take_columns(table, chosen.nonzero()[:, 0]), CHUNK)


def _columns_read(student: nn.Module, rows: Rows) -> list[str] | None:
    """Return the columns that the student is called with; None if they cannot be found."""
    batch = students(rows.batch([0]))
    try:
        given = inputs_of(student, to_device(batch, device_of(student)))
    except DistillError:
        return None
    return list(given) if isinstance(given, Mapping) else [name for name in batch if name not in NEVER]
