"""Objectives on the answers of the models, independent of what they compute inside: KD, DKD and the labels of the data.

With logits z of student and teacher, softened distributions p^τ = softmax(z / τ), and labels y,

    KD = τ² KL(p_t^τ ‖ p_s^τ)                        Hinton, Vinyals, Dean 2015 (arXiv:1503.02531), section 2
    DKD = min(epoch / warmup, 1) (α TCKD + β NCKD)   Zhao et al. 2022 (arXiv:2203.08679), section 3
    Labels = CE(z_s, y)

KD may perturb the logits with noise: Sau, Balasubramanian 2016 (arXiv:1610.09650), section 3. TCKD and NCKD are in
`distill.losses.decoupled`.
"""

import warnings
from functools import partial
from math import floor, inf
from typing import Any

import torch
from torch import Tensor

from distill.errors import DistillError, checked, refuse_negative, refuse_unless_positive
from distill.losses import (
    Divergence,
    LogitNoise,
    binary_cross_entropy,
    cross_entropy,
    dkd,
    forward_kl,
    jensen_shannon,
    kd,
    mean_squared_error,
    multi_label_kd,
    reverse_kl,
    squared_error,
)
from distill.losses.chunked import LazyLogits, mean_in_chunks
from distill.losses.common import is_labelled, take_kept
from distill.models.class_labels import Answers
from distill.models.head import lazy_logits
from distill.models.inputs import TEACHERS, inputs_of
from distill.models.loss_masks import LABELS, TOKENS, answers_by_decoder, checked_tokens
from distill.objectives.answers import answers_of, both_answers, check_answers, decide_answers, lazy_pair
from distill.objectives.objective import About, Objective
from distill.objectives.step import Step, average_loss, zero_of
from distill.objectives.term_weights import describe_function
from interventions import on_host, run


