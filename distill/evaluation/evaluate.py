"""The evaluation of a trained network: its answers to held-out rows, and its interchange accuracy under a mapping."""

import warnings
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distill.causal.feed import given
from distill.causal.model import CausalModel
from distill.causal.values import Values
from distill.data.missing import IGNORED
from distill.data.rows import Rows
from distill.data.seeds import seed_of
from distill.data.seen_rows import SeenRows
from distill.errors import DistillError, checked
from distill.evaluation.answers.beside_teacher import beside_teacher, is_language_model
from distill.evaluation.answers.labelled_answers import few_answers
from distill.evaluation.answers.other_answers import other_answers
from distill.evaluation.interchange_accuracy import interchange_accuracy
from distill.evaluation.interchange_result import InterchangeAccuracy
from distill.evaluation.measurement import check_pairs
from distill.evaluation.metrics import accuracy
from distill.evaluation.variable_accuracy import examples_of_model, variables_accuracy
from distill.interchange.mapping import Entry, Sides
from distill.interchange.positions import Span, refuse_no_rule
from distill.models.class_labels import are_classes, are_values, has_classes
from distill.models.inputs import network_of
from distill.models.outputs import answered
from distill.models.trials import translated
from distill.statistics.intervals import Share
from distill.statistics.tables import table_of
from distill.tasks.loading import held_out
from distill.teachers.served import Served
from distill.teachers.without_adapters import teacher_and_student
from interventions import InterventionError, Model, Picture, Result, plain_data, printed

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]

NO_TEACHER = "there is no teacher to compute like"
NO_PAIR = "no places are mapped; pass mapping={Location(2): Location(1)}"
BESIDE = ("perplexity", "teacher_perplexity", "agreement", "kl")
"""The figures of answers beside those of the teacher."""
OTHERS = ("exact_match", "micro_f1", "macro_f1", "mse", "pearson", "spearman")
"""The figures of several labels a row, and of real values."""


