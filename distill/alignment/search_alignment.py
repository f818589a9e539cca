"""The search for the place of each variable: how well each location and position of a network holds it.

Every variable is interchanged at every location and position. The runs on bases and sources are shared by all of them,
and so is a counterfactual run of the network by all variables, as what it answers does not depend on them.

Geiger et al. 2023 (arXiv:2303.02536), section 4; Wu et al. 2023 (arXiv:2305.08809), section 4.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from distill.alignment.learning import COLDEST, learn, schedule_of
from distill.alignment.search import Search
from distill.causal.feed import Given
from distill.causal.model import CausalModel
from distill.causal.values import call_or_explain
from distill.errors import DistillError, checked
from distill.evaluation.measurement import Measurement
from distill.evaluation.outcome import outcomes_of
from distill.evaluation.variable_accuracy import (
    VariableInterchanges,
    examples_of_model,
    pairs_at_once,
    refuse_ineffective,
)
from distill.interchange.mapping import Entry, depth, entries_of
from distill.interchange.swap import encoded
from distill.interchange.whole_state import refuse_wholes
from distill.models.inputs import device_of, evaluating, refuse_valueless, to_device
from distill.models.outputs import answered
from distill.models.trials import translated
from distill.training.resolve import feed_of
from distill.training.schedule import Schedule
from interventions import Location, architecture, as_location, run_to, shown, unchanged

PAIRS_OF_A_STEP = 256
"""Of learning, by default."""


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
    batch_size: int | None = None,
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
        weights, steps, lr, coldest: of learning, as for `align`.
        batch_size: pairs of a step of learning, and of a forward of the measurement; None takes 256 in a step, and in a
            forward as many as a share of the free memory holds.
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
            schedule=schedule_of(steps, PAIRS_OF_A_STEP if batch_size is None else batch_size, seed),
            batch_size=batch_size, lr=lr, coldest=coldest, pairs=pairs, console=console,
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
    batch_size: int | None,
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
    seed = schedule.seed
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
        size = pairs_at_once(causal_model, network, examples) if batch_size is None else batch_size
        tally = Measurement(VariableInterchanges(causal_model, network, cells), examples, seed, size).tally()
    refuse_ineffective(tally, cells, has_rows=data is not None)
    outcomes = outcomes_of([tally.of(i) for i in range(len(cells))], examples.sharing)
    settings: dict[str, Any] = {"pairs": pairs, "seed": seed}
    if subspace is not None:
        settings |= {"subspace": repr(subspace()), "steps": schedule.steps, "batch_size": schedule.batch_size, "lr": lr}
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
