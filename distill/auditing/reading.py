"""How the answers of two models are read: what they are, which of them count, and how far apart two of them are.

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

from distill.data.missing import IGNORED
from distill.data.rows import Rows
from distill.errors import DistillError
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
from distill.models.loss_masks import LabelPlace, answer_labels, answers_by_decoder, label_place
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
        found = [self._divergence(a, b) for a, b in pieces(one, other)]
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


def pieces(*answers: Float[Tensor, "n c"]) -> Iterator[tuple[Tensor, ...]]:
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
