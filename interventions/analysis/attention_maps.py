"""`attention_map`: the picture of one attention pattern, blank where the mask leaves nothing to attend to."""

from collections.abc import Sequence
from typing import Any

import torch

from interventions.arguments import checked
from interventions.errors import InterventionError
from interventions.execution.parts import is_masked
from interventions.execution.run import Run
from interventions.locations import Location
from interventions.names import token_label


@checked
def attention_map(
    run: Run,
    layer: int,
    head: int,
    *,
    example: int = 0,
    tokens: Sequence[str] | None = None,
    stack: str | None = None,
) -> Any:
    """Draw how much each token of an example attends to each other one in a head: queries down, keys across.

    Cells beyond the mask (causal, sliding window) stay blank, and padding is left out.

    Args:
        run: a run of a model with attention; what it did not record is computed by another run.
        layer: the number of the block.
        head: the number of the head.
        example: the number of the example.
        tokens: the texts of its real tokens; None writes their positions alone.
        stack: which list of blocks, in a model with several.

    Returns:
        A matplotlib figure.

    Raises:
        InterventionError: a layer, head or example that does not exist; another number of tokens.
    """
    pattern, scores = (
        run.activations[Location(layer, site, heads=head, stack=stack)]
        for site in ("attention_pattern", "attention_scores")
    )
    if not -len(pattern) <= example < len(pattern):
        raise InterventionError(f"example={example} does not exist: there are {len(pattern)}; write example=0.")
    weights, blank = pattern[example, 0].detach(), is_masked(scores[example, 0])
    real = (~blank).any(0).nonzero()[:, 0]
    queries = real if weights.shape[0] == weights.shape[1] else torch.arange(len(weights), device=real.device)
    if tokens is not None and len(tokens) != len(real):
        raise InterventionError(
            f"{len(tokens)} tokens were given for {len(real)} real ones of example {example}; pass one text for each."
        )
    texts = [""] * len(real) if tokens is None else [token_label(token).strip() for token in tokens]
    keys = [f"{number} {text}".strip() for number, text in enumerate(texts)]
    rows = keys if len(queries) == len(keys) else list(map(str, range(len(queries))))
    from interventions.analysis.plots import heat_map  # matplotlib takes half a second

    return heat_map(
        weights[queries][:, real], rows, keys, label=f"attention of head {layer}.{head}", column_label="key",
        blank=blank[queries][:, real],
    )  # fmt: skip
