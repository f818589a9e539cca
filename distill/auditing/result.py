"""The result of an audit: figures, sentences, pictures and tables."""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from distill.auditing.behaviour import Behaviour
from distill.auditing.controls import Controls
from distill.auditing.differences import Differences
from distill.auditing.parts import Depth, Part
from distill.auditing.pictures import draw_parts
from distill.auditing.sentences import number, sentences_of
from distill.evaluation.interchange_result import InterchangeAccuracy
from distill.statistics.tables import table_of
from interventions import Picture, Result, plain_data, printed

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]

PRINTED = 8
"""How many parts `print` shows."""


@dataclass(frozen=True)
class Audit(Result):
    """A compressed model against its original: do they answer alike, compute alike, and where not.

    Attributes:
        behaviour: how alike they answer: agreement, divergence, accuracy, calibration, perplexity.
        differences: the rows, classes and slices where they do not.
        parts: each part of the compressed model, exchanged alone.
        depths: how far both are apart after each block.
        interchange: the interchange accuracy by kind of interchange, in all and for each block.
        controls: the original against itself, and against an untrained network.
        settings: the number of rows and pairs, the blocks that stand for each other, and the seed.
        notes: what could not be measured, and why.
    """

    behaviour: Behaviour
    differences: Differences
    parts: tuple[Part, ...]
    depths: tuple[Depth, ...]
    interchange: dict[str, InterchangeAccuracy]
    controls: Controls
    settings: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def sentences(self) -> tuple[str, ...]:
        """Plain sentences made from the figures: the first answers whether both compute the same."""
        return sentences_of(self.behaviour, self.differences, self.parts, self.interchange, self.controls)

    def plot(self) -> Picture:
        """Draw what each part changes alone, block by block, and how far both are apart after each block.

        Raises:
            DistillError: no part was exchanged.
        """
        return draw_parts(self.parts, self.depths, self.behaviour.kind)

    def to_dict(self) -> dict[str, Any]:
        """Return all figures and sentences as plain data, for JSON."""
        interchange = {site: each.to_dict() for site, each in self.interchange.items()}
        found = {**{key: value for key, value in vars(self).items() if key not in ("interchange", "controls")}}
        figures = {key: asdict(found[key]) for key in ("behaviour", "differences")}
        lists = {key: [asdict(each) for each in found[key]] for key in ("parts", "depths")}
        control = self.controls.interchange
        controls = {**asdict(self.controls), "interchange": None if control is None else control.to_dict()}
        return plain_data(
            {"sentences": list(self.sentences), **figures, **lists, "interchange": interchange, "controls": controls,
             "settings": self.settings, "notes": list(self.notes)}
        )  # fmt: skip

    def to_pandas(self) -> "pandas.DataFrame":
        """Return the parts as a table: a row for each, with its divergence, changed answers and distance.

        Raises:
            DistillError: pandas is not installed.
        """
        columns = ("divergence", "changed", "distance")
        return table_of(
            ({"part": e.name, "site": e.site, **{c: getattr(e, c) for c in columns}} for e in self.parts), "part"
        )

    @printed
    def __str__(self) -> str:
        lines = list(self.sentences)
        worst = sorted((each for each in self.parts if each.divergence > 0), key=lambda each: -each.divergence)[
            :PRINTED
        ]
        if worst:
            width = max(len(each.name) for each in worst)
            lines += ["", f"{'exchanged alone':{width}}  divergence  answers changed  distance"]
            lines += [
                f"{each.name:{width}}  {number(each.divergence):10}  {each.changed:15.3f}  {each.distance:8.4f}"
                for each in worst
            ]
        return "\n".join([*lines, *self.notes])
