"""Addition as a causal model of how "17 + 25 =" is continued: digit by digit, with a carry.

    ones = (a + b) mod 10
    carry = ⌊(a mod 10 + b mod 10) / 10⌋
    tens = ⌊a / 10⌋ + ⌊b / 10⌋ + carry
    sum = 10 · tens + ones

Stolfo, Belinkov, Sachan 2023 (arXiv:2305.15054); Quirke, Barez 2023 (arXiv:2310.13121).
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from distill.causal.domains import domain_of
from distill.causal.model import CausalModel
from distill.errors import DistillError, checked
from distill.tasks.causal.prompts import Prompts

TEMPLATE = "{a} + {b} ="
MODULO_TEMPLATE = "({a} + {b}) modulo {modulo} ="


@checked
def addition(
    tokenizer: Any,
    a: Sequence[int] = range(10, 50),
    b: Sequence[int] = range(10, 50),
    *,
    modulo: int | None = None,
    template: str | None = None,
) -> CausalModel:
    """Return the causal model of the sum of two numbers, by its ones, the carry and `tens`, all other digits.

    `sum` is 10 · tens + ones (tens are 12 in 123), and the answer is the sum, or the sum modulo `modulo`. An
    interchange may make sums that no pair of inputs has; they are answers too.

    The answer of a language model is read by its first token, which must differ between all answers. If each number is
    one token, as in GPT-2 for most numbers up to 500, any such range is possible. A tokenizer of digits (Llama, Qwen,
    stories260K) shows only the first digit: take sums below 10, `addition(tokenizer, range(5), range(5))`, or the last
    digit as answer, `addition(tokenizer, modulo=10)`. If the space before the answer is a separate token, as it is
    then, the prompt ends with it: "17 + 25 = ".

    Positions have names: "a" and "b", the last token of each number (of digits, its ones), "a_first" and "b_first"
    their first, and "end". Inputs are the numbers themselves.

    Args:
        tokenizer: the tokenizer of the causal language model, a fast one.
        a: whole numbers from 0.
        b: the same for the second number.
        modulo: the modulus of the answer; it fills the slot `{modulo}`.
        template: `"{a} + {b} ="`, or `"({a} + {b}) modulo {modulo} ="` with `modulo`.

    Stolfo, Belinkov, Sachan 2023 (arXiv:2305.15054) for prompts of this kind; Quirke, Barez 2023 (arXiv:2310.13121) for
    the carry.

    Raises:
        DistillError: negative numbers, a modulo below 2, or answers with the same first token.
    """
    _check(a, b, modulo)
    domains = {"a": domain_of("a", a), "b": domain_of("b", b)}
    found = _domains(domains["a"].values.tolist(), domains["b"].values.tolist(), modulo)
    words = [str(number) for number in found["answer"]]
    prompts = _prompts(
        tokenizer, (MODULO_TEMPLATE if modulo else TEMPLATE) if template is None else template, a, b, (modulo, words)
    )

    def numbers(values: dict[str, Tensor]) -> dict[str, Tensor]:
        places = {name: domain.index(values[name]) for name, domain in domains.items()}
        return {**places, "modulo": torch.zeros_like(places["a"])}

    def answer(sum: Tensor) -> Tensor:
        return sum if modulo is None else sum % modulo

    return CausalModel(
        inputs={"a": a, "b": b},
        mechanisms={
            "ones": lambda a, b: (a + b) % 10,
            "carry": lambda a, b: (a % 10 + b % 10) // 10,
            "tens": lambda a, b, carry: a // 10 + b // 10 + carry,
            "sum": lambda tens, ones: 10 * tens + ones,
            "answer": answer,
        },
        output="answer",
        encode=lambda values: prompts.encode(numbers(values)),
        decode=lambda logits, values: prompts.read(logits, words, numbers(values)),
        domains=found,
        positions={
            "a": lambda values: prompts.last("a", numbers(values)),
            "b": lambda values: prompts.last("b", numbers(values)),
            "a_first": lambda values: prompts.first("a", numbers(values)),
            "b_first": lambda values: prompts.first("b", numbers(values)),
            "end": lambda values: prompts.end(numbers(values)),
        },
    )


def _check(a: Sequence[int], b: Sequence[int], modulo: int | None) -> None:
    for name, given in (("a", a), ("b", b)):
        wrong = [number for number in given if number < 0]
        if wrong:
            raise DistillError(
                f"addition adds whole numbers from 0: {name} has {wrong[0]}; give {name}=range(10, 50) or the like."
            )
    if modulo is not None and modulo < 2:
        raise DistillError(f"modulo={modulo} leaves nothing to answer; give modulo=10, or leave it out for the sum.")


def _domains(a: list[int], b: list[int], modulo: int | None) -> dict[str, list[int]]:
    """Return the values of each variable in all runs and after all interchanges."""
    added = {x + y for x, y in product({x % 10 for x in a}, {y % 10 for y in b})}
    ones, carry = {each % 10 for each in added}, {each // 10 for each in added}
    rest = {x + y for x, y in product({x // 10 for x in a}, {y // 10 for y in b})}
    tens = {x + y for x, y in product(rest, carry)}
    sums = {10 * x + y for x, y in product(tens, ones)}
    answers = sums if modulo is None else {each % modulo for each in sums}
    found = {"ones": ones, "carry": carry, "tens": tens, "sum": sums, "answer": answers}
    return {name: sorted(values) for name, values in found.items()}


def _prompts(
    tokenizer: Any, template: str, a: Sequence[int], b: Sequence[int], answer: tuple[int | None, list[str]]
) -> Prompts:
    """Return the prompts without a space at the end, or with one if only then the first tokens of answers differ."""
    modulo, words = answer
    fillers = {"a": [str(x) for x in a], "b": [str(y) for y in b], "modulo": [str(modulo)]}
    faults = []
    for ending in ("", " "):
        prompts = Prompts([template + ending], fillers, tokenizer)
        lacking = next((slot for slot in ("{a}", "{b}") if slot not in template), None)
        if lacking is not None:
            raise DistillError(f"the template {template!r} does not name {lacking}; write it as {TEMPLATE!r}.")
        try:
            prompts.answer_ids(words, dict.fromkeys(fillers, torch.zeros(1, dtype=torch.long)))
            return prompts
        except DistillError as fault:
            faults.append(str(fault).split(";")[0])
    raise DistillError(
        f"the answers {words[0]} to {words[-1]} cannot be read by their first token: {faults[0]}, and with a space at "
        f"the end, {faults[1]}; take sums of one digit, as addition(tokenizer, range(5), range(5)), or the last digit, "
        "as addition(tokenizer, modulo=10)."
    )
