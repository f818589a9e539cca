"""`Written`: rows whose completions a model writes, the student or the teacher, during the training.

In each step, with probability λ, the completions of all its rows are replaced by text that a model writes after the
prompts; with probability 1 − λ the step sees the completions of the data:

    λ = 1, by the student   on-policy distillation            Agarwal et al. 2023 (arXiv:2306.13649), section 3
    0 < λ < 1               generalised distillation, GKD     the same, algorithm 1
    by the teacher          sequence-level distillation       Kim, Rush 2016 (arXiv:1606.07947), section 3.2
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

from torch import Tensor

from distill.data.rows import Rows
from distill.data.task import Task
from distill.errors import DistillError, checked, refuse_unless_positive
from distill.writing.generation import Generation
from interventions import shown

WRITERS = ("student", "teacher")


@checked
@dataclass(frozen=True, eq=False)
class Written:
    """Rows whose completions a model writes in the training: `fit(teacher, student, data=Written(prompts))`.

    In each step one draw decides for all its rows whether a model writes their completions (with probability `share`)
    or those of the data are used. What is written ends with the first end token, which is part of it, or after
    `max_new_tokens`. Losses over tokens are over the completion, as the labels of the prompt are −100. All draws are
    decided by the seed of the training, the step and the number of the row, so that a resumed run writes the same
    text, and so does another number of processes, but for rounding.

    Agarwal et al. 2023 (GKD, arXiv:2306.13649), algorithm 1; by the teacher: Kim, Rush 2016 (arXiv:1606.07947), section
    3.2, which searches by beams: `generation={"do_sample": False, "num_beams": 5}`.

    Args:
        prompts: rows with `input_ids` and `attention_mask`, in any form that `fit` takes as data; where they have
            `labels` too, the tokens before the first label that is not −100 are the prompt, and the others are the
            completion, which `share` below 1 needs. Or texts: a list of them, or rows with `prompt`, a text or a list
            of messages, and perhaps `completion`, which the tokenizer of the models reads. Another `Written` mixes
            three: `Written(Written(prompts, by="teacher"), share=0.5)` is half by the student and half by the teacher.
        by: "student", as it is at the step (on-policy), or "teacher", which writes once after each prompt, when it
            is needed first, so that later epochs write nothing (sequence-level).
        share: λ, from 0 to 1, or a function of the share of the training that is done, as `Ramp(0, 1)`.
        max_new_tokens: the most tokens that are written after a prompt.
        temperature, top_k, top_p: change the distribution that tokens are drawn from, as in transformers; by default
            it is that of the model, without what its own `generation_config` says.
        generation: further settings, by the names of transformers' `GenerationConfig`, as {"min_p": 0.05}. Without
            `eos_token_id` a text ends with the end tokens of the model.
        prompt_tokens: the number of tokens at the beginning of each row that are its prompt, whatever its labels say;
            the others are its completion. For texts that are no pairs, as `distill.tasks.load("text", …)` reads them.
            None leaves it to the labels.

    Raises:
        DistillError: settings that cannot be, by the first of them.
    """

    prompts: Any
    by: str = "student"
    share: float | Callable[[float], float] = 1.0
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    generation: Mapping[str, Any] = field(default_factory=dict)
    prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.by not in WRITERS:
            raise DistillError(f"Written(by={shown(self.by)}) is neither 'student' nor 'teacher'; choose one.")
        if not callable(self.share):
            self.share_at(0.0)
        refuse_unless_positive("Written", temperature=self.temperature)
        for name in ("temperature", "top_k", "top_p"):
            if name in self.generation:
                raise DistillError(
                    f"Written takes {name} as an argument of its own, and generation names it too; say it once: "
                    f"Written(…, {name}={shown(self.generation[name])})."
                )
        _ = self.settings
        count = self.prompt_tokens
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise DistillError(
                f"Written(prompt_tokens={shown(count)}) is no number of tokens that a prompt has; use a whole number "
                "above 0, e.g. prompt_tokens=16, or leave it out."
            )
        if count is not None and isinstance(self.prompts, Written):
            raise DistillError(
                f"Written(Written(…), prompt_tokens={count}) mixes texts after prompts that the inner one has; say it "
                f"there: Written(Written(rows, prompt_tokens={count}, …), …)."
            )

    @property
    def settings(self) -> Generation:
        """All settings of the text."""
        given = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return Generation(self.max_new_tokens, {**given, **self.generation})

    def share_at(self, progress: float) -> float:
        """Return λ when this share of the training is done.

        Raises:
            DistillError: it is no number from 0 to 1.
        """
        found: Any = self.share(progress) if callable(self.share) else self.share
        found = found.item() if isinstance(found, Tensor) and not found.ndim else found
        if isinstance(found, bool) or not isinstance(found, Real) or not 0 <= float(found) <= 1:
            when = f", {progress:.3g} of the training done," if callable(self.share) else ""
            raise DistillError(
                f"Written(share=…) is {shown(found)}{when} and is a probability; use a number from 0 (the data alone) "
                "to 1 (what a model writes alone), e.g. share=0.5."
            )
        return float(found)

    @property
    def rows(self) -> Rows:
        """The prompts as rows, with the completions of the data where they have any."""
        if isinstance(self.prompts, Written):
            return self.prompts.rows
        return self.prompts.train if isinstance(self.prompts, Task) else Rows.of(self.prompts)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns of the data, in order."""
        return self.rows.columns

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Tensor | Sequence[int]) -> dict[str, Tensor]:
        """Return the rows of the data at `indices`, as `Rows.batch` does: nothing is written outside of a training."""
        return self.rows.batch(indices)

    def levels(self) -> Iterator["Written"]:
        """Yield these rows and those that they mix with, which have the say where nothing is written."""
        yield self
        if isinstance(self.prompts, Written):
            yield from self.prompts.levels()


def data_of(data: Any) -> Any:
    """Return the prompts of rows that a model writes, as they were given, at any level; other data as it is."""
    return data_of(data.prompts) if isinstance(data, Written) else data


def over(data: Any, prompts: Any) -> Any:
    """Return other prompts: as rows that are written as those of `data` are, at all levels, if these are `Written`."""
    return replace(data, prompts=over(data.prompts, prompts)) if isinstance(data, Written) else prompts
