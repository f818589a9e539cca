"""Natural language inference with several quantifiers (MQNLI), as a causal model over two parsed sentences.

Premise and hypothesis have the same nine slots, so their phrases can be compared one by one. Each inner variable is the
natural-logic relation between two phrases (`natural_logic.py`), computed from the relations between their parts up to
the relation between the sentences, which decides entailment, contradiction or neutral:

    answer = label(denied(subject determiners, quantified(subject determiners, subject_np, negated_vp)))

Geiger, Cases, Karttunen, Potts 2019 (arXiv:1911.00811); as a causal model Geiger, Richardson, Potts 2020
(arXiv:2004.14623).
"""

from collections.abc import Callable
from inspect import Parameter, Signature
from pathlib import Path

import torch
from torch import Tensor

from distill.causal.model import CausalModel
from distill.errors import checked
from distill.tasks.causal.mqnli_files import (
    ABSENT,
    FIXED,
    INPUTS,
    KNOWN,
    MODIFIERS,
    NEGATION,
    SLOTS,
    SPECIAL,
    columns_of,
    domains_of,
    number_words,
    places_of,
    read_split,
    slot_of,
    words_of_slots,
)
from distill.tasks.causal.natural_logic import LABELS, RELATIONS, label_table, negation_table, quantifier_table

NODES = {
    "vp": "VP",
    "object_np": "ObjNP",
    "subject_np": "SubjNP",
    "object_dp": "ObjDP",
    "negated_object_dp": "NegObjDP",
    "negated_vp": "NegVP",
    "subject_dp": "SubjDP",
    "negated_subject_dp": "NegSubjDP",
}
"""The inner variables, and their names in the files; GRAPH has what each is computed from."""
SOME = KNOWN.index("some")
UNRELATED = 0.15
"""The share of drawn pairs whose nouns and verb differ by the toss of a coin each, before labels are balanced.

It gives the share of equal nouns and verbs that the files have, 97 %."""


