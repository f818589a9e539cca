"""The answers of an original and of a compressed model to the same rows, one by one.

An answer is a distribution over classes (one for each row or, of token models, for each token), a real value, or an
embedding. The divergence of two answers is

    classes      KL(original ‖ compressed) = Σ_c p_c (log p_c − log q_c)   [nats]
    values       Σ_c |y_c − z_c| / C                                       [unit of the values]
    embeddings   1 − cosine similarity
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from distill.auditing.layers import Layers
from distill.data.rows import Rows, batches
from distill.errors import DistillError
from distill.models.finite import check_answers
from distill.models.inputs import (
    answer_mask,
    device_of,
    evaluating,
    following,
    innermost,
    inputs_of,
    real_tokens,
    students,
    to_device,
    vocabulary_of,
)
from distill.models.loss_masks import IGNORED, LabelPlace, answer_labels, answers_by_decoder, label_place
from distill.models.trials import check_rows, check_values, tried
from interventions import Run, run

Kind = Literal["classes", "values", "embeddings"]
ORIGINAL, COMPRESSED = "the original", "the compressed model"
LARGEST = 2**22
"""The most logits that are widened to float64 at once."""
BESIDE = ("mask", "position_ids", "token_type_ids")
"""How the names of columns end that one of two alike models may do without."""
WHOLE = ("sentence_embedding", "text_embeds", "image_embeds")
"""Fields of outputs that hold an embedding of each row."""


@dataclass(frozen=True)
class Reading:
    """The kind of answers that two models give, and a reader of them.

    Attributes:
        kind: "classes", "values" or "embeddings".
        at_tokens: whether each token has an answer.
        predicts: whether the answers are of the vocabulary, so that they have a perplexity.
        place: the place of the label of the answer at a token.
        chosen: whether the user said which part of the output is the answer.
    """

    kind: Kind
    at_tokens: bool = False
    predicts: bool = False
    place: LabelPlace = "none"
    chosen: bool = False

    def of(self, ran: Run, batch: Mapping[str, Tensor]) -> Float[Tensor, "batch ... classes"]:
        """Return the answers of a run: logits, values or embeddings."""
        if self.kind != "embeddings" or self.chosen:
            return ran.logits.detach()
        return _embedding(ran.output, batch).detach()

    def counted(self, model: nn.Module, batch: Mapping[str, Tensor], answers: Tensor) -> Bool[Tensor, "batch ..."]:
        """Return which answers count: those of labelled tokens, without labels of real tokens; of rows all."""
        every = torch.ones(answers.shape[:-1], dtype=torch.bool, device=answers.device)
        if not self.at_tokens:
            return every
        labels = answer_labels(batch, self.place, answer_mask(model, batch))
        if labels is not None:
            return labels != IGNORED
        column = "decoder_attention_mask" if answers_by_decoder(model, batch) else "attention_mask"
        mask = batch.get(column)
        if mask is None or mask.shape != every.shape:
            return every
        rows, width = every.shape
        return real_tokens(batch, rows, width, answers.device, column=column)

    def labels(self, model: nn.Module, batch: Mapping[str, Tensor], answers: Tensor) -> Int[Tensor, "batch ..."] | None:
        """Return the class that each answer should be, −100 where there is none; None without any labels."""
        if self.kind != "classes":
            return None
        labels = batch.get("labels")
        if self.at_tokens:
            found = answer_labels(batch, self.place, answer_mask(model, batch))
            return found if found is not None or not self.predicts else _next_tokens(model, batch, answers)
        whole = labels is not None and not labels.is_floating_point() and labels.shape == answers.shape[:-1]
        return labels.long() if whole and labels is not None else None

    def divergence(self, one: Float[Tensor, "n c"], other: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
        """Return how far each answer is from the original's, 0 where they are equal."""
        found = [self._divergence(a, b) for a, b in _pieces(one, other)]
        return torch.cat(found) if found else one.new_zeros(0, dtype=torch.float64)

    def _divergence(self, one: Tensor, other: Tensor) -> Tensor:
        if self.kind == "values":
            return reduce((one - other).abs(), "n c -> n", "mean")
        if self.kind == "embeddings":
            same = (one == other).all(-1)
            return (1 - cosine_similarity(one, other, dim=-1)).clamp(min=0).masked_fill(same, 0.0)
        p, q = one.log_softmax(-1), other.log_softmax(-1)
        terms = torch.where(p.exp() > 0, p.exp() * (p - q), torch.zeros_like(p))
        return reduce(terms, "n c -> n", "sum").clamp(min=0)

    def changed(self, one: Float[Tensor, "n c"], other: Float[Tensor, "n c"]) -> Bool[Tensor, " n"]:
        """Return which answers are of another class."""
        if self.kind != "classes":
            return torch.zeros(len(one), dtype=torch.bool, device=one.device)
        return one.argmax(-1) != other.argmax(-1)


