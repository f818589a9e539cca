"""How specialists are trained: classes that the generalist confuses, rows rich in these, and a dustbin for all others.

The sets of classes are clusters of the columns of the covariance matrix of the generalist's answers. Each specialist
learns from rows of which a share, one half in the paper, is of its classes; as the others are then undersampled by a
factor, its logarithm is added to the logit of the dustbin afterwards,

    shift = log(rows of other classes / rows drawn of them).

Hinton, Vinyals, Dean 2015 (arXiv:1503.02531), sections 5.2 and 5.3.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import log
from typing import Any, Literal

import torch
from jaxtyping import Float, Float64, Int
from rich.console import Console
from torch import Tensor, nn

from distill.causal.values import call_or_explain
from distill.data.rows import Rows, batches
from distill.data.seeds import decided
from distill.data.sources.lazy_columns import in_memory
from distill.errors import DistillError
from distill.fit import fit
from distill.models.finite import check_answers
from distill.models.inputs import evaluating
from distill.models.outputs import answered
from distill.models.trials import answer_of
from distill.objectives import Labels
from distill.training.schedule import Schedule
from interventions import logits_of, rule_of, shown

Clustering = Literal["kmeans", "online"]
CLUSTERINGS = ("kmeans", "online")
Network = Callable[[nn.Module, tuple[int, ...]], nn.Module]
"""From the generalist and the classes of a specialist to its network, which has one output more than classes."""


class Specialist(nn.Module):
    """A network for some classes, whose last output is the dustbin for all others.

    For a network over all classes the dustbin is log Σ exp of the other logits, the logit of their summed probability.

    Args:
        module: the network.
        classes: the classes of the specialist.
        count: the number of all classes.
        answers: the rule that takes the answer from its output, as for `fit`.

    Attributes:
        shift: added to the logit of the dustbin; 0 until it is corrected for the sampling of the data.

    >>> bird = Specialist(nn.Identity(), (2, 0), 3)
    >>> bird(torch.tensor([[1.0, 2.0, 3.0]])).tolist()
    [[3.0, 1.0, 2.0]]
    """

    shift: Tensor

    def __init__(self, module: nn.Module, classes: Sequence[int], count: int, answers: Any = None) -> None:
        super().__init__()
        self.module, self.classes, self.count, self.answers = module, tuple(classes), count, answers
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, *inputs: Any, **columns: Any) -> Float[Tensor, "batch outputs"]:
        """Return the logits of its classes, in their order, and of the dustbin."""
        with answered([self], [self.answers]):
            logits = logits_of(self.module(*inputs, **columns), rule_of(self.module))
        if logits.shape[-1] == self.count:
            others = [each for each in range(self.count) if each not in self.classes]
            logits = torch.cat([logits[..., self.classes], logits[..., others].logsumexp(-1, keepdim=True)], -1)
        if logits.shape[-1] != len(self.classes) + 1:
            raise DistillError(
                f"the network of a specialist for {len(self.classes)} classes has {logits.shape[-1]} outputs; it needs "
                f"{len(self.classes) + 1}, its classes and the dustbin, or {self.count}, all classes."
            )
        return torch.cat([logits[..., :-1], logits[..., -1:] + self.shift.to(logits.dtype)], -1)

    @property
    def combines(self) -> tuple[nn.Module, ...]:
        """The network."""
        return (self.module,)

    def extra_repr(self) -> str:
        """Return the settings for printing."""
        return f"classes={list(self.classes)}, shift={float(self.shift):.4g}"


def confusable_classes(
    probabilities: Float[Tensor, "rows classes"],
    n: Any,
    *,
    size: Any = None,
    clustering: str = "kmeans",
    seed: int = 0,
) -> tuple[tuple[int, ...], ...]:
    """Return sets of classes that a network confuses with each other: clusters of the covariance of its answers.

    They are found by k-means on the columns of the covariance matrix, `[classes, classes]`, of the probabilities; no
    labels are needed.

    Hinton, Vinyals, Dean 2015 (arXiv:1503.02531), section 5.3.

    Args:
        probabilities: the answers of the network to some rows.
        n: the number of sets.
        size: the number of classes of each set, those nearest to the centre of its cluster, so that sets may overlap
            and leave classes out. None takes the clusters, so that each class is in one set.
        clustering: "kmeans", or "online", the variant in small batches (`sklearn`'s MiniBatchKMeans), as in the paper.
        seed: decides the first centres.

    Raises:
        DistillError: numbers that do not fit, or fewer clusters than requested.

    >>> torn = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]])
    >>> sorted(confusable_classes(torn, 2))
    [(0, 1), (2, 3)]
    """
    count = probabilities.shape[-1]
    if clustering not in CLUSTERINGS:
        raise DistillError(f"clustering={clustering!r} does not exist; use 'kmeans', or 'online' as in the paper.")
    if not _is_count(n, count) or not (size is None or _is_count(size, count - 1)):
        raise DistillError(
            f"n={n!r} specialists of size={size!r} cannot be made of {count} classes; use n from 1 to {count}, and "
            f"size from 1 to {count - 1}, or None."
        )
    if len(probabilities) < 2:
        raise DistillError(f"{len(probabilities)} row has no covariance; give the answers to two rows at least.")
    columns = torch.cov(probabilities.double().cpu().T).reshape(count, count).T
    centres, labels = _clusters(columns, n, clustering, seed)
    if len(set(labels)) < n:
        raise DistillError(
            f"the confusions of the generalist fall into {len(set(labels))} groups and n={n} were requested; use "
            f"n={len(set(labels))}."
        )
    if size is None:
        return tuple(tuple(each for each in range(count) if labels[each] == number) for number in range(n))
    nearest = torch.cdist(centres, columns).argsort(dim=1, stable=True)[:, :size]
    return tuple(tuple(sorted(row)) for row in nearest.tolist())


def _is_count(number: object, most: int) -> bool:
    """Return whether a value is an integer from 1 to `most`."""
    return isinstance(number, int) and not isinstance(number, bool) and 1 <= number <= most


def _clusters(columns: Float64[Tensor, "n d"], n: int, clustering: str, seed: int) -> tuple[Tensor, list[int]]:
    """Return the centres of clusters, and the number of the cluster of each column."""
    with decided(0):  # scikit-learn draws while it is imported
        from sklearn.cluster import KMeans, MiniBatchKMeans

    kind = KMeans if clustering == "kmeans" else MiniBatchKMeans
    scale = columns.abs().max().clamp_min(torch.finfo(columns.dtype).tiny)  # its tolerances are not relative
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fewer different columns than n, for which an error is raised
        found = kind(n, n_init=10, random_state=seed % 2**32).fit((columns / scale).numpy())
    return torch.from_numpy(found.cluster_centers_).double() * scale, found.labels_.tolist()


def enriched(
    labels: Int[Tensor, " rows"], classes: Sequence[int], *, share: float = 0.5, seed: int = 0
) -> tuple[Int[Tensor, " chosen"], float]:
    """Return rows rich in some classes, and the correction that this requires of the logit of all others.

    They are all rows of the classes, and as many others, drawn at random, as make those of the classes the given share.
    A specialist trained on them underestimates the dustbin by the factor by which its classes are oversampled; the
    logarithm of that factor, log(rest / drawn of the rest), corrects the logit of the dustbin.

    Hinton, Vinyals, Dean 2015 (arXiv:1503.02531), section 5.2, where the share is one half.

    Raises:
        DistillError: the share is not between 0 and 1, or there is no row of the classes or none of the rest.

    >>> rows, shift = enriched(torch.tensor([0, 0, 1, 1, 1, 1, 1, 1]), [0])
    >>> len(rows), shift == log(6 / 2)
    (4, True)
    """
    if not 0 < share < 1:
        raise DistillError(f"share={share} of the rows cannot be those of a specialist; use above 0 and below 1.")
    inside = torch.isin(labels, torch.tensor(list(classes)))
    special, rest = inside.nonzero()[:, 0], (~inside).nonzero()[:, 0]
    if not len(special) or not len(rest):
        relation = "is of" if not len(special) else "is of any class but"
        raise DistillError(
            f"none of the {len(labels)} rows {relation} {list(classes)}, so a specialist for them learns nothing; use "
            "another n or size, or more data."
        )
    count = max(1, round(len(special) * (1 - share) / share))
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))
    drawn = rest[torch.cat([order] * (count // len(rest)) + [order[: count % len(rest)]])]
    return torch.cat([special, drawn]), log(len(rest) / count)


def specialists_of(
    generalist: nn.Module,
    rows: Rows,
    sets: Sequence[tuple[int, ...]],
    count: int,
    schedule: Schedule,
    *,
    share: float = 0.5,
    network: Network | None = None,
    console: Console | None = None,
    answers: Any = None,
) -> dict[nn.Module, tuple[int, ...]]:
    """Train a specialist for each set of classes and return {specialist: its classes}.

    Args:
        sets: sets of the `count` classes of the generalist.
        schedule: the schedule of the first specialist; the seed of each one after it is one higher.

    The other arguments are those of `Specialists.train`.
    """
    if any(len(each) == count for each in sets):
        raise DistillError(
            f"one specialist for all {count} classes has nothing for its dustbin; use n=2 or more, or a size below "
            f"{count}."
        )
    labels = _labels(rows, count)
    plans = [enriched(labels, each, share=share, seed=schedule.seed + number) for number, each in enumerate(sets)]
    found: dict[nn.Module, tuple[int, ...]] = {}
    for number, (classes, (chosen, shift)) in enumerate(zip(sets, plans, strict=True)):
        if network is None:
            specialist = Specialist(copy.deepcopy(generalist), classes, count, answers)
        else:
            made = call_or_explain(
                "network", "give network=lambda generalist, classes: …", network, generalist, classes
            )
            if not isinstance(made, nn.Module):
                raise DistillError(f"network made {shown(made)}, which is no network; return a torch model.")
            specialist = Specialist(made, classes, count)
        fit(
            None,
            specialist,
            data=_relabel(rows.take(chosen), labels[chosen], classes),
            objective=Labels(answers="classes"),
            schedule=replace(schedule, seed=schedule.seed + number),
            console=console,
            title=f"specialist {number + 1} of {len(sets)}, for {', '.join(map(str, classes))}",
        )
        specialist.shift.fill_(shift)
        found[specialist.eval()] = classes
    return found


def predictions(model: nn.Module, rows: Rows, batch_size: int = 128) -> Float64[Tensor, "rows classes"]:
    """Return the probabilities of a classifier in eval mode for each row.

    Raises:
        DistillError: the model gives something else than one answer an example.
    """
    found = []
    with evaluating(model), torch.no_grad():
        for chosen in batches(len(rows), batch_size):
            logits = answer_of("the generalist", model, rows.batch(chosen))
            assert logits is not None
            if logits.ndim != 2 or logits.shape[-1] < 2:
                raise DistillError(
                    f"specialists are for classes, and the generalist gives {list(logits.shape)} for {len(chosen)} "
                    "examples; give a classifier, [batch, classes]."
                )
            check_answers(logits, "what the generalist confuses")
            found.append(logits.double().softmax(-1).cpu())
    return torch.cat(found)


def _labels(rows: Rows, count: int) -> Int[Tensor, " rows"]:
    """Return the label of each row, or raise DistillError if it is not one of the classes of the generalist."""
    labels = rows.table.get("labels")
    labels = None if labels is None else in_memory(labels)
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
        what = "no column labels" if labels is None else "labels that are no class for each example"
        raise DistillError(
            f"specialists learn from labels, and the data has {what} ({', '.join(rows.columns)}); add one class a row: "
            "data={'inputs': x, 'labels': y}."
        )
    if int(labels.min()) < 0 or int(labels.max()) >= count:
        raise DistillError(
            f"the labels go from {int(labels.min())} to {int(labels.max())} and the generalist has {count} classes, 0 "
            f"to {count - 1}; leave other rows out."
        )
    return labels.cpu()


def _relabel(rows: Rows, labels: Int[Tensor, " rows"], classes: Sequence[int]) -> Rows:
    """Return the rows with the labels that a specialist learns: the index of the class in its set, or the dustbin."""
    own = torch.full_like(labels, len(classes))
    for place, each in enumerate(classes):
        own[labels == each] = place
    return replace(rows, table={**rows.table, "labels": own}, classes=None)
