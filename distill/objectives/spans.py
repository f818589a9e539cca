"""Knowledge distillation between language models with different tokenizers, at positions that are paired by their text.

Both models have read the same text in different tokens. Where a position of the student and one of the teacher end at
the same character, their answers are compared over the tokens of one meaning,

    L = τ² mean over pairs KL(p_t^τ ‖ p_s^τ),    p^τ = softmax(z / τ), summed over tokens of one meaning.

Hinton, Vinyals, Dean 2015 (arXiv:1503.02531), section 2; other ways to pair tokens by text: Boizard et al. 2024
(arXiv:2402.12030), Minixhofer et al. 2025 (arXiv:2503.20083).
"""

from collections.abc import Mapping
from functools import partial
from math import inf
from typing import Any

from einops import rearrange
from torch import Tensor

from distill.data.missing import IGNORED
from distill.data.token_alignment import Spans, TokenAlignment, pooled_kd, span_kd
from distill.errors import DistillError, checked
from distill.losses import Divergence, forward_kl
from distill.losses.chunked import LazyLogits, mean_in_chunks
from distill.models.inputs import mask_of
from distill.models.loss_masks import answer_labels, checked_tokens
from distill.objectives.answers import lazy_pair
from distill.objectives.objective import About, Objective
from distill.objectives.response import is_by_position
from distill.objectives.step import Step, zero_of
from distill.objectives.term_weights import describe_function


@checked
class SpanKD(Objective):
    """Knowledge distillation between models of two tokenizers that read the same text. Term `span_kd`.

    The data are `alignment.rows(texts)`. With one tokenizer for both models it is `KD` over the tokens that are not
    special. Where the data has labels of the student's tokens, positions whose answer has the label −100 are left out;
    with `by="prefix"` the answer at a token has the label of the next one.

    Hinton, Vinyals, Dean 2015 (arXiv:1503.02531), section 2, at positions paired by text, as Boizard et al. 2024
    (arXiv:2402.12030) and Minixhofer et al. 2025 (arXiv:2503.20083) do in other ways.

    Args:
        alignment: that of the tokenizers of teacher and student.
        temperature: softens both answers.
        by: "prefix" for causal language models, "token" for masked ones: see `TokenAlignment.spans`.
        scale_t2: multiply by temperature².
        divergence: `forward_kl`, `reverse_kl`, `jensen_shannon` of `distill.losses`, or a function like them.
        tokens: `"labelled"` as above; `"all"` compares wherever positions are paired.
    """

    in_chunks = True
    about = About(
        ("span_kd",),
        "τ² KL(p_t ‖ p_s), p the softmax(z/τ) added up over tokens of one meaning, mean over positions paired by text",
        "Hinton et al. 2015, arXiv:1503.02531; tokens aligned by text as in Boizard et al. 2024, arXiv:2402.12030",
    )

    def __init__(
        self,
        alignment: TokenAlignment,
        temperature: float = 2.0,
        *,
        by: str = "prefix",
        scale_t2: bool = True,
        divergence: Divergence = forward_kl,
        tokens: str = "labelled",
    ) -> None:
        super().__init__()
        if not 0 < temperature < inf:
            raise DistillError(
                f"SpanKD(temperature={temperature}) softens nothing; use a temperature above 0, e.g. 2.0."
            )
        if by not in ("prefix", "token"):
            raise DistillError(f"SpanKD(by={by!r}) does not pair tokens; use by='prefix' or by='token'.")
        self.alignment, self.temperature, self.by = alignment, temperature, by
        self.scale_t2, self.divergence = scale_t2, divergence
        self.tokens = checked_tokens(tokens, "SpanKD")

    def counts(self, batch: Mapping[str, Tensor]) -> Mapping[str, int]:
        """Return the number of paired positions that count."""
        return {"spans": len(self._counting(batch, self.alignment.found(batch, self.by)).rows)}

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the term `span_kd`."""
        both = lazy_pair(step) if is_by_position(self.divergence) else None
        student, teacher = both or (step.student.logits, step.taught.logits)
        for side, logits in (("student", student), ("teacher", teacher)):
            if logits.ndim != 3:
                raise DistillError(
                    f"SpanKD compares answers of language models after each token and the {side} gives logits of shape "
                    f"{list(logits.shape)}; for classifiers use KD()."
                )
        if step.moment.shares.get("spans") == 0:  # other parts of this step have pairs
            return {"span_kd": zero_of(student)}
        spans = self._counting(step.batch, self.alignment.spans(step.batch, self.by))
        if not len(spans.rows):
            return {"span_kd": zero_of(student)}
        settings: dict[str, Any] = {
            "temperature": self.temperature,
            "scale_t2": self.scale_t2,
            "divergence": self.divergence,
        }
        shared = self.alignment.shared
        if isinstance(student, LazyLogits):
            loss = partial(pooled_kd, shared=shared, **settings)
            own, taught = student.mapped(lambda each: each[spans.rows, spans.student]), _taken(teacher, spans)
            return {"span_kd": step.mean(mean_in_chunks(loss, own, taught), "spans")}
        assert isinstance(teacher, Tensor)
        return {"span_kd": step.mean(span_kd(student, teacher, spans, shared, **settings), "spans")}

    def extra_repr(self) -> str:
        """Return the settings for printing."""
        settings = f"temperature={self.temperature}, by={self.by!r}, scale_t2={self.scale_t2}"
        shown = ", tokens='all'" if self.tokens == "all" else ""
        return f"{settings}, divergence={describe_function(self.divergence)}{shown}"

    def _counting(self, batch: Mapping[str, Tensor], spans: Spans) -> Spans:
        """Return the pairs of positions whose answer counts."""
        labels = batch.get("labels")
        if self.tokens == "all" or labels is None or labels.shape != batch["ends"].shape:
            return spans
        found = answer_labels(batch, "next" if self.by == "prefix" else "here", mask_of(batch))
        assert found is not None
        kept = (found != IGNORED)[spans.rows, spans.student]
        return Spans(*(each[kept] for each in spans))


def _taken(logits: Tensor | LazyLogits, spans: Spans) -> LazyLogits:
    """Return the teacher's logits at the paired positions, `[pairs, classes]`, to be made or taken in parts."""
    if isinstance(logits, LazyLogits):
        return logits.mapped(lambda each: each[spans.rows, spans.teacher])
    flat = rearrange(logits, "batch token classes -> (batch token) classes")
    numbers = (spans.rows * logits.shape[1] + spans.teacher)[:, None]
    return LazyLogits((numbers,), lambda rows, _: flat[rows[0][:, 0]], {}, logits.shape[-1])
