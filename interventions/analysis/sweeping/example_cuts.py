"""What holds a value for each example (targets, masks, positions) is cut for the batches of a sweep, or refused."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from interventions.analysis.sweeping.batch_sweeps import SweepSettings
from interventions.errors import InterventionError
from interventions.execution.cells import columns_of
from interventions.execution.run import Inputs, Run
from interventions.locations import Location
from interventions.metrics import Metric, Normalized
from interventions.metrics.metric_targets import examples_of, take
from interventions.models.architectures import architecture
from interventions.models.calls import arguments_of
from interventions.positions import is_mask


def check_ops(settings: SweepSettings) -> None:
    """Raise InterventionError for an operator that is not the same for each batch."""
    for at, op in settings.ops.items():
        if getattr(op, "pools_source", False) and getattr(op, "needs_source", False):
            raise InterventionError(
                f"{type(op).__name__} at {at} pools all examples of its source, and a batch holds some of them; "
                "measure first: op=mean_of(model, at, source)."
            )
        for name in ("value", "normal"):
            value = getattr(op, name, None)
            least = 3 if at.has_heads else 2
            if isinstance(value, Tensor) and value.ndim >= least and any(size > 1 for size in value.shape[: 1 - least]):
                raise InterventionError(
                    f"{type(op).__name__} at {at} holds {name} of shape {list(value.shape)}, one for each example, "
                    f"which a sweep over batches cannot cut; give one for all, [{value.shape[-1]}], or one batch."
                )


def labelled(settings: SweepSettings) -> Any:
    """Return the positions with their labels, which do not depend on the batch."""
    positions = settings.positions
    if positions is None or isinstance(positions, str):
        return positions
    columns = columns_of(positions, settings.source_positions, 0)
    return {column.label: column.positions for column in columns}


def settings_of(settings: SweepSettings, rows: range) -> SweepSettings:
    """Return the settings of some examples: positions that are given for each example are cut."""
    return replace(
        settings,
        positions=_cut(settings.positions, rows, "positions"),
        source_positions=_cut(settings.source_positions, rows, "source_positions"),
    )


def _cut(positions: Any, rows: Sequence[int], what: str) -> Any:
    """Return the positions of the columns for some examples."""
    if isinstance(positions, Mapping):
        return {label: _cut_entry(entry, rows, what) for label, entry in positions.items()}
    return [_cut_entry(entry, rows, what) for entry in positions] if isinstance(positions, tuple | list) else positions


def _cut_entry(entry: Any, rows: Sequence[int], what: str) -> Any:
    return take(entry, rows, what) if is_per_example(entry) else entry


def is_per_example(entry: Any) -> bool:
    """Return whether positions are given for each example."""
    if isinstance(entry, Tensor):
        return is_mask(entry) or entry.ndim == 2
    return isinstance(entry, Sequence) and len(entry) > 0 and all(isinstance(each, Sequence | range) for each in entry)


def check_counts(metric: object, settings: SweepSettings, examples: int) -> None:
    """Raise InterventionError for targets, masks or positions of more examples than there are."""
    inner = metric.metric if isinstance(metric, Normalized) else metric
    held = {"the targets of the metric": getattr(getattr(inner, "function", inner), "examples", None)}
    held["mask"] = examples_of(getattr(inner, "mask", None))
    for name in ("positions", "source_positions"):
        given = getattr(settings, name)
        entries = given.values() if isinstance(given, Mapping) else given if isinstance(given, tuple | list) else ()
        held[name] = next((len(entry) for entry in entries if is_per_example(entry)), None)
    wrong = next((name for name, count in held.items() if count is not None and count != examples), None)
    if wrong is not None:
        raise InterventionError(
            f"{wrong} has entries for {held[wrong]} examples and the data has {examples}; give one for each."
        )


def metric_of(
    settings: SweepSettings, metric: Callable[[Any], Tensor], rows: range, base: Inputs | Run
) -> Callable[[Any], Tensor]:
    """Return the metric of some examples, which must return one number for each of them."""
    cut = _masked(settings, take(metric, list(rows), "the metric"), base)
    if isinstance(cut, Metric | Normalized):
        return cut
    return _EachExample(cut, len(rows))


@dataclass(frozen=True, eq=False)
class _EachExample:
    """A metric of a user's own, which returns one number for each example of a batch.

    Attributes:
        metric: the metric.
        examples: the number of examples.
    """

    metric: Callable[[Any], Tensor]
    examples: int

    def __call__(self, output: Any) -> Tensor:
        value = self.metric(output)
        if isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim == 0):
            raise InterventionError(
                f"the metric returned one number for a batch of {self.examples} examples, and the batches are joined; "
                f"return [{self.examples}], one for each example."
            )
        return value


def _masked(settings: SweepSettings, metric: Any, base: Inputs | Run) -> Any:
    """Return a metric of `interventions.metrics` with the mask of the batch, where it has none of that width."""
    if isinstance(metric, Normalized):
        return replace(metric, metric=_masked(settings, metric.metric, base))
    if not isinstance(metric, Metric):
        return metric
    name = architecture(settings.model).place(Location(site="logits")).mask
    inputs = base.inputs if isinstance(base, Run) else base
    own = arguments_of(settings.model, inputs).get(name)
    if not isinstance(own, Tensor) or own.ndim != 2:
        return metric
    if metric.mask is None or metric.mask.shape == own.shape:
        return metric if metric.mask is not None else replace(metric, mask=own)
    if torch.equal(metric.mask.bool().sum(1).cpu(), own.bool().sum(1).cpu()):
        return replace(metric, mask=own)  # padded to another width
    raise InterventionError(
        f"the mask of the metric has other real tokens than the {name} of a batch; leave it out, as each batch has "
        "its own: mask=None."
    )
