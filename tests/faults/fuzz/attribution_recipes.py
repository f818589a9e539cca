"""Right calls of attribution patching, of heads and of grids of heads."""

import functools

import interventions as iv
from tests.faults.fuzz.attack import Recipe
from tests.faults.fuzz.interventions_recipes import BLOCK, decoder, ids

COLUMNS = "None|0|1|-1|7|[1]|range|(1, 2, 3)|{text: 1}|generator|numpy int"


def by_head(position: object) -> iv.Grid:
    """Return the grid of the heads of a decoder as layers and heads."""
    grid = iv.sweep(
        decoder(), ids(), ids(1), iv.heads(decoder()), metric=iv.logit_difference(3, 4), positions=[0, -1]
    )  # fmt: skip
    return grid.by_head(position)  # type: ignore[arg-type]


@functools.cache
def edges() -> iv.Edges:
    """Return the edges of a decoder."""
    return iv.edge_attribution(decoder(), ids(), ids(1), iv.logit_difference(3, 4))


RECIPES = [
    Recipe(
        "interventions.heads",
        iv.heads,
        lambda: {"model": decoder(), "site": "attention_heads", "stack": None},
        {"model": "", "site": "", "stack": "None"},
    ),
    Recipe("interventions.Grid.by_head", by_head, lambda: {"position": 0}, {"position": "0|-1"}),
    Recipe(
        "interventions.attribution_patch",
        iv.attribution_patch,
        lambda: {
            "model": decoder(),
            "base": ids(),
            "source": ids(1),
            "at": [BLOCK],
            "metric": iv.logit_difference(3, 4),
            "positions": [1],
            "source_positions": None,
            "op": None,
            "steps": 1,
            "along": None,
            "generator": None,
        },
        {
            "model": "",
            "base": "whole tensor",
            "source": "whole tensor",
            "at": "",
            "metric": "",
            "positions": COLUMNS,
            "source_positions": "None|0|1|-1|numpy int|[1]|{text: 1}",
            "op": "None|operator",
            "steps": "None|count",
            "along": "None",
            "generator": "None|draws",
        },
        own=("model", "base", "source", "op", "metric"),
    ),
    Recipe(
        "interventions.edge_attribution",
        iv.edge_attribution,
        lambda: {
            "model": decoder(),
            "base": ids(),
            "source": ids(1),
            "metric": iv.logit_difference(3, 4),
            "steps": None,
            "stack": None,
        },
        {
            "model": "",
            "base": "whole tensor",
            "source": "whole tensor",
            "metric": "",
            "steps": "None|1|numpy int",
            "stack": "None",
        },
        skip={"steps": "7|huge"},
        own=("model", "base", "source", "metric"),
    ),
    Recipe("interventions.Edges.largest", lambda k: edges().largest(k), lambda: {"k": 1}, {"k": "count|huge"}),
    Recipe(
        "interventions.circuit",
        iv.circuit,
        lambda: {
            "model": decoder(),
            "base": ids(),
            "source": ids(1),
            "metric": iv.logit_difference(3, 4),
            "edges": edges(),
            "faithfulness": 0.01,
        },
        {
            "model": "",
            "base": "whole tensor",
            "source": "whole tensor",
            "metric": "",
            "edges": "",
            "faithfulness": "1|0.5|1.0|numpy int|numpy float",
        },
        own=("model", "base", "source", "metric"),
    ),
]
