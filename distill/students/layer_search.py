"""The search for the layers of a teacher that make the best student without training.

Each set of layers is a student, `from_layers(teacher, layers)`, whose answers on the data are compared with those of
the teacher, or with the labels. All sets of the requested number are tried where there are few; else layers are left
out one after the other, each time the one without which the loss is smallest, as in Song et al. 2024 (SLEB,
arXiv:2402.09025).
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from math import comb, isfinite
from typing import Any, Literal

import torch
from einops import reduce
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from distill.data.missing import IGNORED
from distill.data.rows import Rows, batches
from distill.errors import DistillError
from distill.models.inputs import answer_mask, device_of, evaluating, following, inputs_of, teachers, to_device
from distill.models.loss_masks import answer_labels, answers_by_decoder, label_place
from distill.models.outputs import answered, same_answers
from distill.models.trials import check_rows, tried
from distill.precision import widen
from distill.processes import gather_parts, own_part
from distill.students.from_layers import from_layers, stack_of
from distill.students.ranking import LayerSearch
from interventions import run

Criterion = Literal["kl", "loss"]
Layers = tuple[int, ...]
MOST_SETS = 100
"""The largest number of sets of layers that are all tried."""


def check_search(model: nn.Module, count: int, stack: str | None) -> int:
    """Return the number of layers to search in; raise DistillError for a number that leaves nothing to search for."""
    deep = len(stack_of(model, stack).blocks)
    if not 1 <= count < deep:
        raise DistillError(f"search={count} of {deep} layers leaves nothing to search for; choose 1 to {deep - 1}.")
    return deep


def search_layers(
    model: nn.Module,
    rows: Rows,
    count: int,
    *,
    stack: str | None = None,
    criterion: Criterion = "kl",
    batch_size: int = 32,
    answers: Any = None,
) -> LayerSearch:
    """Return the sets of layers that were tried, and the best of each number of layers; see `importance`.

    Raises:
        DistillError: no set of so many layers, or none that can be taken out of the model.
    """
    deep = check_search(model, count, stack)
    if criterion not in ("kl", "loss"):
        raise DistillError(f"criterion={criterion!r} does not exist; use 'kl' or 'loss'.")
    tried_sets: dict[Layers, float] = {}
    best: dict[int, Layers] = {}
    with answered((model,), answers):
        for sets in _levels(deep, count, best):
            found = _measured(model, rows, sets, stack=stack, criterion=criterion, batch_size=batch_size)
            tried_sets |= found
            best[len(sets[0])] = min(found, key=lambda layers: (found[layers], layers))
    return LayerSearch(stack, criterion, tried_sets, best)


def _levels(deep: int, count: int, best: Mapping[int, Layers]) -> Iterator[list[Layers]]:
    """Yield the sets of layers to try together: all, or those that lack one layer of the last best ones."""
    if comb(deep, count) <= MOST_SETS:
        yield list(combinations(range(deep), count))
        return
    left: Layers = tuple(range(deep))
    while len(left) > count:
        yield [tuple(each for each in left if each != layer) for layer in left]
        left = best[len(left) - 1]


def _measured(
    model: nn.Module, rows: Rows, sets: Iterable[Layers], *, stack: str | None, criterion: Criterion, batch_size: int
) -> dict[Layers, float]:
    """Return the criterion of each set of layers that can be taken out; the answers of the model are computed once."""
    students, refused = _students(model, sets, stack)
    places = own_part(torch.arange(len(rows)))

    def own() -> tuple[dict[Layers, float], int]:
        sums, answers = dict.fromkeys(students, 0.0), 0
        for few in batches(len(places), batch_size) if len(places) else ():
            batch = to_device(teachers(rows.batch(places[few])), device_of(model))
            wanted, counted = _wanted(model, batch, rows, criterion)
            answers += len(wanted)
            for layers, student in students.items():
                with same_answers(student, model):
                    sums[layers] += _loss(_logits(student, batch)[counted], wanted)
        return sums, answers

    if not students:
        raise refused or DistillError("no set of layers was given.")
    parts = gather_parts(own)
    total = sum(answers for _, answers in parts)
    if not total:
        raise DistillError("the search has no answer to compare, as every token is padding; give rows of real tokens.")
    found = {layers: sum(sums[layers] for sums, _ in parts) / total for layers in students}
    if not any(map(isfinite, found.values())):
        raise DistillError("no set of layers gives answers that are finite; look at the answers of the model itself.")
    return {layers: value if isfinite(value) else float("inf") for layers, value in found.items()}


def _students(
    model: nn.Module, sets: Iterable[Layers], stack: str | None
) -> tuple[dict[Layers, nn.Module], DistillError | None]:
    """Return a student on the weights of the model for each set that can be taken out, and the last error."""
    students, refused = dict[Layers, nn.Module](), None
    for layers in sets:
        try:
            students[layers] = from_layers(model, layers, stack=stack, copy=False)
        except DistillError as error:  # layers of several kinds that fit in one order only
            refused = error
    return students, refused


def _wanted(model: nn.Module, batch: Mapping[str, Tensor], rows: Rows, criterion: Criterion) -> tuple[Tensor, Tensor]:
    """Return what a student should answer, log-probabilities or classes, and which of its answers count."""
    logits = _logits(model, batch)
    if criterion == "kl":
        real = answer_mask(model, batch) if logits.ndim == 3 else None
        counted = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
        if real is not None and real.shape == counted.shape:
            counted = real.bool()
        return logits[counted].log_softmax(-1), counted
    labels = _labels(model, batch, logits, rows)
    counted = labels != IGNORED
    return labels[counted], counted


def _labels(model: nn.Module, batch: Mapping[str, Tensor], logits: Tensor, rows: Rows) -> Tensor:
    """Return the class that each answer should be, −100 where there is none; of unlabelled texts the next token.

    Raises:
        DistillError: the answers have no labels.
    """
    labels = batch.get("labels")
    if logits.ndim == 3:
        place = label_place(model, logits, batch, rows.table)
        found = answer_labels(batch, place, answer_mask(model, batch))
        if found is not None and not found.is_floating_point():
            return found
        ids = batch.get("input_ids")
        if labels is None and ids is not None and not answers_by_decoder(model, batch):
            after = following(batch)
            if ids.shape == logits.shape[:2] and label_place(model, logits, {**batch, "labels": ids}) == "next":
                return torch.cat([after, torch.full_like(after[:, :1], IGNORED)], 1)
    elif labels is not None and not labels.is_floating_point() and labels.shape == logits.shape[:-1]:
        return labels.long()
    raise DistillError(
        f"criterion='loss' needs labels of the answers {list(logits.shape)}, and the data have {', '.join(batch)}; "
        "compare with the answers of the model: criterion='kl'."
    )


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the answers of a model to a batch, in eval mode and without a graph."""
    with evaluating(model), torch.no_grad():
        given = inputs_of(model, batch)
        with tried("the model", model, given):
            logits = run(model, given, resumable=False).logits
    check_rows("the model", logits, len(next(iter(batch.values()))))
    return widen(logits)


def _loss(logits: Tensor, wanted: Tensor) -> float:
    """Return the sum of the KL divergence to log-probabilities, or of the cross-entropy with classes [nats]."""
    if not wanted.is_floating_point():
        return float(cross_entropy(logits, wanted, reduction="none").double().sum())
    terms = wanted.exp() * (wanted - logits.log_softmax(-1))
    return float(reduce(torch.where(wanted.isneginf(), 0.0, terms).double(), "answer label ->", "sum"))
