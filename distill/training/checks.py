"""Checks that teacher, student and data fit together, on a few rows before the first step."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.causal.feed import Feed
from distill.causal.model import CausalModel
from distill.causal.values import as_answers
from distill.data.rows import Rows
from distill.data.sources.lazy_columns import lengths_of, some_rows
from distill.errors import DistillError
from distill.interchange.mapping import Entry
from distill.interchange.swap import encoded
from distill.interchange.whole_state import refuse_wholes
from distill.models.class_labels import are_classes
from distill.models.class_names import check_alike, real_names
from distill.models.inputs import (
    TEACHERS,
    device_of,
    evaluating,
    innermost,
    network_of,
    reads_apart,
    students,
    teachers,
    to_device,
    vocabulary_of,
)
from distill.models.outputs import is_cut
from distill.models.padding_sides import padded_rows, warn_if_on_wrong_side
from distill.models.trials import answer_of, tried
from distill.objectives import Objective
from distill.teachers.endpoints.endpoint import Endpoint
from distill.teachers.served import Served
from distill.teachers.verbs import run_of
from distill.teachers.without_adapters import WithoutAdapters
from interventions import Model, run


def name_of(objective: Objective) -> str:
    """Return the name of an objective in errors: that of its class."""
    return type(objective).__name__


def check(
    teacher: Model | Served | CausalModel | None, student: nn.Module, rows: Rows | Feed, entries: tuple[Entry, ...] = ()
) -> None:
    """Check that teacher, student and data fit together, by one forward pass of two rows.

    Args:
        teacher: a network, a served one, a causal model, or None.
        student: the network to train.
        rows: the data, or the samples of a causal model.
        entries: the mapping, which is checked for causal models.

    Raises:
        DistillError: vocabularies, classes or labels differ; or a variable is aligned with whole states.
    """
    if not isinstance(rows, Rows):
        return _check_answers(rows, student, entries)
    if teacher is None or isinstance(teacher, CausalModel):
        return _check_labels([_answers("the student", student, rows, students)], rows, "network")
    _check_models(teacher, student, rows)
    taught, learned = _answers("the teacher", teacher, rows, teachers), _answers("the student", student, rows, students)
    _check_classes(taught, learned, rows)
    _check_labels([taught, learned], rows, "teacher")


def check_together(networks: Sequence[nn.Module], edges: Iterable[tuple[int, int]], rows: Rows) -> None:
    """Check that networks that learn together fit together and to the data, by one forward pass of each.

    Args:
        networks: networks that read the same columns.
        edges: (teacher, student), by number.
        rows: the data that all of them are trained on.

    Raises:
        DistillError: as `check`.
    """
    found = []
    for network in networks:
        found.append(_answers("the student", network, rows, students))
        _check_labels(found[-1:], rows, "network")
    named = [(number, each) for number, each in enumerate(networks) if real_names(each) is not None]
    for number, network in named[1:]:
        check_alike(named[0][1], network, (f"network {named[0][0]}", f"network {number}"))
    for teacher, student in edges:
        _check_models(networks[teacher], networks[student], rows)
        _check_classes(found[teacher], found[student], rows)


@dataclass(frozen=True)
class _Answers:
    """The kind of answers that a model gives to a few rows.

    Attributes:
        classes: the number of classes; None where there are no logits.
        at_tokens: whether each token has an answer.
        labelled: whether the labels of the rows are numbers of these classes.
    """

    classes: int | None = None
    at_tokens: bool = False
    labelled: bool = True


def _answers(name: str, model: Any, rows: Rows, columns_of: Callable[..., Mapping[str, Tensor]]) -> _Answers:
    """Return the kind of answers that a model gives to a few rows.

    Args:
        name: of the model in errors.
        model: a network, here or served.
        rows: the data.
        columns_of: chooses the columns that the model reads.
    """
    columns = columns_of(rows.batch(sample_rows(rows)))
    with evaluating(model), torch.no_grad():
        logits = answer_of(name, model, columns, run_of, needed=False)
        if "attention_mask" in columns and isinstance(model, nn.Module):
            _warn_of_side(name, model, rows, columns_of)
    if logits is None:
        return _Answers()
    _refuse_virtual(name, model, logits, columns)
    count, names = logits.shape[-1], real_names(model)
    labelled = "labels" in rows.columns and are_classes(model, logits, rows)
    if names is not None and len(names) != count:
        raise DistillError(
            f"{type(network_of(model)).__name__} answers with {count} classes and its configuration names "
            f"{len(names)}: {', '.join(names[:30])}; name each: model.config.id2label = {{0: …}}."
        )
    return _Answers(count, logits.ndim > 2, labelled)


def _check_models(teacher: Model | Served, student: nn.Module, rows: Rows) -> None:
    """Check that two models share no trained parameter, and agree in vocabulary and names of classes."""
    _refuse_shared(teacher, student)
    known = [size for model in (teacher, student) if (size := vocabulary_of(model)) is not None]
    if len(set(known)) > 1 and not reads_apart(rows.columns) and not is_cut(teacher, student):
        raise DistillError(
            f"the teacher knows {known[0]} tokens and the student {known[1]}: they read different vocabularies; "
            "build the student from the teacher, distill.from_layers(teacher, 3), name the tokenizer if it is one and "
            "its vocabulary is padded, fit(…, tokenizer=tokenizer), or give each its own tokens: "
            "data=distill.TokenAlignment(teacher_tokenizer, student_tokenizer).rows(texts)."
        )
    check_alike(teacher, student)


def _check_classes(teacher: _Answers, student: _Answers, rows: Rows) -> None:
    """Check that two models have equally many classes; language models that read different tokens need not."""
    if None in (teacher.classes, student.classes) or teacher.classes == student.classes:
        return
    if not (student.at_tokens and reads_apart(rows.columns)):
        raise DistillError(
            f"the teacher has {teacher.classes} classes and the student {student.classes}; give the student "
            f"num_labels={teacher.classes}."
        )


def _check_labels(found: Sequence[_Answers], rows: Rows, whose: str) -> None:
    """Check that labels that are numbers of classes are among the classes of the models."""
    classes = [each.classes for each in found if each.classes is not None]
    if not classes or "labels" not in rows.columns or not all(each.labelled for each in found):
        return
    if rows.stream is not None:
        rows.stream.classes = classes[0]
    labels = some_rows(rows.table["labels"])
    values = labels if isinstance(labels, Tensor) else torch.cat(list(labels))
    if not values.is_floating_point():
        wrong = values[(values != -100) & ((values < 0) | (values >= classes[0]))]
        if len(wrong):
            raise DistillError(
                f"the data has label {int(wrong[0])} and the {whose} {classes[0]} classes "
                f"(0 to {classes[0] - 1}); map the labels to its classes, or take a teacher trained on them."
            )


def _refuse_virtual(name: str, model: Any, logits: Tensor, columns: Mapping[str, Tensor]) -> None:
    """Raise DistillError if a model answers at virtual tokens too, as with a learned prompt."""
    ids, config = columns.get("input_ids"), getattr(model, "active_peft_config", None)
    virtual = getattr(config, "num_virtual_tokens", None) or 0
    if ids is not None and virtual and logits.ndim == 3 and logits.shape[1] == ids.shape[1] + virtual:
        raise DistillError(
            f"{name} answers at {logits.shape[1]} positions for {ids.shape[1]} tokens, as {virtual} virtual ones stand "
            f"before them; say where the answers are: answers=lambda output: output.logits[:, {virtual}:], or learn a "
            "prefix, which adds no positions: PrefixTuningConfig(…)."
        )


def _warn_of_side(name: str, model: nn.Module, rows: Rows, columns_of: Callable[..., Mapping[str, Tensor]]) -> None:
    """Warn if the answers of a model depend on the side on which the rows are padded."""
    own = TEACHERS if columns_of is teachers and reads_apart(rows.columns) else ""
    chosen = padded_rows(rows.table[f"{own}attention_mask"])
    if chosen:
        kind = f"{name} ({type(innermost(model)).__name__})"
        warn_if_on_wrong_side(
            kind, columns_of(rows.batch(chosen)), lambda few: answer_of(name, model, few, run_of, needed=False)
        )


def sample_rows(rows: Rows) -> list[int]:
    """Return the first two rows, and the longest where rows differ in length: errors of long rows show there."""
    few = range(min(2, len(rows)))
    lengths = (lengths_of(column) for column in rows.table.values() if not isinstance(column, Tensor))
    known = next((each for each in lengths if each is not None), None)
    return list(few) if known is None else sorted({*few, int(known.argmax())})


def softened_by(objectives: Sequence[Objective], otherwise: float = 2.0) -> float:
    """Return the first temperature by which objectives soften the teacher; another number if none does."""
    parts = (part for each in objectives for part in each.modules() if isinstance(part, Objective))
    found = (temperature for part in parts if (temperature := getattr(part, "temperature", None)) is not None)
    return float(next(found, otherwise))


def check_softening(teacher: Any, objectives: Sequence[Objective]) -> None:
    """Warn if objectives soften a served teacher by another temperature than its largest logits are kept for."""
    if not isinstance(teacher, Served) or teacher.keep.k is None:
        return
    kept = teacher.keep.temperature
    for part in (part for each in objectives for part in each.modules()):
        temperature = getattr(part, "temperature", None)
        if isinstance(part, Objective) and temperature not in (None, kept):
            warnings.warn(
                f"{name_of(part)}(temperature={temperature}) softens a teacher of which the {teacher.keep.k} largest "
                f"logits are kept for temperature {kept}: it sees another share of the other classes together; use "
                + (
                    f"{name_of(part)}(temperature=1.0)."
                    if isinstance(teacher.model, Endpoint)
                    else f"Served(…, temperature={temperature})."
                ),
                stacklevel=2,
            )


def _refuse_shared(teacher: Any, student: nn.Module) -> None:
    """Raise DistillError if training the student would change the teacher; frozen parts may be shared."""
    if isinstance(network_of(teacher), WithoutAdapters):
        return
    teachers_own = {address for parameter in network_of(teacher).parameters() for address in _addresses(parameter)}
    trained = ((name, p) for name, p in student.named_parameters() if p.requires_grad)
    shared = [name for name, p in trained if teachers_own & set(_addresses(p))]
    if shared:
        raise DistillError(
            f"the student shares {len(shared)} of its parameters with the teacher ({shared[0]!r}, …), and training "
            "would change the teacher; give it a copy: copy.deepcopy(…)."
        )


def _addresses(parameter: Tensor) -> tuple[Any, ...]:
    """Return by what a parameter is recognized: itself, and its memory where it has some of its own."""
    if type(parameter) is not nn.Parameter or parameter.is_meta or not parameter.nbytes:
        return (id(parameter),)
    return (id(parameter), ("memory", parameter.device, parameter.data_ptr()))


def _check_answers(feed: Feed, student: nn.Module, entries: tuple[Entry, ...]) -> None:
    """Check that a network has one logit for each answer of a causal model, and that no entry is of whole states."""
    model, device = feed.model, device_of(student)
    values = to_device(feed.batch(range(2)), device)
    inputs = encoded(model, student, values)
    with tried("the network", student, inputs), evaluating(student), torch.no_grad():
        logits = model.decode(run(student, inputs, resumable=False).logits, values)
    if model.classes is None:
        as_answers(logits, model.answers(values))
    bases, sources = (feed.sources(16, torch.Generator().manual_seed(seed), device) for seed in range(2))
    refuse_wholes(model, student, entries, bases, sources)