@dataclass(frozen=True, repr=False)
class Evaluation(Result):
    """The figures on held-out rows, and the interchange accuracy under a mapping.

    Attributes:
        accuracy: the share of right answers, of language models that of right next tokens; None where it could not be
            measured.
        interchange: the figures of the mapping; None where they could not be measured.
        note: why the interchange accuracy of a mapping is None, or, with held-out rows, why all figures are, or how
            many rows have no label; else empty.
        perplexity: of a student that is a language model, over the tokens whose label is not −100, or all where rows
            have no labels; else None.
        teacher_perplexity: that of the teacher on the same tokens.
        agreement: the share of answers whose most likely class, of language models the next token, is the teacher's;
            measured of language models, and where rows have no labels.
        kl: KL(teacher ‖ student) of the same answers [nats].
        exact_match: of several labels a row, the share of rows of which all are answered right; else None.
        micro_f1, macro_f1: F1 of all labels together, and the mean of the F1 of each.
        mse: of real values, the mean squared error; else None.
        pearson, spearman: the correlation of real values with the labels, and that of their ranks; None where one of
            them is constant.
    """

    accuracy: Share | None
    interchange: InterchangeAccuracy | None
    note: str = ""
    perplexity: float | None = None
    teacher_perplexity: float | None = None
    agreement: Share | None = None
    kl: float | None = None
    exact_match: Share | None = None
    micro_f1: float | None = None
    macro_f1: float | None = None
    mse: float | None = None
    pearson: float | None = None
    spearman: float | None = None

    @property
    def figures(self) -> dict[str, float]:
        """The main figures that were measured, by name: perplexity, accuracy, mse, agreement, kl, iia and others."""
        found: dict[str, Any] = {name: getattr(self, name) for name in (*BESIDE, *OTHERS)}
        found["accuracy"] = self.accuracy
        outcome = None if self.interchange is None else self.interchange.overall
        found |= {} if outcome is None else {"iia": outcome.iia, "error": outcome.error}
        return {
            name: each.value if isinstance(each, Share) else float(each)
            for name, each in found.items()
            if each is not None
        }

    def marked(self, trained: Collection[str] | None) -> "Evaluation":
        """Return the same with each kind of interchange marked by whether it was trained on."""
        return self if self.interchange is None else replace(self, interchange=self.interchange.marked(trained))

    def to_dict(self) -> dict[str, Any]:
        """Return accuracy, interchange accuracy, note, and what else was measured, as plain data, for JSON."""
        return {
            "accuracy": None if self.accuracy is None else plain_data(asdict(self.accuracy)),
            "interchange": None if self.interchange is None else self.interchange.to_dict(),
            "note": self.note,
            **{
                name: plain_data(asdict(each)) if isinstance(each, Share) else plain_data(each)
                for name in (*BESIDE, *OTHERS)
                if (each := getattr(self, name)) is not None
            },
        }

    def to_pandas(self) -> "pandas.DataFrame":
        """Return the figures as a table: a row for each of held-out rows, and for the IIA (or error) of each entry.

        Raises:
            DistillError: pandas is not installed.
        """
        rows: list[dict[str, Any]] = []
        for name in ("accuracy", *BESIDE, *OTHERS):
            if (each := getattr(self, name)) is not None:
                values = vars(each) if isinstance(each, Share) else {"value": each}
                rows.append({"figure": name.replace("_", " "), "of": "held-out rows", **values})
        entries = {} if self.interchange is None else {**self.interchange.per_pair, "overall": self.interchange.overall}
        figure = "error" if self.interchange is None or self.interchange.iia is None else "IIA"
        for name, outcome in entries.items():
            found = {"value": outcome.error, "count": outcome.count} if outcome.iia is None else vars(outcome.iia)
            rows.append({"figure": figure, "of": name, **found})
        return table_of(rows, "figure", "of")

    def plot(self) -> Picture:
        """Draw the interchange accuracy, with the accuracy in its title, or the share of right answers or agreement.

        Raises:
            DistillError: nothing was measured.
        """
        if self.interchange is not None:
            figure = self.interchange.plot()
            if self.accuracy is not None:
                figure.axes[0].set_title(f"accuracy {self.accuracy}", fontsize="small")
            return figure
        shares = {name: getattr(self, name) for name in ("accuracy", "exact_match", "agreement")}
        name, share = next(((name, each) for name, each in shares.items() if each is not None), ("", None))
        if share is None:
            raise DistillError(f"there is no figure to draw: {self}; write evaluate(teacher, student, mapping, data).")
        return _bar(name.replace("_", " "), share)

    @printed
    def __repr__(self) -> str:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in self.figures.items())
        return f"Evaluation({figures or self.note or 'nothing was measured'})"

    @printed
    def __str__(self) -> str:
        parts = [] if self.accuracy is None else [f"accuracy {self.accuracy}"]
        parts += self._other_answers()
        parts += self._beside_teacher()
        parts += [] if self.interchange is None else [str(self.interchange)]
        parts += [self.note] if self.note else []
        return "\n".join(parts) or "nothing was measured: no held-out data was given"

    def _other_answers(self) -> list[str]:
        """Return the line of several labels a row, or of real values."""
        if self.exact_match is not None:
            return [f"F1 micro {self.micro_f1:.3f}, macro {self.macro_f1:.3f}, exact match {self.exact_match}"]
        if self.mse is None:
            return []
        shown = {"Pearson": self.pearson, "Spearman": self.spearman}
        known = [f", {name} {each:.3f}" for name, each in shown.items() if each is not None]
        return [f"mean squared error {self.mse:.4g}{''.join(known) or ', no correlation (of equal numbers)'}"]

    def _beside_teacher(self) -> list[str]:
        """Return lines of the perplexity, and of agreement with the teacher."""
        teachers = "" if self.teacher_perplexity is None else f" (teacher {self.teacher_perplexity:.4g})"
        lines = [] if self.perplexity is None else [f"perplexity {self.perplexity:.4g}{teachers}"]
        if self.agreement is not None:
            lines.append(f"agreement with the teacher {self.agreement}, KL {self.kl:.4g} nats")
        return lines