@checked
class KD(Objective):
    """Knowledge distillation: divergence between the softened answers of teacher and student. Term `kd`.

    For classifiers with several labels an example it is the binary divergence of each label, averaged over labels; for
    real values it is the squared error.

    Hinton, Vinyals, Dean 2015 (arXiv:1503.02531), section 2; noise on logits: Sau, Balasubramanian 2016
    (arXiv:1610.09650), section 3.

    Args:
        temperature: softens both answers.
        reduction: `"batchmean"` (mean over examples or tokens) or `"mean"` (also ÷ classes, as DIITO-XXS and
            PKD).
        scale_t2: multiply by temperature².
        divergence: `forward_kl`, `reverse_kl`, `jensen_shannon` of `distill.losses`, or a function like them; or
            `squared_error`, between the logits themselves, for which temperature and reduction mean nothing.
        answers: what logits stand for: "classes", "labels" (several an example) or "values"; None decides it by the
            model and the data.
        teacher_noise, student_noise: perturb the logits of either in every step.
        tokens: for models that answer at every token: `"labelled"` compares answers with a label that is not −100 (the
            answer of a causal language model at t has the label at t + 1), `"all"` those at all tokens but padding.
            Without labels of tokens they are the same.
    """

    in_chunks = True
    about = About(
        ("kd",),
        "τ² KL(softmax(z_t/τ) ‖ softmax(z_s/τ)), mean over examples or labelled tokens",
        "Hinton et al. 2015, arXiv:1503.02531",
    )

    def __init__(
        self,
        temperature: float = 2.0,
        *,
        reduction: str = "batchmean",
        scale_t2: bool = True,
        divergence: Divergence = forward_kl,
        answers: Any = None,
        teacher_noise: LogitNoise | None = None,
        student_noise: LogitNoise | None = None,
        tokens: str = "labelled",
    ) -> None:
        super().__init__()
        if not 0 < temperature < inf:
            raise DistillError(
                f"KD(temperature={temperature}) softens nothing; use a temperature above 0, e.g. KD(2.0)."
            )
        if reduction not in ("batchmean", "mean"):
            raise DistillError(f"KD(reduction={reduction!r}) is no scalar; use 'batchmean' or 'mean'.")
        self.temperature, self.reduction, self.scale_t2, self.divergence = temperature, reduction, scale_t2, divergence
        self.answers = check_answers(answers, "KD")
        self._decided: Answers | None = None
        self.teacher_noise, self.student_noise = teacher_noise, student_noise
        self.tokens = checked_tokens(tokens, "KD")

    def prepare(self, step: Step, rows: int) -> None:
        """Decide what the logits stand for."""
        if step.student.logits.shape == step.taught.logits.shape:
            self._decided = decide_answers(step, self.answers, "KD()")

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the term `kd`."""
        both: Any = self._lazy(step) or (step.student.logits, step.taught.logits)
        student, teacher = both
        if student.shape != teacher.shape and student.ndim == 3 and TEACHERS + "input_ids" in step.batch:
            raise DistillError(
                f"KD() compares token by token, and the two models read other tokens: student {list(student.shape)}, "
                f"teacher {list(teacher.shape)}; use SpanKD(alignment), which compares where their texts agree."
            )
        _refuse_other_positions(step, student.shape, teacher.shape)
        if isinstance(student, LazyLogits):
            mask = step.mask(student.rows[0], tokens=self.tokens)
            part = partial(self._divergence, answers="classes", mask=None)
            return {"kd": average_loss(step, partial(mean_in_chunks, part, mask=mask), student, teacher, mask)}
        answers = answers_of(step, student, self._decided or self.answers, "KD()")
        student = self._perturb(student, self.student_noise, "student", step)
        teacher = self._perturb(teacher, self.teacher_noise, "teacher", step)
        mask = step.mask(student, tokens=self.tokens)
        loss = partial(self._divergence, answers=answers, mask=mask)
        return {"kd": average_loss(step, loss, student, teacher, mask)}

    def _lazy(self, step: Step) -> tuple[LazyLogits, LazyLogits | Tensor] | None:
        """Return the answers of student and teacher to be made in parts; None where the whole logits are needed."""
        if self.student_noise or self.teacher_noise or not is_by_position(self.divergence):
            return None
        both = lazy_pair(step)
        if both is None or answers_of(step, both[0], self._decided or self.answers, "KD()") != "classes":
            return None
        return both

    def extra_repr(self) -> str:
        """Return the settings for printing."""
        shown = [f"temperature={self.temperature}"]
        shown += [f"reduction={self.reduction!r}"] if self.reduction != "batchmean" else []
        shown += ["scale_t2=False"] if not self.scale_t2 else []
        shown += [f"divergence={describe_function(self.divergence)}"] if self.divergence is not forward_kl else []
        for setting in ("answers", "teacher_noise", "student_noise"):
            value = getattr(self, setting)
            shown += [f"{setting}={value!r}"] if value is not None else []
        shown += ["tokens='all'"] if self.tokens == "all" else []
        return ", ".join(shown)

    def _divergence(self, student: Tensor, teacher: Tensor, answers: Answers, mask: Tensor | None) -> Tensor:
        """Return the divergence that fits what the logits stand for."""
        if answers == "values" or self.divergence is squared_error:
            return squared_error(student, teacher, mask=mask)
        if answers == "classes":
            settings = self.temperature, self.reduction, self.scale_t2
            return kd(student, teacher, *settings, mask=mask, divergence=self.divergence)
        if self.divergence is not forward_kl:
            raise DistillError(
                f"KD(divergence={describe_function(self.divergence)}) compares classes, and these "
                "models answer with several labels an example; leave divergence out, or use divergence=squared_error."
            )
        return multi_label_kd(student, teacher, self.temperature, self.reduction, self.scale_t2, mask=mask)

    @staticmethod
    def _perturb(logits: Tensor, noise: LogitNoise | None, whose: str, step: Step) -> Tensor:
        """Return the logits with noise, where there is any."""
        return logits if noise is None else noise(logits, step.drawing(f"noise of the {whose}"))


@checked
class DKD(Objective):
    """Decoupled knowledge distillation: α TCKD + β NCKD, each × τ², rising over the first epochs. Term `dkd`.

    TCKD compares the probabilities of the label against all other classes, NCKD those among the other classes. The
    cross-entropy of the paper's loss is `Labels()`; where tokens have labels the answer of a causal language model has
    the label of the next token, as in `CausalLM()`. With two classes it is α `KD`, and warns of that.

    Zhao et al. 2022 (arXiv:2203.08679), section 3; the warm-up is that of the published code.

    Args:
        alpha, beta: weights of the two parts; β is 8, 6 or 2 by pair in the paper, and 0.5 with τ 1 on ImageNet.
        temperature: τ.
        warmup: the term is multiplied by min(epoch / warmup, 1), with epochs counted from 1; 0 is no warm-up.
    """

    about = About(
        ("dkd",),
        "min(epoch / warmup, 1) τ² (α KL(b_t ‖ b_s) + β KL(q_t ‖ q_s)), b: label or not, q: softmax over the others",
        "Zhao et al. 2022, arXiv:2203.08679",
    )
    needs = ("labels",)
    in_chunks = True

    def __init__(
        self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, *, warmup: float = 20.0
    ) -> None:
        super().__init__()
        refuse_unless_positive("DKD", temperature=temperature)
        refuse_negative("DKD", alpha=alpha, beta=beta, warmup=warmup)
        self.alpha, self.beta, self.temperature, self.warmup = alpha, beta, temperature, warmup

    def prepare(self, step: Step, rows: int) -> None:
        """Warn of two classes, and of a warm-up longer than the training."""
        _refuse_unlabelled(step, "DKD()")
        classes = step.student.logits.shape[-1]
        if classes == 2:
            warnings.warn(
                f"DKD with 2 classes is {self.alpha} × KD({self.temperature}): there are no other classes to compare, "
                f"so beta={self.beta} does nothing; use KD({self.temperature}).",
                stacklevel=2,
            )
        if self.warmup > step.moment.epochs:
            warnings.warn(
                f"DKD(warmup={self.warmup:g}) reaches its full weight after {self.warmup:g} epochs and the training "
                f"has {step.moment.epochs:.3g}; use DKD(warmup=0), or train for longer.",
                stacklevel=2,
            )

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the term `dkd`."""
        (student, teacher), labels = both_answers(step), step.labels("DKD()")
        if labels.is_floating_point():
            raise DistillError(
                f"DKD() compares one label an example with the other classes, and the labels are {labels.dtype} "
                f"{list(labels.shape)}; use KD(), which takes several labels and real values too."
            )
        if not bool((on_host(labels) != -100).any()):
            return {"dkd": zero_of(student)}
        loss = partial(dkd, alpha=self.alpha, beta=self.beta, temperature=self.temperature)
        if isinstance(student, LazyLogits) and student.shape == teacher.shape and labels.shape == student.shape[:-1]:
            value = mean_in_chunks(loss, student, teacher, labels, mask=is_labelled(labels))
        else:
            value = loss(step.student.logits, step.taught.logits, labels)
        rise = min((floor(step.moment.epoch) + 1) / self.warmup, 1.0) if self.warmup else 1.0
        return {"dkd": step.mean(value, TOKENS if step.labels_tokens else LABELS) * rise}

    def extra_repr(self) -> str:
        """Return the settings for printing."""
        return f"alpha={self.alpha}, beta={self.beta}, temperature={self.temperature}, warmup={self.warmup}"


