"""The search for the place of each variable: how well each location and position of a network holds it.

A cell is a variable at a location and a position. Its figure is the interchange intervention accuracy of that entry
alone: the share of counterfactual runs, with the value at the place taken from the source, in which the network answers
as the causal model does when the variable takes the value that it has for the source.

Geiger et al. 2023 (arXiv:2303.02536), section 4; Wu et al. 2023 (arXiv:2305.08809), section 4.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor, nn

from distill.alignment.alignment import Alignment
from distill.alignment.learning import COLDEST, learn, schedule_of
from distill.causal.feed import Given
from distill.causal.model import CausalModel
from distill.causal.values import call_or_explain
from distill.errors import DistillError, checked
from distill.evaluation.measurement import Measurement, accuracy_of
from distill.evaluation.outcome import Outcome, figures_of, outcomes_of
from distill.evaluation.tables import table_of
from distill.evaluation.variable_accuracy import VariableInterchanges, examples_of_model, refuse_ineffective
from distill.interchange.mapping import Entry, depth, entries_of
from distill.interchange.swap import encoded
from distill.interchange.whole_state import refuse_wholes
from distill.models.inputs import device_of, evaluating, refuse_valueless, to_device
from distill.models.outputs import answered
from distill.models.trials import translated
from distill.statistics.sharing import Sharing
from distill.statistics.tally import Tally
from distill.training.resolve import feed_of
from distill.training.schedule import Schedule
from interventions import (
    Location,
    Picture,
    Result,
    architecture,
    as_location,
    heat_map,
    plain_data,
    printed,
    run_to,
    shown,
    unchanged,
)

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


@checked
def search_alignment(
    causal_model: CausalModel | Any,
    network: nn.Module | Any,
    variables: Any = None,
    at: Any = None,
    data: Any = None,
    *,
    positions: Any = None,
    subspace: Callable[[], nn.Module] | None = None,
    weights: Mapping[str, float] | None = None,
    steps: int = 300,
    batch_size: int = 256,
    lr: float | None = None,
    seed: Any = 0,
    coldest: float = COLDEST,
    pairs: int = 1000,
    console: Console | None = None,
    answers: Any = None,
) -> Search:
    """Measure the interchange intervention accuracy of every variable at every location and position.

    The runs on base and source are shared by all cells, and every counterfactual resumes from that of the base. With a
    subspace, each cell has one of its own, learned as `align` would learn it alone; the cells of one location are
    learned together.

    Args:
        causal_model: the hypothesis about what the network computes.
        network: any torch model; it is not changed.
        variables: names, or tuples of names that are interchanged together; by default the inner variables.
        at: the locations; by default the output of every block.
        data: {name: tensor} of the causal model's inputs; by default it samples them.
        positions: the tokens, each a name, a number or another form that `CausalModel.select` takes. By default the
            named positions of the causal model; without any, every token of the shortest example. [None] is all tokens
            at once.
        subspace: makes the subspace of a cell, as `lambda: Rotation(8)`, which all start alike (`Rotation(8, seed=1)`
            is another start); None swaps whole vectors.
        weights, steps, batch_size, lr, coldest: of learning, as for `align`.
        pairs: how many held-out pairs each cell is measured on, the same for all.
        seed: of learning and of the pairs.
        console: shows the progress; `rich.console.Console(quiet=True)` for none.
        answers: which part of the network's output is its answer, as for `fit`.

    Raises:
        DistillError: a network in place of the causal model, nothing to search, a variable that does not exist, or a
            cell that holds everything the network's answer depends on.

    Geiger et al. 2023 (arXiv:2303.02536), section 4; Wu et al. 2023 (arXiv:2305.08809), section 4.
    """
    _refuse_networks(causal_model, network)
    with answered((causal_model, network), answers), translated(), torch.inference_mode(False):  # it learns
        return _search(
            causal_model, network, variables, at, data, positions=positions, subspace=subspace, weights=weights,
            schedule=schedule_of(steps, batch_size, seed), lr=lr, coldest=coldest, pairs=pairs, console=console,
        )  # fmt: skip


def _search(
    causal_model: CausalModel,
    network: nn.Module,
    variables: Any,
    at: Any,
    data: Any,
    *,
    positions: Any,
    subspace: Callable[[], nn.Module] | None,
    weights: Mapping[str, float] | None,
    schedule: Schedule,
    lr: float | None,
    coldest: float,
    pairs: int,
    console: Console | None,
) -> Search:
    """Search with a causal model and a network that were checked; the arguments are those of `search_alignment`."""
    names = causal_model.inner if variables is None else _as_list(variables, "variables")
    places = _places(network) if at is None else [as_location(place) for place in _as_list(at, "at")]
    if positions is not None:
        positions = _as_list(positions, "positions")
    _refuse_shared(subspace)
    seed, batch_size = schedule.seed, schedule.batch_size
    feed = feed_of(causal_model, data, schedule)
    few = to_device(feed.batch(range(min(16, len(feed)))), device_of(network))
    if not names or not places or positions == []:
        raise DistillError(
            f"there is nothing to search: {len(names)} variables × {len(places)} locations, positions={positions}; "
            "name some, as search_alignment(causal_model, network, 'left', at=[Location(0), Location(1)])."
        )
    tokens = _tokens(causal_model, network, places, few) if positions is None else list(positions)
    cells = tuple(
        entries_of({_variables(name): _with_subspace(place, subspace)}, causal_model, network, token)[0]
        for name in names
        for place in places
        for token in tokens
    )
    if subspace is None:
        others = feed.sources(_rows(few), torch.Generator().manual_seed(seed), device_of(network))
        refuse_wholes(causal_model, network, cells, few, others)
    else:
        _check_apart(cells)
        learning: dict[str, Any] = {"lr": lr, "weights": weights, "coldest": coldest, "console": console}
        for row, place in enumerate(places):  # the cells of one place share their runs
            mine = tuple(cell for i, cell in enumerate(cells) if i // len(tokens) % len(places) == row)
            learn(causal_model, network, mine, feed, schedule, **learning, title=f"search {place}")
    examples = examples_of_model(causal_model, pairs, seed, feed if isinstance(feed, Given) else None)
    with evaluating(network), unchanged():  # it is looked at once, not at each of its runs
        tally = Measurement(VariableInterchanges(causal_model, network, cells), examples, seed, batch_size).tally()
    refuse_ineffective(tally, cells, has_rows=data is not None)
    outcomes = outcomes_of([tally.of(i) for i in range(len(cells))], examples.sharing)
    settings: dict[str, Any] = {"pairs": pairs, "seed": seed}
    if subspace is not None:
        settings |= {"subspace": repr(subspace()), "steps": schedule.steps, "batch_size": batch_size, "lr": lr}
    texts = (tuple(map(_name, names)), tuple(map(str, places)), tuple(map(_text, tokens)))
    return Search(cells, outcomes, *texts, tally, examples.sharing, settings)


def _refuse_networks(causal_model: Any, network: Any) -> None:
    """Raise DistillError for a teacher that is no causal model, as a network has no variables."""
    if isinstance(network, CausalModel):
        raise DistillError(
            f"search_alignment(causal_model, network) was given a {type(causal_model).__name__} and then the causal "
            "model; give the causal model first: search_alignment(causal_model, network)."
        )
    if not isinstance(causal_model, CausalModel):
        raise DistillError(
            f"search_alignment looks for the variables of a causal model, and {type(causal_model).__name__} is none; "
            "of two networks compare the places: search_mapping(teacher, student, data)."
        )
    if not isinstance(network, nn.Module):
        raise DistillError(
            f"search_alignment(causal_model, {shown(network)}) has no network to search in; give a torch model."
        )
    refuse_valueless(network, "search_alignment")


def _refuse_shared(subspace: Any) -> None:
    """Raise DistillError for a subspace in the place of a function that makes one."""
    if subspace is not None and (isinstance(subspace, nn.Module) or not callable(subspace)):
        raise DistillError(
            f"subspace={subspace!r} would be shared by all cells; give a function that makes one: "
            "subspace=lambda: Rotation(8)."
        )


def _with_subspace(place: Location, subspace: Callable[[], nn.Module] | None) -> Location:
    """Return the location with a new subspace, or as it is where there is none to make."""
    if subspace is None:
        return place
    new = call_or_explain("subspace", "give a function without arguments: subspace=lambda: Rotation(8)", subspace)
    if not isinstance(new, nn.Module):
        raise DistillError(f"subspace made {shown(new)}, which is none; make one: subspace=lambda: Rotation(8).")
    return replace(place, subspace=new)


def _as_list(given: Any, name: str) -> list[Any]:
    """Return one or several variables, locations or positions as a list.

    Raises:
        DistillError: another type; `name` is that of the argument.
    """
    if isinstance(given, str | Location | int | np.integer | slice) or callable(given):
        return [given]
    if not isinstance(given, Sequence | range | set) or isinstance(given, bytes):
        raise DistillError(f"search_alignment({name}={shown(given)}) names nothing to search; give a list: {name}=[…].")
    return list(given)


def _variables(name: Any) -> str | tuple[str, ...]:
    """Return the name of a variable, or a tuple of those that are interchanged together.

    Raises:
        DistillError: something that is no name.
    """
    together = tuple(name) if isinstance(name, list) else name
    names = together if isinstance(together, tuple) else (together,)
    if not all(isinstance(each, str) for each in names):
        raise DistillError(
            f"search_alignment(variables=[{shown(name)}]) names no variable; give names, or tuples of those that are "
            "interchanged together: variables=['left', ('left', 'right')]."
        )
    return together


def _places(network: nn.Module) -> list[Location]:
    """Return the outputs of the blocks of the stack that locations without a stack refer to."""
    found = architecture(network)
    if not found.stacks:
        raise DistillError(
            f"{type(network).__name__} has no blocks that repeat; name the places: at=[Location(module='2')]."
        )
    return [Location(i) for i in range(depth(network))]


def _tokens(model: CausalModel, network: nn.Module, places: list[Location], few: dict[str, Tensor]) -> list[Any]:
    """Return the positions to search where none are requested; [None] where the activations have no tokens."""
    if model.positions:
        return list(model.positions)
    with evaluating(network), torch.no_grad():
        inputs = encoded(model, network, few)
        vectors = run_to(network, inputs, places[:1]).vectors(places[0].whole)
    if vectors.ndim < 3:
        return [None]
    mask = inputs.get("attention_mask") if isinstance(inputs, dict) else None
    return list(range(vectors.shape[1] if mask is None else int(mask.sum(1).min())))


def _check_apart(cells: tuple[Entry, ...]) -> None:
    """Raise DistillError where two cells share one subspace."""
    subspaces = {id(cell.student[0].subspace) for cell in cells}
    if len(subspaces) < len(cells):
        raise DistillError("subspace=… gave one object twice; make a new one in each call: lambda: Rotation(8).")


def _rows(values: Mapping[str, Tensor]) -> int:
    """Return the number of examples."""
    return len(next(iter(values.values())))


def _name(variables: Any) -> str:
    """Return the name of a variable in tables; of several, with + between them."""
    return variables if isinstance(variables, str) else "+".join(variables)


def _text(positions: Any) -> str:
    """Return the heading of a position in tables; empty for all tokens."""
    if positions is None:
        return ""
    return getattr(positions, "__name__", "function") if callable(positions) else str(positions)


def _label(variable: str, token: str, several: bool) -> str:
    """Return the label of a column of the heat map, with the variable where there are several."""
    return " @ ".join(part for part in (variable if several else "", token) if part) or variable
