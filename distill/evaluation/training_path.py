"""Training paths: how training moves through the space of representations, checkpoint by checkpoint.

The checkpoints of several runs become points x in a plane by metric multidimensional scaling: their distances are as
near as they can be to d = 1 − the similarity of the representations, so that

    stress = √(Σ_ij (‖x_i − x_j‖ − d_ij)² / Σ_ij ‖x_i − x_j‖²)

is least.

Abnar, Dehghani, Zuidema 2020 (arXiv:2006.00555), section 4; Kruskal 1964 (doi:10.1007/BF02289565).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import isfinite, nan
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from distill.data.rows import batches
from distill.data.seeds import decided
from distill.errors import DistillError, checked
from distill.evaluation.similarity import representational_similarity
from distill.models.inputs import device_of, evaluating, inputs_of, to_device, uncompiled
from distill.models.outputs import answered
from distill.models.trials import check_values, tried
from distill.statistics.tables import table_of
from distill.tasks.loading import held_out
from distill.training.progress import Record
from interventions import (
    Location,
    Picture,
    Result,
    architecture,
    as_location,
    label,
    plain_data,
    printed,
    run,
    select,
    shown,
)

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]

STARTS = 8  # random starts of the scaling; the best result is kept
ROUNDING = 1e-6  # distances that float32 has made of 0


@checked
@dataclass(frozen=True, eq=False)
class TrainingPath(Result):
    """The checkpoints of runs as points in a plane: the nearer two are, the more alike are their representations.

    It prints as a table.

    Attributes:
        points: for each run, the point of each checkpoint; distances have a meaning, the axes have none.
        distances: 1 − similarity between all checkpoints, run after run.
        stress: how much the distances in the plane differ from these (Kruskal's stress-1): 0.05 is good, 0.2 poor.
        similarity: the name of the measure.
    """

    points: Mapping[str, Float[Tensor, "_ 2"]]
    distances: Float[Tensor, "all all"]
    stress: float
    similarity: str

    def between(self, one: str, other: str) -> Float[Tensor, "checkpoints others"]:
        """Return the distances from the checkpoints of one run to those of another, or among its own.

        Raises:
            DistillError: a run that does not exist.
        """
        return self.distances[self._numbers(one)][:, self._numbers(other)]

    def _numbers(self, run: str) -> slice:
        """Return the rows of a run in `distances`."""
        if run not in self.points:
            raise DistillError(f"there is no run {run!r}; the runs are {', '.join(map(repr, self.points))}.")
        names = list(self.points)
        before = sum(len(self.points[name]) for name in names[: names.index(run)])
        return slice(before, before + len(self.points[run]))

    def plot(self) -> Picture:
        """Draw the runs as lines from their first checkpoint (hollow) to their last (large)."""
        figure = Picture(figsize=(5.6, 4.6), dpi=110, layout="constrained")
        axes = figure.subplots()
        for number, (name, points) in enumerate(self.points.items()):
            across, down = points.T.tolist()
            color = f"C{number % 10}"
            axes.plot(across, down, color=color, lw=1, alpha=0.6, zorder=1)
            axes.scatter(across[1:-1], down[1:-1], s=12, color=color, zorder=2)
            if len(points) > 1:
                axes.scatter(across[:1], down[:1], s=36, facecolors="white", edgecolors=color, zorder=3)
            axes.scatter(across[-1:], down[-1:], s=64, color=color, edgecolors="white", zorder=3, label=label(name))
        axes.set_aspect("equal", adjustable="datalim")
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
        axes.set_title(f"1 − {label(self._measure)}; stress {self.stress:.3f}", fontsize=9)
        axes.legend(frameon=False, fontsize=8)
        return figure

    def to_dict(self) -> dict[str, Any]:
        """Return points, distances, stress and the name of the measure as plain data, for JSON."""
        return {
            "points": plain_data(self.points),
            "distances": plain_data(self.distances),
            "stress": plain_data(self.stress),
            "similarity": self.similarity,
        }

    def to_pandas(self) -> "pandas.DataFrame":
        """Return the points as a table: a row for each run and checkpoint, with its place (x, y) in the plane.

        Raises:
            DistillError: pandas is not installed.
        """
        rows = (
            {"run": name, "checkpoint": number, "x": x, "y": y}
            for name, points in self.points.items()
            for number, (x, y) in enumerate(points.tolist())
        )
        return table_of(rows, "run", "checkpoint")

    @printed
    def __str__(self) -> str:
        names = list(self.points)
        wide = max(map(len, (*names, "run")))
        ends = "".join(f"  {name:>7}" for name in names)
        lines = [
            f"1 − {self._measure}: how far each run moved, and how far the last checkpoints lie apart",
            f"{'run'.ljust(wide)}  checkpoints    moved{ends}",
        ]
        for name in names:
            moved = float(self.between(name, name)[0, -1])
            apart = (float(self.between(name, other)[-1, -1]) for other in names)
            cells = "".join(f"  {each:{max(7, len(other))}.3f}" for each, other in zip(apart, names, strict=True))
            lines.append(f"{name.ljust(wide)}  {len(self.points[name]):11}  {moved:7.3f}{cells}")
        return "\n".join([*lines, f"stress in the plane {self.stress:.3f}"])

    @property
    def _measure(self) -> str:
        """The name of the similarity in words."""
        return self.similarity.replace("_", " ")


@checked
def training_path(
    runs: Mapping[str, Sequence[Float[Tensor, "_ _"]]],
    *,
    similarity: Callable[[Tensor, Tensor], Tensor] = representational_similarity,
    seed: int = 0,
) -> TrainingPath:
    """Place the checkpoints of several runs in one plane, as far apart as 1 − the similarity of their representations.

    Abnar, Dehghani, Zuidema 2020 (arXiv:2006.00555), section 4. The points come from metric multidimensional scaling
    (SMACOF; Borg, Groenen 2005, Modern Multidimensional Scaling, chapter 8).

    Args:
        runs: {name: [the representations of each checkpoint, in order]}, all of the same examples, see
            `representations`. A network that is not trained, such as a teacher, is a run of one checkpoint.
        similarity: `representational_similarity`, `cka`, or a function like them.
        seed: of the random starts of the scaling.

    Raises:
        DistillError: fewer than two checkpoints; activations that cannot be compared.
    """
    states = [state for checkpoints in runs.values() for state in checkpoints]
    empty = next((name for name, checkpoints in runs.items() if not len(checkpoints)), None)
    if len(states) < 2 or empty is not None:
        what = f"run {empty!r} has no checkpoints" if empty is not None else f"{len(states)} checkpoints make no path"
        raise DistillError(f"{what}; give {{name: [representations(model, rows, at), …]}}.")
    distances = torch.zeros(len(states), len(states), dtype=torch.float64)
    for i, j in combinations(range(len(states)), 2):
        found: Any = similarity(states[i], states[j])
        is_number = isinstance(found, int | float) or (isinstance(found, Tensor) and found.numel() == 1)
        alike = float(found) if is_number else nan
        if not isfinite(alike):
            raise DistillError(
                f"{getattr(similarity, '__name__', 'similarity')} of checkpoints {i} and {j} is {found}, which is no "
                "distance; see whether both are numbers: states.isfinite().all()."
            )
        distances[i, j] = distances[j, i] = max(0.0, 1 - alike)
    points = _scale_to_plane(distances, seed)
    lengths = [len(checkpoints) for checkpoints in runs.values()]
    each = dict(zip(runs, points.split(lengths), strict=True))
    return TrainingPath(each, distances, _stress(points, distances), getattr(similarity, "__name__", "similarity"))


@checked
def representations(
    model: nn.Module,
    data: Any,
    at: Location | str,
    *,
    positions: int | None = None,
    batch_size: int = 128,
    answers: Any = None,
) -> Float[Tensor, "examples dims"]:
    """Return the activations of `model` at a location, in eval mode: a vector for each row.

    Args:
        model: any torch model; it is not changed.
        data: held-out rows, in any form that `accuracy` takes.
        at: a location, as `Location(1)`, "block_output.1" or "logits".
        positions: which token, counted over real tokens; −1 is the last. None takes all positions side by side.
        batch_size: rows of a forward.
        answers: which part of the model's output is its answer, as for `fit`; for "logits".

    Raises:
        DistillError: rows of several lengths and no `positions`, data that does not fit, or a location or position that
            does not exist.
    """
    model = uncompiled(model)
    rows = held_out(data, model)
    place, found = as_location(at), list[Tensor]()
    with evaluating(model), torch.no_grad(), answered((model,), answers):
        for chosen in batches(len(rows), batch_size):
            batch = to_device(rows.batch(chosen), device_of(model))
            inputs = inputs_of(model, batch)
            with tried("the model", model, inputs):
                vectors = run(model, inputs, place, resumable=False).vectors(place)
            check_values("the model", vectors)
            found.append(_one_vector_each(vectors, _real(model, place, vectors, batch), positions).cpu())
    if len({each.shape[1] for each in found}) > 1:
        raise _ragged()
    return torch.cat(found)


@checked
def snapshots(
    records: Iterable[Record],
    model: nn.Module,
    data: Any,
    at: Location | str,
    *,
    every: int,
    positions: int | None = None,
    answers: Any = None,
) -> list[Float[Tensor, "examples dims"]]:
    """Train, and take the representations of `model` before the first step, after every `every` steps and the last.

    `snapshots(distill.steps(teacher, student, data=task), student, task.test, Location(1), every=100)` is one run for
    `training_path`.

    Args:
        records: `distill.steps(...)`, whose student is `model`, before its first step.
        model: as for `representations`.
        data: as for `representations`.
        at: as for `representations`.
        every: the number of steps between two snapshots.
        positions, answers: as for `representations`.

    Raises:
        DistillError: `every` below 1; what `steps` and `representations` raise.
    """
    if every < 1:
        raise DistillError(f"every={every} steps is no distance; use e.g. every=100.")
    rows = held_out(data, model)
    taken = [representations(model, rows, at, positions=positions, answers=answers)]
    for record in records:
        if not isinstance(record, Record):
            raise DistillError(
                f"records hold {shown(record)}; give those of a training that has not begun: distill.steps(…)."
            )
        if record.step % every == 0 or record.step == record.total:
            taken.append(representations(model, rows, at, positions=positions, answers=answers))
    if len(taken) == 1:
        raise DistillError("the records hold no step; give those of a training that has not begun: distill.steps(…).")
    return taken


def _one_vector_each(vectors: Tensor, mask: Tensor | None, positions: int | None) -> Float[Tensor, "batch dims"]:
    """Return one vector for each example: of one position, or of all positions side by side."""
    if vectors.ndim == 4:
        vectors = rearrange(vectors, "batch position heads dims -> batch position (heads dims)")
    if vectors.ndim == 2:
        if positions is not None:
            raise DistillError(
                f"positions={positions} of vectors {tuple(vectors.shape)}, which have none; leave it out."
            )
        return vectors
    real = torch.ones(vectors.shape[:2], dtype=torch.bool) if mask is None else mask
    if positions is not None:
        chosen = select(positions, real).to(vectors.device)
        return vectors[chosen.rows, chosen.columns]
    if not real.all():
        raise _ragged()
    return rearrange(vectors, "batch position dims -> batch (position dims)")


def _real(model: nn.Module, at: Location, vectors: Tensor, batch: Mapping[str, Tensor]) -> Tensor | None:
    """Return which tokens at a location are no padding; None where the activations have no tokens."""
    if vectors.ndim < 3:
        return None
    rows, width = vectors.shape[:2]
    place = architecture(model).place(at)
    real = place.real(batch, rows, width)
    if real is None:
        raise DistillError(
            f"{place.mask} has shape {list(batch[place.mask].shape)} and {at} has {width} tokens, so padding cannot be "
            "found; leave the mask out, or name another place."
        )
    return real


def _ragged() -> DistillError:
    """Return the error about rows of several lengths."""
    return DistillError(
        "the rows have several lengths, so not every one has all positions; name one: positions=0, or positions=-1 "
        "for the last."
    )


def _scale_to_plane(distances: Float[Tensor, "n n"], seed: int) -> Float[Tensor, "n 2"]:
    """Return points whose distances are as near as they can be to these, their largest extent along the first axis."""
    with decided(0):  # scikit-learn draws while it is imported
        from sklearn.manifold import smacof

    if distances.max() < ROUNDING:
        return torch.zeros(len(distances), 2, dtype=distances.dtype)
    points, _ = smacof(
        distances.numpy(),
        n_components=2,
        metric=True,
        n_init=STARTS,
        max_iter=1000,
        eps=1e-9,
        random_state=seed % 2**32,
    )
    centered = torch.tensor(points) - torch.tensor(points).mean(0)
    turned = centered @ torch.linalg.svd(centered, full_matrices=False).Vh.T
    return turned * torch.where(turned[0] > 0, -1.0, 1.0)  # the first checkpoint at the lower left


def _stress(points: Float[Tensor, "n 2"], distances: Float[Tensor, "n n"]) -> float:
    """Return Kruskal's stress-1 (Kruskal 1964, doi:10.1007/BF02289565); 0 where all points are one."""
    shown = torch.cdist(points, points)
    return float(((shown - distances).square().sum() / shown.square().sum().clamp_min(1e-30)).sqrt())