@checked
class Labels(Objective):
    """The student's answer under the labels of the data. Term `labels`.

    It is cross-entropy for classes, binary cross-entropy averaged over labels for several labels an example, both
    without labels of −100, and squared error for real values, where every number counts. Labels of tokens, classes or
    values, are left out at padding and where they are −100.

    Args:
        smoothing: ε: the target is 1 − ε on the label plus ε / C on each of the C classes (Szegedy et al. 2015,
            arXiv:1512.00567, section 7).
        answers: what logits stand for: "classes", "labels" (several an example) or "values"; None decides it by the
            model and the data.
    """

    about = About(("labels",), "CE(z_s, y), with smoothing (1 − ε) CE + ε mean over the classes", "")
    needs = ("labels",)
    in_chunks = True

    def __init__(self, smoothing: float = 0.0, *, answers: Any = None) -> None:
        super().__init__()
        if not 0 <= smoothing < 1:
            raise DistillError(
                f"Labels(smoothing={smoothing}) leaves nothing of the label; use 0 to below 1, e.g. 0.1."
            )
        self.smoothing, self.answers = smoothing, check_answers(answers, "Labels")
        self._decided: Answers | None = None

    def prepare(self, step: Step, rows: int) -> None:
        """Decide what the logits stand for; refuse labels of a causal language model that are its own input tokens."""
        _refuse_unlabelled(step, "Labels()")
        self._decided = decide_answers(step, self.answers, "Labels()")
        _refuse_missing_values(step, self._decided)
        labels, ids = step.batch.get("labels"), step.batch.get("input_ids")
        if labels is None or ids is None or labels.shape != ids.shape or step.student.logits.ndim != 3:
            return
        is_labelled = labels != -100
        if bool(is_labelled.any()) and bool((labels == ids)[is_labelled].all()) and _is_causal(step):
            raise DistillError(
                "Labels() compares the answer at a token with the label there, and the labels are the tokens that this "
                "model reads from left to right; use CausalLM(), which compares with the next one."
            )

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the term `labels`."""
        logits, labels = lazy_logits(step.student) or step.student.logits, step.labels_in_place("Labels()")
        answers = answers_of(step, logits, self._decided or self.answers, "Labels()")
        if self.smoothing and answers != "classes":
            raise DistillError(
                f"Labels(smoothing={self.smoothing}) shares a part of the label among classes, and these answers are "
                f"{answers!r}; use Labels()."
            )
        if isinstance(logits, LazyLogits):
            if answers == "classes" and labels.shape == logits.shape[:-1]:
                return {"labels": self._in_chunks(step, logits, labels)}
            logits = step.student.logits
        if answers == "values" and not step.labels_tokens:
            return {"labels": step.mean(mean_squared_error(logits, labels))}
        counts = is_labelled(labels)
        if not bool(on_host(counts).any()):
            return {"labels": zero_of(logits)}
        if answers == "values":
            values = take_kept(logits.reshape(*labels.shape, -1), counts)
            return {"labels": step.mean(mean_squared_error(values, take_kept(labels[..., None], counts)), LABELS)}
        if answers == "labels":
            targets = labels.reshape(logits.shape) if labels.numel() == logits.numel() else labels
            return {"labels": step.mean(binary_cross_entropy(logits, targets), LABELS)}
        return {"labels": step.mean(cross_entropy(logits, labels, self.smoothing), LABELS)}

    def _in_chunks(self, step: Step, logits: LazyLogits, labels: Tensor) -> Tensor:
        """Return the cross-entropy of classes of tokens, made for a few of them at a time."""
        counts = is_labelled(labels)
        if not bool(on_host(counts).any()):
            return zero_of(logits)
        loss = partial(cross_entropy, smoothing=self.smoothing)
        return step.mean(mean_in_chunks(loss, logits, labels, mask=counts), LABELS)

    def extra_repr(self) -> str:
        """Return the settings for printing."""
        shown: list[Any] = [f"smoothing={self.smoothing}"] if self.smoothing else []
        return ", ".join(shown + ([f"answers={self.answers!r}"] if self.answers else []))


def is_by_position(divergence: Divergence) -> bool:
    """Return whether a divergence is known to compare each position by itself."""
    plain = divergence.func if isinstance(divergence, partial) else divergence
    return plain in (forward_kl, reverse_kl, jensen_shannon, squared_error)


def _refuse_other_positions(step: Step, student: torch.Size, teacher: torch.Size) -> None:
    """Raise DistillError if token models answer at different tokens, as a decoder and an encoder–decoder do."""
    if len(student) != 3 or len(teacher) != 3:
        return
    apart = answers_by_decoder(step.network, step.batch) != answers_by_decoder(step.taught.model, step.batch)
    if apart or student[:-1] != teacher[:-1]:
        kind = "the answers of one are to what its decoder writes, of the other to what it reads" if apart else ""
        found = f"the student answers at {student[1]} positions and the teacher at {teacher[1]}"
        raise DistillError(
            f"KD() compares token by token, and {kind or found}; let the student learn what the teacher writes, "
            "data={'input_ids': ids, 'labels': teacher.generate(ids)} with objective=[CausalLM()], or give both models "
            "of one kind."
        )


def _refuse_unlabelled(step: Step, caller: str) -> None:
    """Raise DistillError if all labels of the data are −100."""
    labels = None if step.data is None else step.data.table.get("labels")
    if labels is not None and all(bool((row == -100).all()) for row in labels):
        raise DistillError(f"{caller} needs a label that is not -100, and none of the {len(labels)} rows has one.")


def _refuse_missing_values(step: Step, answers: Answers) -> None:
    """Raise DistillError where the answers are real values and whole labels of −100 say that some are missing."""
    labels = None if step.data is None else step.data.table.get("labels")
    if answers != "values" or step.labels_tokens or not isinstance(labels, Tensor) or labels.is_floating_point():
        return
    missing = (labels == -100).reshape(len(labels), -1).any(1).nonzero()[:, 0]
    if len(missing):
        raise DistillError(
            f"Labels() compares real values, and {len(missing)} of {len(labels)} rows have none (the label −100, first "
            f"in row {int(missing[0])}); leave them out: rows.take((rows.table['labels'] != -100).nonzero()[:, 0])."
        )


def _is_causal(step: Step) -> bool:
    """Return whether the student's answer at the first token is the same when the last token is another."""
    ids = step.batch["input_ids"]
    other = torch.where(ids[:, -1] == ids[:, 0], ids[:, -1] ^ 1, ids[:, 0])
    changed = {**step.batch, "input_ids": torch.cat([ids[:, :-1], other[:, None]], 1)}
    logits = run(step.network, inputs_of(step.network, changed), resumable=False).logits
    return ids.shape[1] > 1 and torch.equal(logits[:, 0], step.student.logits[:, 0])
