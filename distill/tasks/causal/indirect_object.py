"""Indirect object identification as a causal model: "Mary and John …, John gave a book to" is continued by "Mary".

    subject = the name that occurs twice
    position = the place of the other name, 0 first, 1 second
    answer = the name at that position

Wang, Variengien, Conmy, Shlegeris, Steinhardt 2022 (arXiv:2211.00593).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distill.causal.model import CausalModel
from distill.errors import DistillError, checked
from distill.tasks.causal.prompts import Prompts

TEMPLATES = (
    "On the way to the {place}, {name_A} and {name_B} sat down for a while. Then {name_C} handed a {object} to",
    "{name_A} and {name_B} shared a bench near the {place}. Before leaving, {name_C} passed a {object} to",
    "It was raining, so {name_A} and {name_B} stayed at the {place} until {name_C} lent a {object} to",
    "Last week {name_A} and {name_B} toured the {place}, where {name_C} sold a {object} to",
    "Because {name_A} and {name_B} lived by the {place}, {name_C} often carried a {object} over to",
    "In front of the {place} stood {name_A} and {name_B}. With a smile, {name_C} gave a {object} to",
)
NAMES = tuple(
    "Mary John Tom James Anna Alice Robert Peter Paul Sarah Emma Jack Kate Laura David Simon Martin Lisa Oliver Grace "
    "Frank Adam Helen Maria".split()
)
PLACES = ("library", "market", "harbor", "museum", "farm", "bakery", "bridge", "castle")
OBJECTS = ("book", "ticket", "lamp", "basket", "map", "cup", "letter", "hammer")


@checked
def indirect_object(
    tokenizer: Any,
    *,
    templates: Sequence[str] = TEMPLATES,
    names: Sequence[str] = NAMES,
    places: Sequence[str] = PLACES,
    objects: Sequence[str] = OBJECTS,
) -> CausalModel:
    """Return the causal model of which name continues "{name_A} and {name_B} …, {name_C} gave a {object} to".

    It is the name that occurs only once. `order` decides whom `name_C` repeats: 0 the second name (ABBA, so the
    indirect object is first), 1 the first one (BABA). Two inner variables, which papers align, are signals that a
    network may use:

    - `subject`, the token signal: the name that occurs twice;
    - `position`, the position signal: the place of the indirect object, 0 first, 1 second. It is the place at which the
      subject did not occur before. If the subject is neither name, because it was interchanged with one from a run with
      other names, `order` decides.

    The answer is the name at that position. It is read at the last token, by the first tokens of the names, which are
    its classes. Positions have names: "IO" (the indirect object), "S1" (the subject's first occurrence), "S1+1" (the
    token after it), "S2" (the subject's second occurrence), "name_A" and "name_B" (the first and the second name),
    "end". The position of a name of several tokens is that of its last one. Sampled names differ.

    Args:
        tokenizer: the tokenizer of the causal language model, a fast one.
        templates: texts with the slots `{name_A}`, `{name_B}` and `{name_C}`, in this order, and perhaps `{place}` and
            `{object}`. Mind a and an.
        names: names that differ in their first tokens, after a space.
        places: fillers of `{place}`.
        objects: fillers of `{object}`.

    Wang, Variengien, Conmy, Shlegeris, Steinhardt 2022 (arXiv:2211.00593), sections 2 and 3, appendix A for the two
    signals; position as a subspace: Makelov, Lange, Nanda 2023 (arXiv:2311.17030). The default lists are this
    project's.

    Raises:
        DistillError: fewer than two names, names that share their first token, a template without the three names.
    """
    prompts = _prompts(tokenizer, templates, names, places, objects)

    def numbers(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**values, "name_C": subject(values["name_A"], values["name_B"], values["order"])}

    def place_by_order(values: dict[str, Tensor], number: int) -> Tensor:
        """Return the position of the first name in rows of this order, of the second one in others."""
        first, second = (prompts.last(slot, numbers(values)) for slot in ("name_A", "name_B"))
        return torch.where(values["order"] == number, first, second)

    return CausalModel(
        inputs={
            "template": range(len(prompts.templates)),
            "name_A": range(len(names)),
            "name_B": range(len(names)),
            "order": range(2),
            "place": range(len(places)),
            "object": range(len(objects)),
        },
        mechanisms={"subject": subject, "position": position, "answer": answer},
        output="answer",
        encode=lambda values: prompts.encode(numbers(values)),
        decode=lambda logits, values: prompts.read(logits, names, numbers(values)),
        sample=lambda n, generator: _sample(n, generator, prompts),
        domains={"subject": range(len(names)), "position": range(2), "answer": range(len(names))},
        positions={
            "IO": lambda values: place_by_order(values, 0),
            "S1": lambda values: place_by_order(values, 1),
            "S1+1": lambda values: place_by_order(values, 1) + 1,
            "S2": lambda values: prompts.last("name_C", numbers(values)),
            "name_A": lambda values: prompts.last("name_A", numbers(values)),
            "name_B": lambda values: prompts.last("name_B", numbers(values)),
            "end": lambda values: prompts.end(numbers(values)),
        },
    )


def subject(name_A: Tensor, name_B: Tensor, order: Tensor) -> Tensor:
    """Return the name that occurs twice."""
    return torch.where(order == 0, name_B, name_A)


def position(name_A: Tensor, name_B: Tensor, subject: Tensor, order: Tensor) -> Tensor:
    """Return the place of the name that is not the subject, 0 first, 1 second; `order` if the subject is neither."""
    return torch.where(subject == name_A, 1, torch.where(subject == name_B, 0, order))


def answer(name_A: Tensor, name_B: Tensor, position: Tensor) -> Tensor:
    """Return the name at that position."""
    return torch.where(position == 0, name_A, name_B)


def _prompts(
    tokenizer: Any, templates: Sequence[str], names: Sequence[str], places: Sequence[str], objects: Sequence[str]
) -> Prompts:
    if len(names) < 2:
        raise DistillError(f"indirect_object needs two names: names={list(names)!r}; give names=['Mary', 'John', ...].")
    fillers = {"name_A": names, "name_B": names, "name_C": names, "place": places, "object": objects}
    prompts = Prompts(templates, fillers, tokenizer)
    for template in prompts.templates:
        found = [template.find(f"{{{slot}}}") for slot in ("name_A", "name_B", "name_C")]
        if -1 in found or found != sorted(found):
            raise DistillError(
                f"a template must name {{name_A}}, {{name_B}} and {{name_C}} in this order: {template!r}; write it as "
                f"{TEMPLATES[1]!r}."
            )
    every = torch.arange(len(prompts.templates))
    prompts.answer_ids(names, {"template": every, **dict.fromkeys(fillers, torch.zeros_like(every))})  # raises early
    return prompts


def _sample(n: int, generator: torch.Generator, prompts: Prompts) -> dict[str, Tensor]:
    def draw(size: int) -> Tensor:
        return torch.randint(size, (n,), generator=generator, device=generator.device)

    names = len(prompts.fillers["name_A"])
    first = draw(names)
    return {
        "template": draw(len(prompts.templates)),
        "name_A": first,
        "name_B": (first + 1 + draw(names - 1)) % names,
        "order": draw(2),
        "place": draw(len(prompts.fillers["place"])),
        "object": draw(len(prompts.fillers["object"])),
    }
