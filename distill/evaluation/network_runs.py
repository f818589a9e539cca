"""The runs of two networks on pairs, and what of them interchanges are compared with.

An interchange that replaces everything that an output depends on, or nothing of it, is not informative: it would
compare answers, not computation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from jaxtyping import Bool, Int
from torch import Tensor

from distill.errors import NothingToMeasure
from distill.evaluation.drawn_positions import DrawnPositions, PositionDraws
from distill.evaluation.measurement import Batch
from distill.evaluation.shared_runs import Runs
from distill.interchange.attention_keys import over_keys
from distill.interchange.mapping import Entry
from distill.interchange.real_positions import real_positions
from distill.interchange.vacuous import Answers, Places, Whole, touched
from distill.losses import kd
from distill.statistics.shifts import log_odds
from distill.teachers.served import ServedRun
from distill.teachers.verbs import grid_of, interchanged
from interventions import Location, Run

NAMES = ("teacher", "student")
Masks = dict[Location, Bool[Tensor, "batch _"]]


@dataclass(frozen=True, eq=False)
class Bases:
    """The runs of both networks on bases, and what is compared with every interchange of them.

    Attributes:
        runs: of the teacher and of the student.
        columns: of the bases.
        seen: for each network and location, the positions that the output depends on.
        weights: 1 for predictions that count, else 0.
    """

    runs: Runs
    columns: Batch
    seen: tuple[Masks, ...]
    weights: Tensor
    _grids: dict[Entry, None] = field(default_factory=dict)

    @cached_property
    def classes(self) -> tuple[Tensor, ...]:
        """The classes that teacher and student answer."""
        return tuple(each.logits.argmax(-1) for each in self.runs)

    @cached_property
    def odds(self) -> tuple[Tensor, ...]:
        """The log-odds that each network gives to the teacher's answer."""
        return tuple(log_odds(each.logits, self.classes[0]) for each in self.runs)

    @cached_property
    def divergence(self) -> Tensor:
        """KL(teacher ‖ student) of the answers [nats]."""
        teacher, student = self.runs
        return kd(student.logits, teacher.logits, reduction="none")

    def check_grid(self, entry: Entry) -> None:
        """Raise NothingToMeasure where the locations of an entry have different positions, looked at once."""
        if entry not in self._grids:
            _check_grid(entry, self.runs)
            self._grids[entry] = None


@dataclass(frozen=True, eq=False)
class NetworkRuns:
    """The runs of one of the two networks on a batch of pairs.

    Attributes:
        name: "teacher" or "student".
        base, source: the runs.
        columns, source_columns: the columns of the bases and of the sources.
        student_source: the student's run on the same source.
        seen: for each location, the positions that the output depends on.
        whole: finds interchanges that replace everything that the network's answer depends on.
        answers: of token models, for each token of the base the column of the source's token of the same number, or −1.
    """

    name: str
    base: Run
    source: Run
    columns: Batch
    source_columns: Batch
    student_source: Run
    seen: Masks
    whole: Whole
    answers: Int[Tensor, "batch token"] | None

    def interchanged(self, places: Places, drawn: DrawnPositions) -> Run:
        """Return the counterfactual run: the base with the values at these locations taken from the source."""
        source = over_keys(self.base, self.source, places, self.columns, self.source_columns)
        return interchanged(self.base, source, places, (drawn.written, drawn.read))

    def draw_at(self, at: Location, base: Run, draws: PositionDraws, pairs: Int[Tensor, " batch"]) -> DrawnPositions:
        """Draw positions from the real ones of a location in the base and in the source.

        Args:
            at: the location.
            base: the run on the bases that has it: the student's, wherever the student runs.
            draws: the rule.
            pairs: the numbers of the pairs.
        """
        if len(grid_of(base, at)) < 2:
            return DrawnPositions.every(len(pairs), base.logits.device)
        real = [real_positions(base, at, self.columns), real_positions(self.student_source, at, self.source_columns)]
        return draws.of(pairs, (self.columns, self.source_columns), real)

    def is_informative(
        self, after: Run, places: Places, drawn: DrawnPositions, counted: Bool[Tensor, "batch ..."]
    ) -> Bool[Tensor, " batch"]:
        """Return whether an interchange replaces something that the output depends on, but not everything.

        Args:
            after: the counterfactual run.
            places: the locations that were interchanged.
            drawn: the positions that were interchanged.
            counted: which predictions count.
        """
        answers = Answers(self.base, self.source, after, self.answers, counted)
        reached = touched(places, self.seen, drawn.written)
        if not isinstance(self.base, ServedRun):  # the requests of a served run differ in rounding
            reached = reached | answers.changed()
        whole = self.whole.replaced(places, self.seen, drawn.written)
        return reached & ~whole & ~(answers.are_the_sources() & drawn.alike)


def _check_grid(entry: Entry, bases: Sequence[Run]) -> None:
    """Raise NothingToMeasure where the locations of an entry differ in the numbers of examples and positions."""
    sides = zip(NAMES, bases, (entry.teacher, entry.student), strict=True)
    grids = [(name, grid_of(ran, at)) for name, ran, places in sides for at in places]
    first, other = grids[0][1], next((each for each in grids if each[1] != grids[0][1]), None)
    if other is not None:
        raise NothingToMeasure(
            f"the locations of {entry} have different [batch, position]: {first} in the teacher and {other[1]} in "
            f"the {other[0]}; map places of the same grid."
        )
