"""`probe`: what linear classifiers read from the activations of a model, location by location.

Logistic regression on the standardized vectors x of the training rows, min over W, b of
Σ −log softmax(W x + b)[y] + penalty / 2 · ‖W‖² (Alain, Bengio 2016, arXiv:1610.01644). A control probe is fitted to
labels that were permuted among these rows; by how much the probe is better is its selectivity (after Hewitt, Liang
2019, arXiv:1909.03368).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interventions.analysis.data_batches import BATCH_SIZE, are_rows, batches_of
from interventions.analysis.result import Result, data_frame, plain_data
from interventions.analysis.vectors import check_width, vectors_of
from interventions.arguments import checked
from interventions.editing.directions import Direction
from interventions.endings import without_gradients
from interventions.errors import InterventionError
from interventions.execution.run import Where, locations_of
from interventions.execution.stamps import unchanged
from interventions.locations import Location, as_location
from interventions.models.architectures import architecture
from interventions.models.wrappers import Model
from interventions.names import printed, shown
from interventions.positions import Positions
from interventions.runs import check_eval, run_to

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]


class Read(NamedTuple):
    """A linear classifier of the vectors at a location, and how often it is right on held-out ones.

    Attributes:
        accuracy: the share of held-out vectors whose class it names.
        control: that of the classifier that learned permuted labels.
        weights: `[classes, dims]`, for vectors as they are in the model.
        bias: `[classes]`.
        vectors: `[n, dims]`, the held-out ones.
        labels: `[n]`, their numbers in `Probes.classes`.
    """

    accuracy: float
    control: float
    weights: Float[Tensor, "classes dims"]
    bias: Float[Tensor, " classes"]
    vectors: Float[Tensor, "n dims"]
    labels: Int[Tensor, " n"]

    @property
    def selectivity(self) -> float:
        """By how much the probe is right more often than the control."""
        return self.accuracy - self.control

    @property
    def majority(self) -> float:
        """The share of the most common class among the held-out vectors."""
        return float(self.labels.bincount().max()) / len(self.labels)


@dataclass(frozen=True, eq=False)
class Probes(Result):
    """The linear probes of a model, one for each location. It prints as a table of them.

    Attributes:
        reads: the probe of each location.
        classes: the labels, in the order of the rows of `Read.weights`.
        trained_on: the number of vectors that each learned from.
    """

    reads: Mapping[Location, Read] = field(repr=False)
    classes: tuple[int, ...]
    trained_on: int

    @property
    def best(self) -> Location:
        """The location whose probe is right most often, the first of several."""
        return max(self.reads, key=lambda at: self.reads[at].accuracy)

    @checked
    def logits(self, at: Location | str, vectors: Float[Tensor, "... dims"]) -> Float[Tensor, "... classes"]:
        """Return what the probe of a location gives for activations there.

        Args:
            at: the location.
            vectors: its activations in the last axis, e.g. `run(model, inputs, at).vectors(at)`.

        Raises:
            InterventionError: a location without a probe, or activations of another width.
        """
        read = self._read(at)
        if vectors.shape[-1:] != read.weights.shape[-1:]:
            raise InterventionError(
                f"the probe of {at} reads {read.weights.shape[-1]} dims, and the vectors are {list(vectors.shape)}; "
                "pass activations of its location: run(model, inputs, at).vectors(at)."
            )
        weights = read.weights.to(vectors.device, torch.float32)
        return vectors.float() @ weights.T + read.bias.to(weights)

    @checked
    def direction(self, at: Location | str, label: int) -> Direction:
        """Return the direction along which the logit of a class grows faster than the mean of all, to steer or ablate.

        Args:
            at: a location whose activations are vectors; at a site with heads, one head.
            label: the class.

        Raises:
            InterventionError: a location without a probe, or a class that it does not know.
        """
        read, at = self._read(at), as_location(at)
        if label not in self.classes:
            known = ", ".join(map(str, self.classes[:12]))
            raise InterventionError(f"label={label} is no class of these probes; name one of {known}.")
        number = self.classes.index(label)
        vector = read.weights[number] - read.weights.mean(0)
        along = read.vectors @ (vector / vector.norm())
        return Direction(at, vector, along[read.labels == number], along[read.labels != number])

    def _read(self, at: Location | str) -> Read:
        found = self.reads.get(as_location(at))
        if found is None:
            raise InterventionError(f"{at} has no probe; name one of {', '.join(map(str, self.reads))}.")
        return found

    def plot(self) -> Any:
        """Draw how often the probes are right, beside their controls and the most common class."""
        from interventions.analysis.plots import Picture  # matplotlib takes half a second

        names, reads = list(map(str, self.reads)), list(self.reads.values())
        figure = Picture(figsize=(5.5, 0.28 * len(reads) + 1.3), dpi=110, layout="constrained")
        axes = figure.subplots()
        places = range(len(reads))
        axes.plot([each.accuracy for each in reads], places, "o-", color="C0", label="probe")
        axes.plot([each.control for each in reads], places, "o:", color="C7", label="permuted labels")
        axes.axvline(reads[0].majority, color="C3", linewidth=1, label="most common class")
        axes.set(yticks=places, yticklabels=names, xlim=(0, 1.02), xlabel="share of held-out vectors")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize="small")
        return figure

    def _rows(self) -> Iterator[dict[str, Any]]:
        """Yield the figures of each location."""
        for at, read in self.reads.items():
            figures = {"accuracy": read.accuracy, "control": read.control, "selectivity": read.selectivity}
            yield {"location": str(at), **figures, "majority": read.majority, "held out": len(read.labels)}

    def to_dict(self) -> dict[str, Any]:
        """Return the figures of each location, with its weights, as plain data."""
        rows = [
            row | {"weights": plain_data(read.weights), "bias": plain_data(read.bias)}
            for row, read in zip(self._rows(), self.reads.values(), strict=True)
        ]
        return {"classes": list(self.classes), "trained on": self.trained_on, "locations": rows}

    def to_pandas(self) -> "pandas.DataFrame":
        """Return a table with a row for each location: accuracy, control, selectivity, most common class, vectors.

        Raises:
            InterventionError: pandas is not installed.
        """
        return data_frame(self._rows(), "location")

    @printed
    def __repr__(self) -> str:
        rows = list(self._rows())
        width = max(len(row["location"]) for row in rows)
        lines = [
            f"{row['location']:{width}}  {row['accuracy']:8.3f}  {row['control']:7.3f}  {row['majority']:8.3f}"
            for row in rows
        ]
        head = (
            f"linear probes: {len(self.classes)} classes, {self.trained_on} vectors trained on, {rows[0]['held out']} "
            "held out"
        )
        return "\n".join([head, f"{'':{width}}  accuracy  control  majority", *lines])


@checked
def probe(
    model: Model,
    data: object,
    at: Where,
    labels: Any = None,
    *,
    positions: Positions = -1,
    held_out: float = 0.2,
    penalty: float = 1.0,
    batch_size: int | None = None,
    seed: int = 0,
) -> Probes:
    """Fit a linear probe at each of several locations, and measure it on held-out rows beside a control.

    Alain, Bengio 2016 (arXiv:1610.01644); the control after Hewitt, Liang 2019 (arXiv:1909.03368): the same probe on
    labels that were permuted among the training rows. The model runs once, and gets no gradients. `direction` of what
    is returned makes a probe an intervention, which says whether the model uses what can be read.

    Args:
        model: a torch model in eval mode, or one of nnsight.
        data: inputs, batch by batch, or rows that are read by their numbers, as for `mean_of`.
        at: a Location or several. The heads of one are read together; `heads=[3]` reads one.
        labels: `[rows]`, a class for each row, whole numbers; −100 leaves the row out. None takes the column "labels"
            of rows.
        positions: which tokens, counted over real tokens; −1 is the last of each row, None all. The vectors of a row
            have its label, and are all trained on or all held out.
        held_out: the share of the rows that the probe is measured on.
        penalty: of the squared weights, of standardized vectors.
        batch_size: how many rows are read at a time, as for `mean_of`.
        seed: decides which rows are held out, and permutes the labels of the control.

    Returns:
        Probes, with a probe for each location.

    Raises:
        InterventionError: labels that are no classes or not one for each row; fewer than two classes to learn or to
            measure; activations that are not finite; a location without a fixed width; a model in train mode.

    >>> net = torch.nn.Sequential(torch.nn.Identity(), torch.nn.ReLU()).eval()
    >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    >>> probe(net, [x], ["module:0", "module:1"], (x[:, 0] > 0).long()).best
    Location(module='0')
    """
    check_eval(model)
    if not 0 < held_out < 1:
        raise InterventionError(f"held_out={held_out} is no share of the rows; write e.g. held_out=0.2.")
    if not 0 < penalty < inf:
        raise InterventionError(f"penalty={penalty} leaves a probe without bounds or weights; write penalty=1.0.")
    locations = locations_of(at)
    if not locations:
        raise InterventionError("at= names no location, so nothing would be probed; write at=[Location(3)].")
    check_width(architecture(model), locations, "vectors of one width")
    vectors, rows, count = _vectors(model, data, locations, positions, batch_size)
    known = _labels(_column(data, count) if labels is None else labels, count)
    classes, numbers = known[known != -100].unique(return_inverse=True)
    numbers = torch.full_like(known, -1).masked_scatter_(known != -100, numbers)
    draws = torch.Generator().manual_seed(seed)
    usable = (numbers >= 0).nonzero()[:, 0]
    order = usable[torch.randperm(len(usable), generator=draws)]
    tested = order[: max(1, round(held_out * len(order)))]
    is_test = torch.zeros(count, dtype=torch.bool).index_fill_(0, tested, True)
    shuffled = numbers.clone()
    learned = order[len(tested) :]
    shuffled[learned] = numbers[learned[torch.randperm(len(learned), generator=draws)]]
    _check_classes(numbers[learned], classes)
    is_used = numbers[rows] >= 0
    train, test = is_used & ~is_test[rows], is_used & is_test[rows]
    reads = {}
    for location, values in vectors.items():
        if not values[is_used].isfinite().all():
            raise InterventionError(f"the activations at {location} are not finite; name another location, at=….")
        fitted, control = (
            _fitted(values[train], each[rows][train], len(classes), penalty) for each in (numbers, shuffled)
        )
        known_there = numbers[rows][test]
        right, by_chance = (
            float(((values[test] @ weights.T + bias).argmax(1) == known_there).double().mean())
            for weights, bias in (fitted, control)
        )
        weights, bias = (each.float() for each in fitted)
        reads[location] = Read(right, by_chance, weights, bias, values[test].float(), known_there)
    return Probes(reads, tuple(classes.tolist()), int(train.sum()))


def _vectors(
    model: Model, data: Any, locations: list[Location], positions: Positions, batch_size: int | None
) -> tuple[dict[Location, Tensor], Tensor, int]:
    """Return the vectors at each location, `[n, dims]` in float64, the row of each, `[n]`, and the number of rows."""
    found: dict[Location, list[Tensor]] = {location: [] for location in locations}
    numbers: list[Tensor] = []
    count = 0
    with without_gradients(), unchanged():
        for batch in batches_of(model, data, batch_size):
            done = run_to(model, batch.inputs(), locations)
            here = [vectors_of(done, location, positions) for location in locations]
            other = next((n for n, each in enumerate(here) if not torch.equal(each.rows.cpu(), here[0].rows.cpu())), 0)
            if other or here[0].examples != len(batch.rows):
                raise InterventionError(
                    f"{locations[other]} has other tokens than {locations[0]} or than the rows; probe each alone."
                )
            for location, each in zip(locations, here, strict=True):
                found[location].append(each.values.detach().cpu().double().flatten(1))
            numbers.append(here[0].rows.cpu() + batch.rows.start)
            count = batch.rows.stop
    if not count:
        raise InterventionError(
            "the data has no batches, so there is nothing to probe; pass batches of inputs: [inputs]."
        )
    return {location: torch.cat(each) for location, each in found.items()}, torch.cat(numbers), count


def _column(data: Any, count: int) -> Tensor:
    """Return the column "labels" of rows, read a few rows at a time."""
    parts = (range(first, min(first + BATCH_SIZE, count)) for first in range(0, count, BATCH_SIZE))
    found = [columns.get("labels") for columns in (data.batch(list(part)) for part in parts)] if are_rows(data) else []
    there = [each.cpu() for each in found if each is not None]
    if not there or len(there) < len(found):
        raise InterventionError(
            "the data has no column 'labels', so there is nothing to read; pass labels=, a class for each row."
        )
    return torch.cat(there)


def _labels(labels: Any, count: int) -> Int[Tensor, " rows"]:
    """Return the class of each row."""
    try:
        found = torch.as_tensor(labels).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InterventionError(
            f"labels={shown(labels)} are no classes; pass a whole number for each row, as torch.tensor([0, 1, …])."
        ) from error
    if found.shape != (count,) or found.is_floating_point() or found.is_complex():
        raise InterventionError(
            f"labels are {shown(found)} and the data has {count} rows; pass one whole number for each row."
        )
    return found.long()


def _check_classes(learned: Tensor, classes: Tensor) -> None:
    """Raise InterventionError where a class is not among the rows that are learned from, or there is only one."""
    if len(classes) < 2:
        raise InterventionError(
            f"the labels name {len(classes)} class, so there is nothing to tell apart; give rows of at least two."
        )
    missing = set(range(len(classes))) - set(learned.tolist())
    if missing:
        raise InterventionError(
            f"class {int(classes[min(missing)])} has no row to learn from, as all of its rows are held out; give more "
            "rows of it, another seed=…, or a smaller held_out=…."
        )


def _fitted(vectors: Tensor, labels: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Return the weights, `[classes, dims]`, and the bias of a classifier of vectors as they are."""
    from sklearn.linear_model import LogisticRegression

    center, scale = vectors.mean(0), vectors.std(0, correction=0)
    # A dim that is constant but for rounding says nothing, and its rounding must not be magnified.
    scale = torch.where(scale > 1e-9 * (1 + center.abs()), scale, inf)
    classifier = LogisticRegression(C=1 / penalty, max_iter=5000)
    classifier.fit(((vectors - center) / scale).numpy(), labels.numpy())
    weights, bias = torch.from_numpy(classifier.coef_), torch.from_numpy(classifier.intercept_)
    if classes == 2:
        weights, bias = torch.cat([-weights, weights]) / 2, torch.cat([-bias, bias]) / 2
    weights = weights / scale
    return weights, bias - weights @ center
