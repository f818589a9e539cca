"""Distillation on perturbed rows: the control that a gain of in-context DIITO has to beat.

In-context DIITO takes the sources of its interchanges from texts with some words replaced. Is it the interchange that
helps, or is it that the models are compared on more texts? Here they are compared on the same texts b̃, drawn by the
same rule from the rows b of the step, and nothing is interchanged,

    L = KD(M_s(b̃), M_t(b̃)),

with another objective in the place of KD where one is given. Tang et al. 2019 (arXiv:1903.12136) make more text for
distillation in a like way: they mask words, and replace them by others of the same part of speech.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distill.errors import DistillError, checked
from distill.interchange.mapping import Entry
from distill.interchange.sources import InContext, Shuffle, Sources
from distill.models.inputs import TEACHERS, inputs_of, reads_apart, students, teachers, vocabulary_of
from distill.objectives.objective import About, Objective, matching, terms_of
from distill.objectives.response import KD
from distill.objectives.step import Reads, Step
from distill.objectives.term_weights import Weight
from distill.teachers.verbs import answering, run_of
from interventions import run


@checked
class Augmented(Objective):
    """Distillation on perturbed rows, nothing interchanged. Terms: those of `match`, with `_aug` behind the name.

    Every step draws the sources that `DIITO` with the same rule would make, gives them to teacher and student as
    ordinary rows, and compares the two runs, as `kd_aug`. What the rule does not make, as labels and the inputs of a
    decoder, is that of the row that it is made from. In a step in parts, means over tokens weigh each part by the
    tokens of these rows.

    Texts with words replaced, for distillation: Tang et al. 2019 (arXiv:1903.12136).

    Args:
        sources: a rule that makes new inputs; None is `InContext(0.3)`.
        match: how the two runs are compared: by one objective or several, e.g. `[KD(2.0), Cosine()]`; None is `KD()`.

    Raises:
        DistillError: sources that are other rows of the batch.
    """

    about = About(
        ("kd_aug",),
        "KD(M_s(b̃), M_t(b̃)), b̃ the rows with words replaced, drawn every step",
        "Tang et al. 2019, arXiv:1903.12136",
        "both: one on the perturbed rows",
    )

    compares_runs = False

    def __init__(self, sources: Sources | None = None, *, match: Objective | Sequence[Objective] | None = None) -> None:
        super().__init__()
        self.sources: Sources = InContext() if sources is None else sources
        if isinstance(self.sources, Shuffle):
            raise _only_rows(self.sources)
        self.needs = ("input_ids",) if isinstance(self.sources, InContext) else ()
        self.match: Any = matching(KD() if match is None else match, "Augmented", "runs on perturbed rows")

    @property
    def weights(self) -> Mapping[str, Weight]:
        """The weights of the objectives in `match`."""
        return {f"{name}_aug": weight for each in self.match for name, weight in each.weights.items()}

    def prepare(self, step: Step, rows: int) -> None:
        """Check that the rule makes new inputs for both models, by draws that change no others."""
        self.perturbed(step, step.drawing("augmented"))

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the terms of `match` on the runs of both models on perturbed rows."""
        teacher, student = answering(step.taught), step.network
        rows, reads = self.perturbed(step, step.generator), self._compared(step.mapping)
        with torch.no_grad():
            taught = run_of(teacher, inputs_of(teacher, teachers(rows)), reads.teacher, resumable=False)
        learned = partial(run, student, inputs_of(student, students(rows)), reads.student, resumable=False)
        terms = terms_of(self.match, step.on_batch(rows, taught, learned, reads))
        return {f"{name}_aug": term for name, term in terms.items()}

    def extra_repr(self) -> str:
        """Return the settings for printing."""
        return f"{self.sources}, match={list(self.match)}"

    def perturbed(self, step: Step, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the perturbed rows of a step.

        Raises:
            DistillError: the rule makes no new inputs, or none for a teacher that reads tokens of its own.
        """
        drawn = self.sources.draw(step.batch, vocabulary_of(step.network), generator)
        if not isinstance(drawn, Mapping):
            raise _only_rows(self.sources)
        own = [name for name in step.batch if name.startswith(TEACHERS)]
        if reads_apart(step.batch) and all(drawn.get(name, step.batch[name]) is step.batch[name] for name in own):
            raise DistillError(
                f"Augmented perturbs what both models read, and {self.sources} leaves the teacher's own "
                f"{', '.join(own)} as they are; give a rule that makes both, or leave Augmented out."
            )
        return {**step.batch, **drawn}

    def _compared(self, mapping: Sequence[Entry]) -> Reads:
        """Return the locations that `match` compares."""
        found = [each.reads(mapping) for each in self.match]
        return Reads(
            tuple(dict.fromkeys(at for each in found for at in each.teacher)),
            tuple(dict.fromkeys(at for each in found for at in each.student)),
        )


def _only_rows(sources: Sources) -> DistillError:
    """Return the error for a rule that draws rows of the batch, which are compared already."""
    return DistillError(
        f"Augmented({sources}) would compare rows of the batch once more; use a rule that makes new inputs, e.g. "
        "Augmented(InContext(0.3)), or KD() alone."
    )
