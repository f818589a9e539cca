"""Agreement of a verb with its subject as a causal model for language models, with another noun as an attractor.

    answer = number of the subject, whatever the number of the attractor

Linzen, Dupoux, Goldberg 2016 (arXiv:1611.01368); Marvin, Linzen 2018 (arXiv:1808.09031).
"""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from distill.causal.model import CausalModel
from distill.errors import DistillError, checked
from distill.tasks.causal.prompts import Prompts

BEFORE = (
    "When they saw the {attractor}, the {subject}",
    "Next to the {attractor}, the {subject}",
    "They went to the {attractor} where the {subject}",
    "Mom told the {attractor} that the {subject}",
)
"""Templates with the attractor before the subject, which the verb follows at once: the easy ones."""
BETWEEN = (
    "The {subject} near the {attractor}",
    "The {subject} behind the {attractor}",
    "The {subject} next to the {attractor}",
    "The {subject} that the {attractor} saw",
)
"""Templates with the attractor between subject and verb: half of these are right by the nearest noun."""
NOUNS = tuple((noun, f"{noun}s") for noun in "dog cat bird boy girl friend toy ball car flower bug".split())
VERBS = (("was", "were"),)


@checked
def verb_number(
    tokenizer: Any,
    *,
    templates: Sequence[str] = BEFORE,
    nouns: Sequence[Sequence[str]] = NOUNS,
    verbs: Sequence[Sequence[str]] = VERBS,
) -> CausalModel:
    """Return the causal model of the verb after "Next to the dogs, the cat": singular (0, "was") or plural (1, "were").

    Inputs are the numbers of the nouns and whether each is plural; `number` is that of the subject, and the answer
    equals it. The network's answer is read at the last token: the logit of a number is the log-sum-exp of the logits of
    the first tokens of its verb forms. Positions have names: "subject" and "attractor", the last token of each (in a
    noun of several tokens, mostly the one that shows the number), and "end". Sampled nouns differ, if there are two.

    The attractor stands before the subject by default; `templates=BETWEEN` puts it between subject and verb, where a
    small model may follow it instead: measure that first. By default "end" is the subject's last token, too.

    Args:
        tokenizer: the tokenizer of the causal language model, a fast one.
        templates: texts with the slot `{subject}` and perhaps `{attractor}` that a verb continues: BEFORE, BETWEEN or
            others.
        nouns: pairs of a singular and its plural.
        verbs: pairs of a singular and a plural form, which all differ in their first tokens after a space.

    Linzen, Dupoux, Goldberg 2016 (arXiv:1611.01368); for language models Marvin, Linzen 2018 (arXiv:1808.09031). The
    default sentences are this project's, with words that small models of children's stories know.

    Raises:
        DistillError: verb forms that share their first token, a template without a subject, no pairs.
    """
    prompts = _prompts(tokenizer, templates, nouns, verbs)
    forms = [form for pair in verbs for form in pair]

    def numbers(values: dict[str, Tensor]) -> dict[str, Tensor]:
        chosen = {slot: 2 * values[slot] + values[f"{slot}_number"] for slot in ("subject", "attractor")}
        return {"template": values["template"], **chosen}

    def decode(logits: Tensor, values: dict[str, Tensor]) -> Tensor:
        read = prompts.read(logits, forms, numbers(values))
        return rearrange(read, "batch (verb number) -> batch number verb", number=2).logsumexp(-1)

    return CausalModel(
        inputs={
            "template": range(len(prompts.templates)),
            "subject": range(len(nouns)),
            "subject_number": range(2),
            "attractor": range(len(nouns)),
            "attractor_number": range(2),
        },
        mechanisms={"number": lambda subject_number: subject_number, "answer": lambda number: number},
        output="answer",
        encode=lambda values: prompts.encode(numbers(values)),
        decode=decode,
        sample=lambda n, generator: _sample(n, generator, len(prompts.templates), len(nouns)),
        domains={"number": range(2), "answer": range(2)},
        positions={
            "subject": lambda values: prompts.last("subject", numbers(values)),
            "attractor": lambda values: prompts.last("attractor", numbers(values)),
            "end": lambda values: prompts.end(numbers(values)),
        },
    )


def _prompts(
    tokenizer: Any, templates: Sequence[str], nouns: Sequence[Sequence[str]], verbs: Sequence[Sequence[str]]
) -> Prompts:
    for name, pairs in (("nouns", nouns), ("verbs", verbs)):
        wrong = next((pair for pair in pairs if isinstance(pair, str) or len(pair) != 2), None)
        if wrong is not None or not pairs:
            raise DistillError(
                f"{name} must be pairs of a singular and a plural: {wrong or list(pairs)!r}; give {name}="
                f"{[NOUNS[0] if name == 'nouns' else VERBS[0]]}."
            )
    words = [word for pair in nouns for word in pair]
    prompts = Prompts(templates, {"subject": words, "attractor": words}, tokenizer)
    for template in prompts.templates:
        if "{subject}" not in template:
            raise DistillError(f"a template must name the {{subject}}: {template!r}; write it as {BETWEEN[0]!r}.")
    every = torch.arange(len(prompts.templates))
    numbers = {"template": every, **dict.fromkeys(("subject", "attractor"), torch.zeros_like(every))}
    prompts.answer_ids([form for pair in verbs for form in pair], numbers)  # raises early
    return prompts


def _sample(n: int, generator: torch.Generator, templates: int, nouns: int) -> dict[str, Tensor]:
    def draw(size: int) -> Tensor:
        return torch.randint(size, (n,), generator=generator, device=generator.device)

    subject = draw(nouns)
    return {
        "template": draw(templates),
        "subject": subject,
        "subject_number": draw(2),
        "attractor": (subject + 1 + draw(nouns - 1)) % nouns if nouns > 1 else subject,
        "attractor_number": draw(2),
    }