def _bar(name: str, share: Share) -> Picture:
    """Draw a share with its interval."""
    figure = Picture(figsize=(6, 1.4), layout="constrained")
    axes = figure.subplots()
    axes.barh(0, share.value, color="#4477aa", height=0.6)
    axes.plot([share.low, share.high], [0, 0], color="black")
    axes.set(yticks=[0], yticklabels=[name], xlim=(0, 1), xlabel="share of held-out rows")
    return figure


def evaluate_variables(
    model: CausalModel,
    network: nn.Module,
    pairs: tuple[Entry, ...],
    data: Any = None,
    *,
    examples: int = 2000,
    seed: int = 0,
    exclude: SeenRows | None = None,
) -> Evaluation:
    """Measure how often a network answers as a causal model does, and its interchange accuracy under a mapping.

    Args:
        model: the causal model.
        network: the network.
        pairs: the entries of the mapping; without any, the accuracy alone is measured.
        data: rows of its inputs; None takes examples that the causal model samples.
        examples: how many pairs of base and source are drawn; the accuracy is that on the bases.
        seed: of the draws.
        exclude: the rows that were trained on, as for `interchange_accuracy`.
    """
    try:
        rows = None if data is None else given(model, data)
        drawn = examples_of_model(model, examples, seed, rows)
    except DistillError as nothing:
        return Evaluation(None, None, f"nothing was measured: {nothing}")
    measured = None if model.classes is None else accuracy(network, model, values=drawn.base.batch(range(examples)))
    if not pairs:
        why = "" if measured else f"nothing was measured: the causal model answers no class, and {NO_PAIR}"
        return Evaluation(measured, None, why)
    try:
        interchange = variables_accuracy(model, network, pairs, rows, pairs=examples, seed=seed, exclude=exclude)
    except DistillError as nothing:
        return Evaluation(measured, None, f"no interchange accuracy: {nothing}")
    return Evaluation(measured, interchange)


def accuracy_under(
    model: CausalModel, network: nn.Module, values: Values, *, batch_size: int = 256, answers: Any = None
) -> Share:
    """Measure `accuracy(network, causal_model, values=values)`, which has this name in the version before."""
    warnings.warn(
        "distill.accuracy_under(model, network, values) is deprecated; use "
        "distill.accuracy(network, causal_model, values=values).",
        DeprecationWarning,
        stacklevel=2,
    )
    return accuracy(network, model, values=values, batch_size=batch_size, answers=answers)


@checked
def evaluate(
    teacher: Model | Served | None,
    student: nn.Module,
    mapping: Sides | tuple[Entry, ...] | str | None,
    data: Any,
    *,
    positions: Any = Span(0.3),  # noqa: B008 (frozen)
    kinds: Any = None,
    pairs: int = 2000,
    seed: Any = 0,
    answers: Any = None,
) -> Evaluation:
    """Measure `student` on held-out rows beside its teacher, and its interchange accuracy under a mapping.

    Classifiers have an accuracy, on rows without labels the agreement with the teacher and the divergence from it.
    Several labels a row have F1 and exact matches, real values the mean squared error and correlations.
    Language models have all of these, and a perplexity; rows without labels are their own labels. Means are over all
    answers, whatever the batches. A figure that cannot be measured is None, and the note of the evaluation says why
    nothing was.

    Args:
        teacher: a network, here or `Served`; None measures the student alone.
        student: any torch model.
        mapping: as `fit` takes it; None or {} measures no interchange accuracy.
        data: held-out rows, or a Task or the name of one (its test rows), as `fit` takes them.
        positions: the rule that draws positions; None takes all of them.
        kinds: other kinds of interchange to measure too, as `interchange_accuracy` takes them, e.g. "usual".
        pairs: how many pairs of base and source are interchanged.
        seed: of the pairs and positions.
        answers: which part of a model's output is its answer, as for `fit`.

    Raises:
        DistillError: data that does not fit the models, positions that are no rule, or a number of pairs below 1.
    """
    (teacher, student), seed = teacher_and_student(teacher, student), seed_of(seed)
    if teacher is not None:
        with translated():
            network_of(teacher)  # raises DistillError for what is no network
    check_pairs(pairs)
    refuse_no_rule("evaluate", positions)
    rows = held_out(data, student if teacher is None else teacher, student)
    with answered((teacher, student), answers):
        found = answers_on(teacher, student, rows)
        return with_interchange(
            teacher, student, mapping, rows, found, positions=positions, kinds=kinds, pairs=pairs, seed=seed
        )