@checked
def multiply_quantified(folder: str | Path) -> CausalModel:
    """Return the causal model of whether "every sad actor doesnot eat some cake" entails another such sentence.

    Inputs are the nine words of each sentence, as numbers in `vocabulary(folder)`: `premise_subject_noun`,
    `hypothesis_verb` and so on. Inner variables are relations (0 to 6, in the order of RELATIONS) between phrases of
    premise and hypothesis; the answer is 0 entailment, 1 contradiction, 2 neutral. All are computed from what words
    mean: an adjective narrows its noun and an adverb its verb, different words have nothing to do with each other, and
    every phrase is true of something, so that "every" entails "some". "doesnot" negates the verb with its object.

    A network is fed `input_ids` and `attention_mask`, `[batch, 21]`: [CLS] premise [SEP] hypothesis [SEP], a token a
    word. Positions are named as the inputs, and "[CLS]".

    Sentences are drawn anew, distributed as in the files (a third of each label), rather than taken from there: so
    the supply of pairs of base and source has no end, and no network learns their answers by heart. The rows of the
    files are `rows(folder, "test")`.

    Args:
        folder: of mqnli_train.jsonl, or .jsonl.gz, whose words are the vocabulary.

    Geiger, Cases, Karttunen, Potts 2019 (arXiv:1911.00811); Geiger, Richardson, Potts 2020 (arXiv:2004.14623).

    Raises:
        DistillError: no such folder or file, a row without nine words a sentence, an unknown determiner, no modifiers.
    """
    domains = domains_of(words_of_slots(Path(folder)))

    def sample(n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return _balance(n, lambda size: _draw_pairs(size, domains, generator), model.answers, generator)

    model = CausalModel(
        inputs={name: domains[slot_of(name)] for name in INPUTS},
        mechanisms={name: _mechanism(*given) for name, given in GRAPH.items()},
        output="answer",
        encode=_encode,
        sample=sample,
        domains={**dict.fromkeys(NODES, range(len(RELATIONS))), "answer": range(len(LABELS))},
        positions={
            "[CLS]": _position(0),
            **{name: _position(1 + i + i // len(SLOTS)) for i, name in enumerate(INPUTS)},
        },
    )
    return model


def vocabulary(folder: str | Path) -> tuple[str, ...]:
    """Return the words in the order of their numbers.

    [PAD], [CLS], [SEP], the words that every sentence is built with, then those of the training file.

    Raises:
        DistillError: as `multiply_quantified`.
    """
    return tuple(number_words(words_of_slots(Path(folder))))


def rows(folder: str | Path, split: str) -> dict[str, Tensor]:
    """Return the values of all variables that a file states, `[rows]` each: inputs, relations, and the answer.

    `split` is "train", "dev" or "test". The causal model computes the same from the inputs.

    Raises:
        DistillError: as `multiply_quantified`, and for words that the training file lacks, relations and labels.
    """
    words = words_of_slots(Path(folder))
    domains = domains_of(words)
    path, table = read_split(Path(folder), split)
    found = {}
    for name, column in columns_of(path, table).items():
        places = places_of(path, name, column, words[slot_of(name)])
        found[name] = torch.tensor(domains[slot_of(name)])[places]
    for name, node in NODES.items():
        relations = [nodes.get(node) if isinstance(nodes := row.get("nodes"), dict) else None for row in table]
        found[name] = places_of(path, node, relations, tuple(RELATIONS))
    return {**found, "answer": places_of(path, "gold_label", [row.get("gold_label") for row in table], LABELS)}


def _phrase(modifier: Tensor, other_modifier: Tensor, head: Tensor, other_head: Tensor) -> Tensor:
    """Return the relation of a premise's noun with its adjective, or verb with its adverb, to the hypothesis's."""
    equivalent, entails, reverse, *_, independent = range(len(RELATIONS))
    relation = torch.where(other_modifier == KNOWN.index(ABSENT), entails, independent)
    relation = torch.where(modifier == KNOWN.index(ABSENT), reverse, relation)
    relation = torch.where(modifier == other_modifier, equivalent, relation)
    return torch.where(head == other_head, relation, independent)


def _quantified(premise: Tensor, hypothesis: Tensor, noun: Tensor, predicate: Tensor) -> Tensor:
    """Return the relation of two phrases quantified by "some" or "every", which "no" and "notevery" negate later."""
    first, second = ((determiner - SOME) % 2 for determiner in (premise, hypothesis))
    return quantifier_table(noun.device)[first, second, noun, predicate]


def _denied(premise: Tensor, hypothesis: Tensor, relation: Tensor) -> Tensor:
    """Return the relation after negation by determiners: "no" is not "some", "notevery" is not "every"."""
    first, second = ((determiner - SOME) // 2 for determiner in (premise, hypothesis))
    return negation_table(relation.device)[first, second, relation]


def _negated(premise: Tensor, hypothesis: Tensor, relation: Tensor) -> Tensor:
    """Return the relation after negation by "doesnot"."""
    first, second = ((word == KNOWN.index(NEGATION)).long() for word in (premise, hypothesis))
    return negation_table(relation.device)[first, second, relation]


def _label(relation: Tensor) -> Tensor:
    """Return the answer for the relation between the sentences."""
    return label_table(relation.device)[relation]


GRAPH: dict[str, tuple[Callable[..., Tensor], *tuple[str, ...]]] = {
    "vp": (_phrase, "adverb", "verb"),
    "object_np": (_phrase, "object_adjective", "object_noun"),
    "subject_np": (_phrase, "subject_adjective", "subject_noun"),
    "object_dp": (_quantified, "object_determiner", "object_np", "vp"),
    "negated_object_dp": (_denied, "object_determiner", "object_dp"),
    "negated_vp": (_negated, "negation", "negated_object_dp"),
    "subject_dp": (_quantified, "subject_determiner", "subject_np", "negated_vp"),
    "negated_subject_dp": (_denied, "subject_determiner", "subject_dp"),
    "answer": (_label, "negated_subject_dp"),
}
"""For each variable its function and arguments: a slot stands for the words of both sentences there."""


def _mechanism(function: Callable[..., Tensor], *given: str) -> Callable[..., Tensor]:
    """Return the mechanism that calls a function of `GRAPH` with its arguments by name: its parents."""
    sides = [[f"premise_{name}", f"hypothesis_{name}"] if name in SLOTS else [name] for name in given]
    names = [name for side in sides for name in side]

    def mechanism(**parents: Tensor) -> Tensor:
        return function(*(parents[name] for name in names))

    mechanism.__name__ = function.__name__.strip("_")
    parameters = [Parameter(name, Parameter.KEYWORD_ONLY) for name in names]
    mechanism.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return mechanism


def _encode(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return [CLS] premise [SEP] hypothesis [SEP] as `input_ids` and `attention_mask`, `[batch, 21]`."""
    words = torch.stack([values[name] for name in INPUTS], 1).long()
    start, end = (words.new_full((len(words), 1), SPECIAL.index(token)) for token in ("[CLS]", "[SEP]"))
    ids = torch.cat([start, words[:, : len(SLOTS)], end, words[:, len(SLOTS) :], end], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _position(place: int) -> Callable[[dict[str, Tensor]], Tensor]:
    """Return a function that gives this position for every example, `[batch]`."""
    return lambda values: torch.full_like(values[INPUTS[0]], place, dtype=torch.long)


def _balance(
    n: int,
    draw: Callable[[int], dict[str, Tensor]],
    answers: Callable[[dict[str, Tensor]], Tensor],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Draw `n` examples whose labels are uniform: each label is drawn first, then an example that has it."""
    wanted = torch.randint(len(LABELS), (n,), generator=generator, device=generator.device)
    chosen = draw(n)
    missing = answers(chosen) != wanted
    while bool(missing.any()):
        pool = draw(8 * n)
        found = answers(pool)
        for answer in range(len(LABELS)):
            there = (found == answer).nonzero()[:, 0]
            here = (missing & (wanted == answer)).nonzero()[: len(there), 0]
            for name, values in pool.items():
                chosen[name][here] = values[there[: len(here)]]
            missing[here] = False
    return chosen


def _draw_pairs(n: int, domains: dict[str, list[int]], generator: torch.Generator) -> dict[str, Tensor]:
    """Draw `n` pairs of sentences of any label; nouns and verbs are mostly the same in both."""
    tossed = _draw_below(1000, n, generator) < 1000 * UNRELATED
    found: dict[str, Tensor] = {}
    for slot, domain in domains.items():
        first, second = _draw_two(len(domain), n, generator)
        if slot in FIXED:
            second = _draw_below(len(domain), n, generator)
        elif slot in MODIFIERS:
            first, second = _draw_modifiers(len(domain), n, generator)
        else:
            second = torch.where(tossed & (_draw_below(2, n, generator) == 0), second, first)
        words = torch.tensor(domain, device=generator.device)
        found |= {f"premise_{slot}": words[first], f"hypothesis_{slot}": words[second]}
    return found


def _draw_modifiers(count: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw the modifiers of both sentences among `count` words, the first of which is "absent".

    In four equally likely ways: the same in both, one in the hypothesis alone, one in the premise alone, two different.
    """
    first, second = (1 + word for word in _draw_two(count - 1, n, generator))
    same, absent = _draw_below(count, n, generator), torch.zeros_like(first)
    kind = _draw_below(4, n, generator)[None]
    premise = torch.stack([same, absent, first, first]).gather(0, kind)[0]
    return premise, torch.stack([same, second, absent, second]).gather(0, kind)[0]


def _draw_two(count: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw two numbers below `count`, `[n]` each, which differ unless `count` is 1."""
    first = _draw_below(count, n, generator)
    return first, (first + 1 + _draw_below(max(count - 1, 1), n, generator)) % count


def _draw_below(high: int, n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(high, (n,), generator=generator, device=generator.device)