@dataclass(frozen=True, eq=False)
class Models:
    """The two models of an audit, and how they are compared.

    Attributes:
        original, compressed: the models.
        reading: what their answers are.
        batch_size: rows of a forward.
        layers: which blocks stand for each other; none for models without blocks.
    """

    original: nn.Module
    compressed: nn.Module
    reading: Reading
    batch_size: int
    layers: tuple[Layers, ...] = ()

    def columns(self, rows: Rows, chosen: Tensor) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Return the columns of some rows, on the device of each model."""
        batch = rows.batch(chosen)
        here, there = (students(to_device(batch, device_of(model))) for model in (self.original, self.compressed))
        return here, there


@dataclass(frozen=True, eq=False)
class Compared:
    """The answers of both models that count, in the order of the rows.

    Attributes:
        reading: what the answers are.
        rows: the number of rows.
        row: the row of each answer.
        divergence: of each, as `Reading.divergence`.
        gap: the largest absolute difference of the two answers' logits, values or entries.
        one, other: the classes that the original and the compressed model answer; 0 for other kinds.
        sure, other_sure: the probabilities of those classes.
        label: the class that the answer should be, −100 where it is not known.
        loss, other_loss: the cross-entropy of each under that label [nats]; NaN without one.
        vectors: the embeddings of both, `[2, rows, dims]`; None for other kinds.
        clusters: what the rows share, `[rows, memberships]`, as `Rows.clusters`; None where that is nothing.
    """

    reading: Reading
    rows: int
    row: Int[Tensor, " n"]
    divergence: Float[Tensor, " n"]
    gap: Float[Tensor, " n"]
    one: Int[Tensor, " n"]
    other: Int[Tensor, " n"]
    sure: Float[Tensor, " n"]
    other_sure: Float[Tensor, " n"]
    label: Int[Tensor, " n"]
    loss: Float[Tensor, " n"]
    other_loss: Float[Tensor, " n"]
    vectors: Float[Tensor, "2 rows dims"] | None = None
    clusters: Int[Tensor, "rows memberships"] | None = None

    @property
    def differs(self) -> Bool[Tensor, " n"]:
        """True for answers of another class."""
        return self.one != self.other

    @property
    def labelled(self) -> Bool[Tensor, " n"]:
        """True for answers that have a label."""
        return self.label != IGNORED


def reading_of(original: nn.Module, compressed: nn.Module, rows: Rows, *, chosen: bool) -> Reading:
    """Return what the answers of two models to the first rows are.

    Args:
        original, compressed: the models.
        rows: the data.
        chosen: whether the user said which part of the output is the answer.

    Raises:
        DistillError: a model that does not run on the rows, or answers of different kinds or classes.
    """
    few = list(range(min(2, len(rows))))
    kinds, shapes, batch = [], [], rows.batch(few)
    _check_inputs(original, compressed, students(batch))
    for name, model in ((ORIGINAL, original), (COMPRESSED, compressed)):
        own = students(to_device(batch, device_of(model)))
        ran = ran_on(name, model, own)
        kinds.append(_kind_of(name, model, ran, chosen=chosen))
        answers = Reading(kinds[-1], chosen=chosen).of(ran, own)
        check_values(name, answers)
        check_rows(name, answers, len(few))
        shapes.append(tuple(answers.shape))
    _check_alike(kinds, shapes)
    if len(shapes[0]) > 3 or (kinds[0] == "embeddings" and len(shapes[0]) > 2):
        raise DistillError(
            f"{ORIGINAL} answers {list(shapes[0])}, and an audit is of [rows, classes], [rows, token, classes] or "
            "[rows, dims] of embeddings; choose a part: answers=lambda output: output.flatten(1)."
        )
    if kinds[0] != "classes" or len(shapes[0]) == 2:
        return Reading(kinds[0], at_tokens=len(shapes[0]) == 3, chosen=chosen)
    logits = torch.empty(shapes[0], device="meta")
    predicts = _predicts(original, batch, logits)
    place = label_place(original, logits, batch, rows.table)
    return Reading("classes", True, predicts, place, chosen)


def compare(models: Models, rows: Rows) -> Compared:
    """Return the answers of both models to all rows."""
    parts = [_answers(models, rows, chosen) for chosen in batches(len(rows), models.batch_size)]
    vectors = None
    if models.reading.kind == "embeddings":
        vectors = torch.cat([each.pop("vectors") for each in parts], 1)
    found = {name: torch.cat([each[name] for each in parts]) for name in parts[0]}
    return Compared(models.reading, len(rows), **found, vectors=vectors, clusters=rows.clusters)


def ran_on(name: str, model: nn.Module, batch: Mapping[str, Tensor]) -> Run:
    """Return the run of a model on a batch, in eval mode and without gradients.

    Raises:
        DistillError: it does not run on these columns.
    """
    with evaluating(model), torch.no_grad():
        with tried(name):
            given = inputs_of(model, batch)
        with tried(name, model, given):
            return run(model, given, resumable=False)


def _answers(models: Models, rows: Rows, chosen: Tensor) -> dict[str, Tensor]:
    """Return the figures of the answers to a batch, by the names of the attributes of `Compared`."""
    reading, (read, again) = models.reading, models.columns(rows, chosen)
    here = reading.of(ran_on(ORIGINAL, models.original, read), read)
    there = reading.of(ran_on(COMPRESSED, models.compressed, again), again).to(here.device)
    counted, labels = _kept(reading, models.original, read, here)
    one, other = here[counted], there[counted]
    for name, answers in ((ORIGINAL, one), (COMPRESSED, other)):
        check_answers(answers, f"the audit of {name}")
    numbers = chosen.to(one.device).view(-1, *[1] * (counted.ndim - 1)).expand_as(counted)
    found = {
        "row": numbers[counted],
        "divergence": reading.divergence(one, other),
        "gap": (one - other).abs().amax(-1).double(),
        **_classes(reading, one, other, labels),
    }
    if reading.kind == "embeddings":
        found["vectors"] = torch.stack([one, other]).double()
    return {name: each.cpu() for name, each in found.items()}


def _kept(
    reading: Reading, model: nn.Module, batch: Mapping[str, Tensor], answers: Tensor
) -> tuple[Bool[Tensor, "batch ..."], Int[Tensor, " n"]]:
    """Return which answers count, and the labels of those that do, −100 where there is none."""
    counted, labels = reading.counted(model, batch, answers), reading.labels(model, batch, answers)
    if labels is None:
        labels = torch.full(counted.shape, IGNORED, device=answers.device)
    return counted, labels[counted]


def _classes(
    reading: Reading, one: Float[Tensor, "n c"], other: Float[Tensor, "n c"], labels: Int[Tensor, " n"]
) -> dict[str, Tensor]:
    """Return classes, confidences, labels and losses of the answers; zeros for answers that are no classes."""
    if reading.kind != "classes":
        zero = torch.zeros(len(one), dtype=torch.float64)
        none = {"one": zero.long(), "other": zero.long(), "sure": zero, "other_sure": zero}
        return {**none, "label": torch.full_like(zero, IGNORED).long(), "loss": zero + torch.nan,
                "other_loss": zero + torch.nan}  # fmt: skip
    names = (("one", "sure", "loss"), ("other", "other_sure", "other_loss"))
    found: dict[str, Tensor] = {"label": labels}
    known = (labels >= 0) & (labels < one.shape[-1])
    for logits, (chosen, sure, loss) in zip((one, other), names, strict=True):
        parts: list[tuple[Tensor, ...]] = []
        start = 0
        for (piece,) in _pieces(logits):
            log_p, mine = piece.log_softmax(-1), labels[start : start + len(piece)]
            start += len(piece)
            most, index = piece.max(-1)
            right = rearrange(mine.clamp(min=0, max=piece.shape[-1] - 1), "n -> n 1")
            parts.append((index, log_p.amax(-1).exp(), -log_p.gather(-1, right)[:, 0]))
        index, most, surprise = (torch.cat(each) for each in zip(*parts, strict=True))
        found |= {chosen: index, sure: most, loss: surprise.masked_fill(~known, torch.nan)}
    return found


def _pieces(*answers: Float[Tensor, "n c"]) -> Iterator[tuple[Tensor, ...]]:
    """Yield a few answers at a time, in float64."""
    size = max(1, LARGEST // max(1, answers[0].shape[-1]))
    for parts in zip(*(each.split(size) for each in answers), strict=True):
        yield tuple(each.double() for each in parts)


def _kind_of(name: str, model: nn.Module, ran: Run, *, chosen: bool) -> Kind:
    """Return what a model answers."""
    output = ran.output
    if isinstance(output, Mapping) and not any("logits" in str(field) for field in output):
        return "embeddings"
    with tried(name, model, ran.inputs):
        logits = ran.logits
    problem = getattr(getattr(innermost(model), "config", None), "problem_type", None)
    return "values" if logits.shape[-1] == 1 or problem in ("regression", "multi_label_classification") else "classes"


def _check_inputs(original: nn.Module, compressed: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Raise DistillError where two models read other columns, apart from masks and numbers of positions."""
    read = []
    for name, model in ((ORIGINAL, original), (COMPRESSED, compressed)):
        with tried(name):
            given = inputs_of(model, batch)
        read.append({each for each in given if isinstance(each, str) and not each.endswith(BESIDE)})
    if read[0] != read[1]:
        one, other = (", ".join(sorted(each)) or "none of them" for each in read)
        raise DistillError(
            f"of the columns {', '.join(batch)}, {ORIGINAL} ({type(original).__name__}) reads {one} and {COMPRESSED} "
            f"({type(compressed).__name__}) {other}; audit a model that reads the same inputs."
        )


