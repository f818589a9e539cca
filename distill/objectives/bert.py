"""The recipes of DistilBERT and TinyBERT, two ways to distill BERT into fewer layers.

DistilBERT, Sanh et al. 2019 (arXiv:1910.01108), section 3, on answers z, masked tokens and last hidden states h:

    L = 5 τ² KL(p_t^τ ‖ p_s^τ) + 2 CE(z_s, masked tokens) + 1 (1 − cos(h_s, h_t)),    τ = 2.

TinyBERT, Jiao et al. 2019 (arXiv:1909.10351), sections 3.1 and 3.2, on attention scores A before the softmax, hidden
states h of all layers, embedding outputs e, and learned linear maps W and W_e:

    stage 1: L = Σ_layers MSE(A_s, A_t) + MSE(W_e e_s, e_t) + Σ_layers MSE(W h_s, h_t)
    stage 2: L = −τ² Σ_k p_t^τ log p_s^τ.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from distill.errors import DistillError, checked, refuse_unless_positive
from distill.interchange.mapping import Entry, depth
from distill.losses import hint, soft_cross_entropy
from distill.losses.chunked import LazyLogits, mean_in_chunks
from distill.models.loss_masks import checked_tokens
from distill.objectives.answers import both_answers
from distill.objectives.features import Cosine
from distill.objectives.language import MaskedLM
from distill.objectives.objective import About, Objective
from distill.objectives.regressors import (
    Layers,
    format_layers,
    match_features,
    refuse_no_layers,
    regress,
    regressors_for,
)
from distill.objectives.response import KD
from distill.objectives.step import Reads, Step, average_loss, zero_of
from distill.precision import widen
from interventions import Location, on_host

EMBEDDING = Location(site="embedding")
MAPS = ("shared", "each")


@checked
class DistilBERT(Objective):
    """DistilBERT's loss, 5 KD + 2 MLM + 1 cosine. Terms `distilbert_kd`, `distilbert_mlm`, `distilbert_cosine`.

    The student starts from every other layer of the teacher: `from_layers(teacher, 6)`.

    Sanh et al. 2019 (arXiv:1910.01108), section 3; the weights are those of the published command.

    Args:
        tokenizer: masks the text anew in every step; None: the data is masked already and has `labels` (`MaskedLM`).
        temperature: τ of the answers.
        tokens: where answers and hidden states are compared: `"all"`, at every token that is not padding, as published,
            or `"labelled"`: in data that is masked already, only at the masked tokens.
    """

    about = About(
        ("distilbert_kd", "distilbert_mlm", "distilbert_cosine"),
        "5 KD(τ = 2) + 2 CE(masked tokens) + (1 − cos of the last hidden states)",
        "Sanh et al. 2019, arXiv:1910.01108",
    )

    def __init__(self, tokenizer: Any = None, *, temperature: float = 2.0, tokens: str = "all") -> None:
        super().__init__()
        masked = MaskedLM(tokenizer)
        tokens = checked_tokens(tokens, "DistilBERT")
        parts = {"kd": KD(temperature, tokens=tokens), "mlm": masked, "cosine": Cosine(tokens=tokens)}
        self.parts = nn.ModuleDict(parts)
        self.needs = masked.needs

    @property
    def weights(self) -> Mapping[str, float]:
        """The published weights: 5, 2 and 1."""
        return {"distilbert_kd": 5.0, "distilbert_mlm": 2.0, "distilbert_cosine": 1.0}

    def reads(self, mapping: Sequence[Entry]) -> Reads:
        """Return the last hidden states of both models."""
        cosine: Any = self.parts["cosine"]
        return cosine.reads(mapping)

    def extra_repr(self) -> str:
        """Return the settings for printing."""
        return f"{self.parts['kd']}, {self.parts['mlm']}"

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the three terms."""
        return {f"distilbert_{name}": part(step)[name] for name, part in self.parts.items()}


