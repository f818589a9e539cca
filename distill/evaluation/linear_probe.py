"""Linear probe: the accuracy of a linear classifier of the frozen features of a model, on another data set or the same.

The features x of every train row are computed once and standardized; logistic regression is fitted to them,

    min over W, b of Σ −log softmax(W x + b)[y] + penalty / 2 · ‖W‖²,

and the probe's figure is its accuracy on the test rows.

Tian et al. 2019 (arXiv:1910.10699), section 4.2.
"""

import math
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from distill.data.rows import Rows, batches
from distill.data.seeds import decided
from distill.data.sources.lazy_columns import in_memory
from distill.errors import DistillError, checked
from distill.models.head import penultimate
from distill.models.inputs import device_of, evaluating, inputs_of, mask_of, students, to_device, uncompiled
from distill.models.numbering import numbered_as
from distill.models.outputs import answered
from distill.models.trials import answer_of, check_values, translated, tried
from distill.precision import widen
from distill.statistics.intervals import Share, wilson
from distill.tasks.loading import task_of
from interventions import Location, as_location, run

POOLS = ("mean", "first", "last")


@checked
def linear_probe(
    model: nn.Module,
    data: Any,
    test: Any = None,
    *,
    at: Location | str | None = None,
    pool: str = "mean",
    penalty: float = 1.0,
    batch_size: int = 128,
    answers: Any = None,
) -> Share:
    """Measure the accuracy of a linear classifier of the frozen features on test rows, with its Wilson interval.

    Logistic regression (`sklearn`, L-BFGS) is fitted to the features of the train rows, which are computed once, in
    eval mode and without a graph; each is first centered and divided by its standard deviation over the train rows.
    There is no randomness, and the model is left as it was. Where features have positions, of tokens or of an image,
    those of a row are pooled without its padding.

    Transferability as in Tian et al. 2019 (CRD, arXiv:1910.10699), section 4.2, and Giakoumoglou, Stathaki 2024 (ICD,
    arXiv:2407.11802), who train the classifier by stochastic gradient descent.

    Args:
        model: the student, or any model.
        data: a Task or its name, or train rows in any form that `Rows.of` takes. Its classes need not be the model's.
        test: the test rows, where the data are rows.
        at: the location of the features; None is the input of the last linear layer, see `penultimate`.
        pool: "mean", "first" or "last": how the vectors of the positions become one.
        penalty: of the squared weights, as 1/C of sklearn: beside the sum of the cross-entropies, half of it times the
            sum of the squares.
        batch_size: rows of a forward.
        answers: which part of the output of the model is its answer, as for `fit`, by which its last linear layer is
            found.

    Raises:
        DistillError: rows without classes, of one class or without test rows, or features that are no numbers.
    """
    if pool not in POOLS:
        raise DistillError(f"pool={pool!r} makes no vector of several positions; use one of {', '.join(POOLS)}.")
    if not 0 < penalty < math.inf:
        raise DistillError(f"penalty={penalty} leaves the classifier without bounds or weights; use e.g. penalty=1.0.")
    model = uncompiled(model)
    train, held_out = _rows(model, data, test)
    if at is None:
        trial = students(train.batch(range(min(2, len(train)))))
        with evaluating(model), torch.no_grad(), answered((model,), answers):
            answer_of("the model", model, trial, needed=False)
            with translated():
                at = penultimate(model, inputs_of(model, to_device(trial, device_of(model))))
    at = as_location(at)
    labels = [_labels(rows, name) for rows, name in ((train, "train"), (held_out, "test"))]
    if len(labels[0].unique()) < 2:
        raise DistillError(
            f"all {len(labels[0])} train rows have class {int(labels[0][0])}, so there is nothing to tell apart; give "
            "rows of at least two."
        )
    seen, new = (features(model, rows, at, pool=pool, batch_size=batch_size) for rows in (train, held_out))
    answers = _fit_and_predict(seen, new, labels[0], penalty)
    counted = labels[1] != -100
    return wilson(int((answers == labels[1])[counted].sum()), int(counted.sum()))


