"""Natural logic: which relation holds between two phrases, and what negation and quantifiers make of it.

A relation R between two phrases is the set of pairs (p, h) of truth values that can occur together, p for "the
premise's phrase is true of this thing" and h for "the hypothesis's phrase is". So "dog" entails "animal" by
R = {(1, 1), (0, 1), (0, 0)}: no thing is a dog and no animal. There are seven such relations. Negating the premise's
phrase maps R to {(1 − p, h)}, and a sentence "some/every N V" relates to another by all pairs of truth values that the
two sentences have in some set of individuals which R(N, N′) and R(V, V′) allow. Premise and hypothesis are an
entailment if (1, 0) is not in R, a contradiction if (1, 1) is not, and neutral otherwise.

MacCartney, Manning 2009 (ACL anthology W09-3714); Geiger, Cases, Karttunen, Potts 2019 (arXiv:1911.00811).
"""

from functools import cache
from itertools import product

import torch
from torch import Tensor

Truths = frozenset[tuple[bool, bool]]
"""A relation: the pairs (true of the premise's phrase, true of the hypothesis's) that can occur together."""

BOTH, PREMISE, HYPOTHESIS, NEITHER = (True, True), (True, False), (False, True), (False, False)
RELATIONS: dict[str, Truths] = {
    "equivalence": frozenset({BOTH, NEITHER}),
    "entails": frozenset({BOTH, HYPOTHESIS, NEITHER}),
    "reverse entails": frozenset({BOTH, PREMISE, NEITHER}),
    "contradiction": frozenset({PREMISE, HYPOTHESIS}),
    "cover": frozenset({BOTH, PREMISE, HYPOTHESIS}),
    "alternation": frozenset({PREMISE, HYPOTHESIS, NEITHER}),
    "independence": frozenset({BOTH, PREMISE, HYPOTHESIS, NEITHER}),
}
"""The relations 0 to 6. MacCartney and Manning call contradiction negation."""
LABELS = ("entailment", "contradiction", "neutral")
"""The answers 0, 1, 2."""


def negated(relation: Truths, premise: bool, hypothesis: bool) -> Truths:
    """Return the relation between two phrases after one of them, or both, are negated.

    >>> negated(RELATIONS["entails"], True, True) == RELATIONS["reverse entails"]
    True
    """
    return frozenset((first != premise, second != hypothesis) for first, second in relation)


def quantified(premise: str, hypothesis: str, noun: Truths, predicate: Truths) -> Truths:
    """Return the relation between "some/every N V" and "some/every N′ V′", from those of N to N′ and of V to V′.

    "some" is true if there is a witness, an N that V, and "every" if there is no N that does not V. So a set of
    individuals matters only by four facts: whether it has a witness for each sentence, whether it has an N, and whether
    it has an N′ (each noun is true of something). All reachable facts are found by adding one individual after another,
    of every kind that the two relations allow.

    >>> quantified("every", "some", RELATIONS["equivalence"], RELATIONS["equivalence"]) == RELATIONS["entails"]
    True
    """
    some = (premise == "some", hypothesis == "some")
    models: set[tuple[bool, ...]] = {(False, False, False, False)}
    for ns, vs in product(noun, predicate):
        witness = [n and v == positive for n, v, positive in zip(ns, vs, some, strict=True)]
        models |= {tuple(map(max, model, (*witness, *ns))) for model in models}
    return frozenset((first == some[0], second == some[1]) for first, second, *nouns in models if all(nouns))


def label(relation: Truths) -> str:
    """Return the label of a premise and a hypothesis that stand in this relation.

    Entailment if the premise is never true without the hypothesis, contradiction if never with it.
    """
    if PREMISE not in relation:
        return "entailment"
    return "neutral" if BOTH in relation else "contradiction"


@cache
def quantifier_table(device: torch.device) -> Tensor:
    """Return the relation between two quantified sentences, `[premise, hypothesis, relation of nouns, of predicates]`.

    The first two axes are 0 for "some" and 1 for "every".
    """
    relations, determiners = RELATIONS.values(), ("some", "every")
    cases = product(determiners, determiners, relations, relations)
    found = [quantified(first, second, noun, predicate) for first, second, noun, predicate in cases]
    return _to_numbers(found).reshape(2, 2, len(RELATIONS), len(RELATIONS)).to(device)


@cache
def negation_table(device: torch.device) -> Tensor:
    """Return the relation after negation, `[premise is negated, hypothesis is negated, relation before]`."""
    found = [negated(relation, *pair) for pair in product((False, True), repeat=2) for relation in RELATIONS.values()]
    return _to_numbers(found).reshape(2, 2, len(RELATIONS)).to(device)


@cache
def label_table(device: torch.device) -> Tensor:
    """Return the number of the label of each relation, `[relation]`."""
    return torch.tensor([LABELS.index(label(relation)) for relation in RELATIONS.values()], device=device)


def _to_numbers(relations: list[Truths]) -> Tensor:
    order = list(RELATIONS.values())
    return torch.tensor([order.index(relation) for relation in relations])