@checked
class TinyBERT(Objective):
    """TinyBERT's two stages. Terms `tinybert_attention`, `tinybert_hidden`; and `tinybert_prediction`.

    Stage 1, the transformer layers: squared error of the attention scores before the softmax, head by head, and of the
    hidden states behind a linear map, the embedding output included; summed over layers. Where the widths differ two
    maps are made and trained with the student: one that all layers share, and one for the embeddings. Student layer i
    learns from teacher layer (i + 1) · L_t / L_s − 1, counted from 0. Stage 2: cross-entropy under the teacher's
    softened answers.

    Scores are compared at pairs of a query that counts and a key that both models attend to, averaged over the pairs
    of each text. The published code sets masked scores to 0 and averages over padding too.

    Jiao et al. 2019 (arXiv:1909.10351), sections 3.1 and 3.2.

    Args:
        stage: 1, 2, or None for both at once.
        layers: teacher block → student block; None as above.
        temperature: τ of stage 2.
        lr: the learning rate of the linear maps; None is the schedule's.
        maps: `"shared"`: one linear map for all layers, as in the paper and its code; `"each"`: one a layer.
        tokens: `"labelled"` or `"all"`, as for `KD`; for attention scores it selects queries.
    """

    in_chunks = True
    about = About(
        ("tinybert_attention", "tinybert_hidden", "tinybert_prediction"),
        "Σ_layers MSE(scores_s, scores_t) + MSE(W_e e_s, e_t) + Σ_layers MSE(W h_s, h_t), one W; stage 2: τ² CE(p_t^τ, "
        "z_s/τ)",
        "Jiao et al. 2019, arXiv:1909.10351",
    )

    def __init__(
        self,
        stage: int | None = None,
        *,
        layers: Layers | None = None,
        temperature: float = 1.0,
        lr: float | None = None,
        maps: str = "shared",
        tokens: str = "labelled",
    ) -> None:
        super().__init__()
        if maps not in MAPS:
            raise DistillError(f"TinyBERT(maps={maps!r}) does not exist; use 'shared' (one for all layers) or 'each'.")
        if stage not in (None, 1, 2):
            raise DistillError(f"TinyBERT(stage={stage}) does not exist; use 1 (layers), 2 (answers) or None (both).")
        refuse_no_layers(layers, "TinyBERT")
        refuse_unless_positive("TinyBERT", temperature=temperature, lr=lr)
        self.stage, self.layers, self.temperature, self.lr = stage, layers, temperature, lr
        self.shares_map, self.tokens = maps == "shared", checked_tokens(tokens, "TinyBERT")
        self.maps = nn.ModuleDict()
        self._even: Layers = {}
        self._first: Location | None = None

    def reads(self, mapping: Sequence[Entry]) -> Reads:
        """Return the attention scores and hidden states of the compared layers, and the embedding outputs."""
        if self.stage == 2:
            return Reads()
        teacher, student = tuple(self._layers), tuple(self._layers.values())
        return Reads((*teacher, *map(_scores, teacher), EMBEDDING), (*student, *map(_scores, student), EMBEDDING))

    def prepare(self, step: Step, rows: int) -> None:
        """Find the layers where none were given, and make the linear maps."""
        if self.stage == 2:
            return
        if self.layers is None:
            teacher, student = depth(step.taught.model), depth(step.student.model)
            self._even = {Location((i + 1) * teacher // student - 1): Location(i) for i in range(student)}
        chosen = dict(self._hidden())
        if self.shares_map:
            self._first = self._first_mapped(step)
            chosen = {EMBEDDING: EMBEDDING, self._first: self._layers[self._first]}
        self.maps = regressors_for(step, chosen, "TinyBERT")

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the terms of the stage."""
        terms: dict[str, Tensor] = {}
        if self.stage != 2:
            terms["tinybert_attention"] = torch.stack(self._attention(step)).sum()
            losses = []
            for at, place in self._hidden():
                student, teacher = match_features(step.student, place, step.taught, at, "TinyBERT")
                mask = step.mask(student, place, self.tokens)
                shared = self.shares_map and at != EMBEDDING
                needed = not shared or student.shape[-1] != teacher.shape[-1]
                mapped = regress(self.maps, self._first or at if shared else at, student) if needed else student
                losses.append(average_loss(step, partial(hint, mask=mask), mapped, teacher, mask))
            terms["tinybert_hidden"] = torch.stack(losses).sum()
        if self.stage != 1:
            terms["tinybert_prediction"] = self._prediction(step)
        return terms

    def _prediction(self, step: Step) -> Tensor:
        """Return the cross-entropy under the teacher's softened answers."""
        student, teacher = both_answers(step)
        loss: Any = partial(soft_cross_entropy, temperature=self.temperature)
        if isinstance(student, LazyLogits) and student.shape == teacher.shape:
            mask = step.mask(student.rows[0], tokens=self.tokens)
            return average_loss(step, partial(mean_in_chunks, loss, mask=mask), student, teacher, mask)
        own, taught = step.student.logits, step.taught.logits
        mask = step.mask(own, tokens=self.tokens)
        return average_loss(step, partial(loss, mask=mask), own, taught, mask)

    def extra_repr(self) -> str:
        """Return the settings for printing."""
        settings = [f"stage={self.stage}", f"temperature={self.temperature}", f"lr={self.lr}"]
        settings += [] if self.shares_map else ["maps='each'"]
        settings += ["tokens='all'"] if self.tokens == "all" else []
        return ", ".join(settings + ([] if self.layers is None else [f"layers={format_layers(self.layers)}"]))

    @property
    def _layers(self) -> Layers:
        """The compared layers, given or spread evenly."""
        return self._even if self.layers is None else self.layers

    def _hidden(self) -> list[tuple[Location, Location]]:
        """Return the places of the compared hidden states in teacher and student, that of the embedding first."""
        return [(EMBEDDING, EMBEDDING), *self._layers.items()]

    def _first_mapped(self, step: Step) -> Location:
        """Return the teacher location under which the map of all layers is kept: the first where the widths differ."""
        found: dict[tuple[int, int], Location] = {}
        for above, below in self._layers.items():
            student, teacher = match_features(step.student, below, step.taught, above, "TinyBERT")
            if student.shape[-1] != teacher.shape[-1]:
                found.setdefault((student.shape[-1], teacher.shape[-1]), above)
        if len(found) > 1:
            (one, first), (other, second) = list(found.items())[:2]
            raise DistillError(
                f"TinyBERT() maps all layers by one matrix, and widths (student, teacher) differ: {one} at {first} and "
                f"{other} at {second}; use TinyBERT(maps='each')."
            )
        return next(iter(found.values()), next(iter(self._layers)))

    def _attention(self, step: Step) -> list[Tensor]:
        """Return the loss of the attention scores of each layer."""
        losses = []
        for above, below in self._layers.items():
            student, teacher = step.student.activations[_scores(below)], step.taught.activations[_scores(above)]
            if student.shape != teacher.shape:
                raise DistillError(
                    f"TinyBERT compares attention head by head, [batch, head, query, key]: {_scores(below)} of the "
                    f"student has {list(student.shape)}, {_scores(above)} of the teacher {list(teacher.shape)}; "
                    "give the student as many heads, or use AT(), which sums over the heads."
                )
            mask = step.mask(step.student.vectors(below), below, self.tokens)
            losses.append(step.mean(scores_error(student, teacher, mask), step.kind_of(mask)))
        return losses


def scores_error(
    student: Float[Tensor, "batch head query key"],
    teacher: Float[Tensor, "batch head query key"],
    mask: Tensor | None,
) -> Float[Tensor, ""]:
    """Return the squared error of attention scores where both attend, averaged over pairs, then over examples.

    An example without a query that counts is left out.
    """
    attended: Bool[Tensor, "batch head query key"] = _is_attended(student) & _is_attended(teacher)
    if mask is not None:
        attended = attended & mask.bool()[:, None, :, None]
    errors = widen(student) - widen(teacher)
    squared = errors.masked_fill(~attended, 0).square().flatten(1).sum(1)
    pairs = attended.flatten(1).sum(1)
    each = squared / pairs.clamp(min=1)
    if mask is None:
        return each.mean()
    rows = on_host(mask).bool().any(1).nonzero()[:, 0].to(each.device, non_blocking=True)
    return each[rows].mean() if len(rows) else zero_of(each)


def _is_attended(scores: Tensor) -> Tensor:
    """Return where attention scores are not the lowest number, which masks put at keys that are not attended to."""
    return scores > torch.finfo(scores.dtype).min / 4


def _scores(at: Location) -> Location:
    """Return the location of the attention scores of a layer."""
    return replace(at, site="attention_scores")