def features(
    model: nn.Module, data: Rows, at: Location, *, pool: str = "mean", batch_size: int = 128
) -> Float[Tensor, "rows width"]:
    """Return the activations of `model` at a location, one vector a row, on the CPU; the model is left as it was.

    Args:
        model: any torch model.
        data: the rows.
        at: the location.
        pool: how the vectors of the positions become one, as for `linear_probe`.
        batch_size: rows of a forward.

    Raises:
        DistillError: activations that are not finite, or no numbers.
    """
    found = []
    with evaluating(model), torch.no_grad():
        for rows in batches(len(data), batch_size):
            inputs = inputs_of(model, to_device(students(data.batch(rows)), device_of(model)))
            with tried("the model", model, inputs):
                states = run(model, inputs, at, resumable=False).vectors(at)
            check_values("the model", states)
            found.append(_pool(states, mask_of(inputs), pool).cpu())
    every = torch.cat(found)
    if not every.isfinite().all():
        count = int((~every.isfinite()).any(1).sum())
        raise DistillError(
            f"the features at {at} are not finite in {count} rows; look at the model, or choose another place: "
            "at=Location(…)."
        )
    return every


def _pool(states: Tensor, mask: Tensor | None, pool: str) -> Float[Tensor, "batch width"]:
    """Return one vector for each row: the mean over its real positions, or its first or last one."""
    states = widen(states)
    if states.ndim == 2:
        return states
    states = rearrange(states, "b t ... -> b t (...)")
    if mask is None or mask.shape != states.shape[:2]:
        mask = torch.ones(states.shape[:2], device=states.device)
    mask = mask.to(states.device).bool()
    if pool == "mean":
        return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    numbers = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    if pool == "first":
        chosen = numbers.masked_fill(~mask, mask.shape[1] - 1).amin(1)
    else:
        chosen = numbers.masked_fill(~mask, 0).amax(1)
    return states.gather(1, repeat(chosen, "b -> b 1 d", d=states.shape[-1]))[:, 0]


def _rows(model: nn.Module, data: Any, test: Any) -> tuple[Rows, Rows]:
    """Return the train rows and the test rows, their classes numbered alike."""
    task = task_of(data, model)
    if task is not None:
        return task.train, task.test if test is None else _numbered_as(Rows.of(test), task.train)
    if test is None:
        raise DistillError(
            "a probe is measured on rows that it was not fitted to, and train rows alone were given; give a Task, or "
            "linear_probe(model, train_rows, test_rows)."
        )
    train = Rows.of(data)
    return train, _numbered_as(Rows.of(test), train)


def _numbered_as(test: Rows, train: Rows) -> Rows:
    """Return the test rows with their classes numbered as those of the train rows."""
    return test if train.classes is None else numbered_as(test, names=train.classes)


def _labels(rows: Rows, name: str) -> Tensor:
    """Return the class of each row.

    Raises:
        DistillError: rows without one class each.
    """
    labels = rows.table.get("labels")
    labels = None if labels is None else in_memory(labels)
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
        one = isinstance(labels, Tensor) and labels.ndim == 1
        found = "none" if labels is None else "real numbers" if one else "several"
        raise DistillError(
            f"a probe needs one class a row in the column 'labels' and the {name} rows have {found}; give whole "
            "numbers, one for each row."
        )
    if not (labels != -100).any():
        raise DistillError(f"none of the {name} rows has a label that is not -100; give rows with classes.")
    return labels.cpu()


def _fit_and_predict(train: Tensor, test: Tensor, labels: Tensor, penalty: float) -> Tensor:
    """Fit the classifier to the train features, and return the classes that it predicts for the test features."""
    with decided(0):  # scikit-learn draws while it is imported
        from sklearn.linear_model import LogisticRegression

    counted = labels != -100
    seen = train[counted].double()
    center, scale = seen.mean(0), seen.std(0, correction=0)
    # A feature that is constant but for rounding has no information, and its rounding must not be magnified.
    scale = torch.where(scale > 1e-9 * (1 + center.abs()), scale, torch.inf)
    classifier = LogisticRegression(C=1 / penalty, max_iter=5000)
    classifier.fit(((seen - center) / scale).numpy(), labels[counted].numpy())
    answers: np.ndarray = classifier.predict(((test.double() - center) / scale).numpy())
    return torch.from_numpy(answers)
