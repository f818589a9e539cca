"""The result of a search for the places of variables: a figure for every variable, location and position.

A cell is a variable at a location and a position. Its figure is the interchange intervention accuracy of that entry
alone: the share of counterfactual runs, with the value at the place taken from the source, in which the network answers
as the causal model does when the variable takes the value that it has for the source.

Geiger et al. 2023 (arXiv:2303.02536), section 4; Wu et al. 2023 (arXiv:2305.08809), section 4.
"""

from dataclasses import asdict, dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from distill.alignment.alignment import Alignment
from distill.errors import DistillError
from distill.evaluation.measurement import accuracy_of
from distill.evaluation.outcome import Outcome, figures_of
from distill.interchange.mapping import Entry
from distill.statistics.sharing import Sharing
from distill.statistics.tables import table_of
from distill.statistics.tally import Tally
from interventions import Picture, Result, heat_map, plain_data, printed

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]


@dataclass(frozen=True, eq=False)
class Search(Result):
    """The figures of every variable at every location and position. It prints as a table, and plots as a heat map.

    Attributes:
        pairs: one entry for each variable, location and position, in this order.
        outcomes: the figures of each.
        variables, locations, positions: what was searched, as text; positions are [""] without any.
        tally: the counts that the figures are computed from.
        sharing: what pairs of examples have in common: bases and sources.
        settings: numbers of pairs and steps, seed, and the like.
    """

    pairs: tuple[Entry, ...]
    outcomes: tuple[Outcome, ...]
    variables: tuple[str, ...]
    locations: tuple[str, ...]
    positions: tuple[str, ...]
    tally: Tally = field(repr=False)
    sharing: Sharing = field(repr=False)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def iia(self) -> Float[Tensor, "variables locations positions"]:
        """The interchange intervention accuracy of every cell; NaN for real-valued answers, which have an error."""
        return self._grid([None if each.iia is None else each.iia.value for each in self.outcomes])

    @property
    def error(self) -> Float[Tensor, "variables locations positions"]:
        """The mean absolute error of every cell for real-valued answers; NaN for classes."""
        return self._grid([each.error for each in self.outcomes])

    @property
    def values(self) -> Float[Tensor, "variables locations positions"]:
        """The figures that are shown: the error for real-valued answers, else the accuracy."""
        return self.error if self.tally.regression else self.iia

    def _grid(self, figures: list[float | None]) -> Tensor:
        """Order one figure for each cell by variable, location and position; None becomes NaN."""
        numbers = torch.tensor([float("nan") if each is None else each for each in figures])
        return numbers.reshape(len(self.variables), len(self.locations), len(self.positions))

    @property
    def best(self) -> Alignment:
        """The alignment of each variable with its best place: the first of highest accuracy, or of lowest error."""
        per_variable = len(self.locations) * len(self.positions)
        score = -self.error if self.tally.regression else self.iia
        chosen = [int(cells.argmax()) + i * per_variable for i, cells in enumerate(score.flatten(1))]
        pairs = tuple(self.pairs[i] for i in chosen)
        accuracy = accuracy_of(self.tally.of(*chosen), pairs, self.sharing, self.settings)
        return Alignment(pairs, accuracy, settings=self.settings)

    def plot(self, variable: str | None = None) -> Picture:
        """Draw a heat map of the figures: locations down, positions across, the variables side by side.

        Args:
            variable: the only one to draw; None draws all.

        Raises:
            DistillError: the variable was not searched.
        """
        chosen = self.variables if variable is None else (variable,)
        unknown = [name for name in chosen if name not in self.variables]
        if unknown:
            raise DistillError(f"{unknown[0]!r} was not searched; plot one of {', '.join(self.variables)}.")
        columns = [_label(name, token, len(chosen) > 1) for name in chosen for token in self.positions]
        values = torch.cat([self.values[self.variables.index(name)] for name in chosen], 1)
        kind = "mean absolute error" if self.tally.regression else "IIA"
        what = kind + (f" of {chosen[0]}" if len(chosen) == 1 else "")
        return heat_map(values, list(self.locations), columns, label=what)

    def to_dict(self) -> dict[str, Any]:
        """Return what was searched, every figure and the settings as plain data, for JSON."""
        return {
            "variables": list(self.variables),
            "locations": list(self.locations),
            "positions": list(self.positions),
            "iia": plain_data(self.iia),
            "outcomes": [plain_data(asdict(outcome)) for outcome in self.outcomes],
            "settings": plain_data(self.settings),
        }

    def to_pandas(self) -> "pandas.DataFrame":
        """Return the figures as a table: a row for each variable, location and position.

        Raises:
            DistillError: pandas is not installed.
        """
        cells = product(self.variables, self.locations, self.positions)
        names = ("variable", "location", "position")
        rows = (
            {**dict(zip(names, cell, strict=True)), **figures_of(outcome)}
            for cell, outcome in zip(cells, self.outcomes, strict=True)
        )
        return table_of(rows, *names)

    @printed
    def __str__(self) -> str:
        blocks = []
        for name, values in zip(self.variables, self.values.tolist(), strict=True):
            width = max(map(len, (*self.locations, name)))
            head = [name.ljust(width), *(f"{token[:9] or 'IIA':>9}" for token in self.positions)]
            lines = [
                "  ".join([place.ljust(width), *(f"{value:9.3f}" for value in row)])
                for place, row in zip(self.locations, values, strict=True)
            ]
            blocks.append("\n".join(["  ".join(head), *lines]))
        return "\n\n".join(blocks)


def _label(variable: str, token: str, several: bool) -> str:
    """Return the label of a column of the heat map, with the variable where there are several."""
    return " @ ".join(part for part in (variable if several else "", token) if part) or variable