def _check_alike(kinds: list[Kind], shapes: list[tuple[int, ...]]) -> None:
    """Raise DistillError for two models whose answers cannot be compared one by one."""
    if kinds[0] != kinds[1]:
        raise DistillError(
            f"{ORIGINAL} answers with {kinds[0]} and {COMPRESSED} with {kinds[1]}, which cannot be compared; load both "
            "as the same kind of model, or choose alike parts: answers=('logits', 0)."
        )
    if len(shapes[0]) != len(shapes[1]) or shapes[0][-1] != shapes[1][-1]:
        what = "dims" if kinds[0] == "embeddings" else "classes"
        raise DistillError(
            f"{ORIGINAL} answers {list(shapes[0])} and {COMPRESSED} {list(shapes[1])} to the same rows: "
            f"{shapes[0][-1]} {what} against {shapes[1][-1]}; audit a model that was made from this original."
        )
    if shapes[0] != shapes[1]:
        raise DistillError(
            f"{ORIGINAL} answers at {shapes[0][1]} tokens and {COMPRESSED} at {shapes[1][1]} of the same rows; give "
            "both the same tokens, and no virtual ones."
        )


def _predicts(model: nn.Module, batch: Mapping[str, Tensor], logits: Tensor) -> bool:
    """Return whether answers at tokens are of the next token: a causal language model or a decoder that writes."""
    if answers_by_decoder(model, batch):
        return True
    ids = batch.get("input_ids")
    if ids is None or logits.shape[:2] != ids.shape or logits.shape[-1] != vocabulary_of(model):
        return False
    return label_place(model, logits, {**batch, "labels": ids}) == "next"