def answers_on(teacher: Model | Served | None, student: nn.Module, rows: Rows) -> Evaluation | None:
    """Return the figures of a student's answers to rows; None where they have classes and it has no logits."""
    return _with_note_of_missing(_figures_on(teacher, student, rows), rows)


def _figures_on(teacher: Model | Served | None, student: nn.Module, rows: Rows) -> Evaluation | None:
    """Return the figures of a student's answers to rows; None where they have classes and it has no logits."""
    logits, classes = few_answers(student, rows), has_classes(rows)
    if logits is None:
        return None if classes else Evaluation(None, None)
    if is_language_model(student, logits, rows) and (classes or "labels" not in rows.columns):
        found = beside_teacher(teacher, student, rows, text=True)
    elif teacher is not None and "labels" not in rows.columns and not are_values(student, logits):
        found = beside_teacher(teacher, student, rows, text=False)
    else:
        right = classes and are_classes(student, logits, rows)
        other = None if right else other_answers(student, logits, rows)
        return Evaluation(accuracy(student, rows) if right else None, None, **({} if other is None else vars(other)))
    figures = {name: getattr(found, name) for name in BESIDE}
    return Evaluation(found.accuracy, None, f"{found.note}." if found.note else "", **figures)


def _with_note_of_missing(found: Evaluation | None, rows: Rows) -> Evaluation | None:
    """Add a note of the rows that have no label, a class a row, while others have one."""
    labels = rows.table.get("labels")
    if found is None or not isinstance(labels, torch.Tensor) or labels.ndim != 1 or labels.is_floating_point():
        return found
    missing = int((labels == IGNORED).sum())
    if not 0 < missing < len(labels):
        return found
    has = "has" if missing == 1 else "have"
    note = f"{missing} of {len(labels)} held-out rows {has} no label and {'is' if missing == 1 else 'are'} left out."
    return replace(found, note=f"{found.note} {note}".strip())


def with_interchange(
    teacher: Model | Served | None,
    student: nn.Module,
    mapping: Sides | tuple[Entry, ...] | str | None,
    rows: Rows,
    found: Evaluation | None,
    **settings: Any,
) -> Evaluation:
    """Add the interchange accuracy to the figures of answers, or the reason why there is none.

    Args:
        teacher, student, mapping: as for `evaluate`.
        rows: held-out rows.
        found: the figures of answers to them, as `answers_on` returns them.
        settings: of `interchange_accuracy`.
    """
    if found is None:
        return Evaluation(None, None, f"nothing was measured: {type(student).__name__} has no logits")
    if teacher is None or not mapping:
        if found.figures:
            return found
        unmapped = NO_TEACHER if teacher is None else NO_PAIR
        return replace(found, note=f"nothing was measured: {_why_no_accuracy(rows)}, and {unmapped}")
    unmeasured = "" if found.figures else f"no accuracy: {_why_no_accuracy(rows)}."
    note = f"{found.note} {unmeasured}".strip()
    try:
        interchange = interchange_accuracy(teacher, student, mapping, rows, **settings)
    except (DistillError, InterventionError) as nothing:
        return replace(found, note=f"{note} no interchange accuracy: {nothing}".lstrip())
    return replace(found, interchange=interchange, note=note)


def _why_no_accuracy(rows: Any) -> str:
    """Return why no accuracy can be measured on held-out rows, as the first half of a sentence."""
    columns = getattr(rows, "table", {})
    if "labels" not in columns:
        found = f"{len(rows)} held-out rows have no labels (columns: {', '.join(columns)}); add a column labels"
        return f"the {found}"
    if has_classes(rows):
        return f"the answers to the {len(rows)} held-out rows are no classes, one of several for each label"
    labels = columns["labels"]
    if not (labels if isinstance(labels, torch.Tensor) else labels[0]).is_floating_point():
        return f"all labels of the {len(rows)} held-out rows are -100 and count for nothing"
    return f"the labels of the {len(rows)} held-out rows are numbers and no classes"
