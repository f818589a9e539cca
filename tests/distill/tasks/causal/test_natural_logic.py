"""The relations of natural logic against models of few individuals, and their labels by hand."""

from itertools import combinations_with_replacement, product

import pytest

from distill.tasks.causal.natural_logic import RELATIONS, label, negated, quantified


def true(determiner, nouns, predicates):
    """A sentence of a model: for each individual, whether it is an N and whether it V."""
    of_nouns = [v for n, v in zip(nouns, predicates, strict=True) if n]
    return any(of_nouns) if determiner == "some" else all(of_nouns)


@pytest.mark.parametrize(("premise", "hypothesis"), list(product(("some", "every"), repeat=2)))
def test_quantifiers_relate_as_in_all_models_of_up_to_four_individuals(premise, hypothesis):
    for noun, predicate in product(RELATIONS.values(), repeat=2):
        found = set()
        for individuals in combinations_with_replacement(list(product(noun, predicate)), 4):
            (n, m), (v, w) = (zip(*each, strict=True) for each in zip(*individuals, strict=True))
            if any(n) and any(m):
                found.add((true(premise, n, v), true(hypothesis, m, w)))
        assert quantified(premise, hypothesis, noun, predicate) == found
        assert found in RELATIONS.values()


def test_negation_relates_what_is_not():
    for relation, *sides in product(RELATIONS.values(), (False, True), (False, True)):
        expected = {tuple(not t if no else t for t, no in zip(truths, sides, strict=True)) for truths in relation}
        assert negated(relation, *sides) == expected
        assert expected in RELATIONS.values()


def test_labels_of_relations():
    assert [label(relation) for relation in RELATIONS.values()] == [
        "entailment", "entailment", "neutral", "contradiction", "neutral", "contradiction", "neutral",
    ]  # fmt: skip
