"""The interchange accuracy of a compressed model under its original, kind by kind and block by block."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from distill.auditing.answers import Models
from distill.data.rows import Rows
from distill.errors import DistillError
from distill.evaluation.interchange_accuracy import measurement_of
from distill.evaluation.interchange_result import InterchangeAccuracy
from distill.evaluation.kind_measurement import PROBED, PlacedKind
from distill.interchange.answer import Answer, resolved
from distill.interchange.kinds import Kind
from distill.interchange.positions import Span
from interventions import InterventionError, Location

KINDS = {
    "spans of tokens": Kind(Span(0.3)),
    "answering token": Kind(Answer()),
    "attention heads": Kind(Span(0.3, same=True), site="attention_heads"),
    "mlp output": Kind(Span(0.3, same=True), site="mlp_output"),
}
"""The kinds of interchange of an audit; those without a site are of the outputs of blocks."""


def interchanges_of(
    models: Models, rows: Rows, kinds: Mapping[str, Kind], settings: Mapping[str, Any]
) -> tuple[dict[str, InterchangeAccuracy], list[str]]:
    """Measure the interchange accuracy of every kind, at the blocks that stand for each other.

    Args:
        models: the original, the compressed model, and which blocks stand for each other.
        rows: the data.
        kinds: by name; those with the same sources share the runs of base and source.
        settings: pairs, seed and batch size, as `interchange_accuracy` takes them.

    Returns:
        The figures by kind, and notes on kinds that could not be measured.
    """
    if models.reading.kind == "embeddings":
        return {}, ["no interchange accuracy: embeddings are no answers that could agree."]
    if len(rows) < 2:
        return {}, ["no interchange accuracy: one row has no other to be paired with."]
    pairs = [(each.stack, i, j) for each in models.layers for i, j in each.pairs]
    if not pairs:
        return {}, ["no interchange accuracy: no blocks stand for each other."]
    mapping = {Location(i, stack=stack): Location(j, stack=stack) for stack, i, j in pairs}
    measurement = measurement_of(models.original, models.compressed, mapping, rows, **settings)
    few = models.columns(rows, torch.arange(min(PROBED, len(rows))))[0]
    placed: list[PlacedKind] = []
    notes: list[str] = []
    for name, kind in kinds.items():
        try:
            rule = resolved(kind.positions, models.original, few)  # no gradient flows through a quantized model
            found = measurement.place(name, replace(kind, positions=rule))
            why = measurement.why_not(found)
        except (DistillError, InterventionError) as error:
            why = str(error)
        if why:
            notes.append(f"no interchange accuracy of {name}: {why}")
        else:
            placed.append(found)
    kept = {name: settings[name] for name in ("pairs", "seed")}
    return {each.placed.name: each.accuracy(kept) for each in measurement.measure(placed)}, notes