def _next_tokens(model: nn.Module, batch: Mapping[str, Tensor], answers: Tensor) -> Int[Tensor, "batch token"] | None:
    """Return the token after each, −100 where there is none, for a language model whose rows have no labels."""
    read: Mapping[str, Tensor] = {name: x for name, x in batch.items() if name != "labels"}
    if answers_by_decoder(model, batch):
        names = {"decoder_input_ids": "input_ids", "decoder_attention_mask": "attention_mask"}
        read = {names[name]: x for name, x in batch.items() if name in names}
    if "input_ids" not in read or read["input_ids"].shape != answers.shape[:2]:
        return None
    after = following(read)
    return torch.cat([after, torch.full_like(after[:, :1], IGNORED)], 1)


def _embedding(output: Any, batch: Mapping[str, Tensor]) -> Float[Tensor, "batch dims"]:
    """Return one vector for each row: that of the output, else the mean of its states over real tokens.

    Raises:
        DistillError: an output without states.
    """
    whole = next((output[name] for name in WHOLE if isinstance(output.get(name), Tensor)), None)
    if whole is not None:
        return whole
    states = output.get("last_hidden_state")
    if isinstance(states, Tensor) and states.ndim == 3:
        mask = batch.get("decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask")
        if mask is None or mask.shape != states.shape[:2]:
            return reduce(states, "batch token dims -> batch dims", "mean")
        weights = rearrange(mask.to(states), "batch token -> batch token 1")
        return (states * weights).sum(1) / weights.sum(1).clamp(min=1)
    pooled = output.get("pooler_output")
    if isinstance(pooled, Tensor):
        return pooled.flatten(1)
    raise DistillError(
        f"the output has {', '.join(map(str, output))} and neither logits nor an embedding; say which part is the "
        "answer: answers='pooler_output', or a function of the output."
    )
