"""Natural language inference with several quantifiers, as a causal model: natural logic over two parsed sentences."""

from collections.abc import Callable, Sequence
from functools import cache
from inspect import Parameter, Signature
from itertools import product
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from distill.causal.model import CausalModel
from distill.data.files import read
from distill.errors import DistillError, checked

Truths = frozenset[tuple[bool, bool]]
SPLITS = ("train", "dev", "test")

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
"""The relations 0 to 6, each as what can be true of one thing: the premise's phrase, the hypothesis's, both, neither.

MacCartney, Manning 2009 (W09-3714), who call contradiction negation.
"""
LABELS = ("entailment", "contradiction", "neutral")
"""The answers 0, 1, 2."""
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
"""The inner variables, and what the files call them; GRAPH has what each is computed from."""
SPECIAL, ABSENT, NEGATION = ("[PAD]", "[CLS]", "[SEP]"), "emptystring", "doesnot"
DETERMINERS = ("some", "every", "no", "notevery")
"""The last two are the first two, negated."""
KNOWN = (*SPECIAL, ABSENT, NEGATION, *DETERMINERS)
"""The words 0 to 8 of every vocabulary."""
SOME = KNOWN.index("some")
SLOTS = (
    *("subject_determiner", "subject_adjective", "subject_noun"),
    *("negation", "adverb", "verb"),
    *("object_determiner", "object_adjective", "object_noun"),
)
"""The nine words of a sentence."""
FIXED = {"subject_determiner": DETERMINERS, "negation": (ABSENT, NEGATION), "object_determiner": DETERMINERS}
MODIFIERS = ("subject_adjective", "adverb", "object_adjective")
EXAMPLE = "every sad actor doesnot emptystring eat some emptystring cake"
UNRELATED = 0.15
"""The share of drawn pairs whose nouns and verb differ by the toss of a coin each, before labels are balanced.

It gives the share of equal nouns and verbs that the files have, 97 %."""
SENTENCES = ("sentence1", "sentence2")
INPUTS = tuple(f"{side}_{slot}" for side in ("premise", "hypothesis") for slot in SLOTS)


@checked
def multiply_quantified(folder: str | Path) -> CausalModel:
    """Does "every sad actor doesnot eat some cake" entail another such sentence, contradict it, or neither?

    Inputs are the nine words of each sentence, as numbers in `vocabulary(folder)`: `premise_subject_noun`,
    `hypothesis_verb` and so on. Inner variables are relations (0 to 6, in the order of RELATIONS) between phrases of
    premise and hypothesis; the answer is 0 entailment, 1 contradiction, 2 neutral. All are computed from what words
    mean: an adjective narrows its noun and an adverb its verb, different words have nothing to do with each other, and
    every phrase is true of something, so that "every" entails "some". "doesnot" negates the verb with its object.

    A network is fed `input_ids` and `attention_mask`, `[batch, 21]`: [CLS] premise [SEP] hypothesis [SEP], a token a
    word. Positions are named as the inputs, and "[CLS]".

    Sentences are drawn anew, distributed as in the files (a third of each label), rather than taken from there: so
    there is no end of pairs of base and source, and no network learns their answers by heart. The files' own rows are
    `rows(folder, "test")`.

    Args:
        folder: of mqnli_train.jsonl, or .jsonl.gz, which says what words there are.

    Geiger, Cases, Karttunen, Potts 2019 (arXiv:1911.00811); Geiger, Richardson, Potts 2020 (arXiv:2004.14623).

    Raises:
        DistillError: no such folder or file, a row without nine words a sentence, an unknown determiner, no modifiers.
    """
    domains = _domains(_words(Path(folder)))

    def sample(n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return _balanced(n, lambda size: _drawn(size, domains, generator), model.answers, generator)

    model = CausalModel(
        inputs={name: domains[_slot(name)] for name in INPUTS},
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
    """The words by their numbers: [PAD], [CLS], [SEP], what every sentence is built with, then the training file's.

    Raises:
        DistillError: as `multiply_quantified`.
    """
    return tuple(_numbers(_words(Path(folder))))


def rows(folder: str | Path, split: str) -> dict[str, Tensor]:
    """A file's own values of all variables, `[rows]` each: inputs, the relation at each node, and the answer.

    `split` is "train", "dev" or "test". The causal model computes the same from the inputs.

    Raises:
        DistillError: as `multiply_quantified`, and for words that the training file lacks, relations and labels.
    """
    words = _words(Path(folder))
    domains = _domains(words)
    path, table = _read(Path(folder), split)
    found = {}
    for name, column in _columns(path, table).items():
        places = _places(path, name, column, words[_slot(name)])
        found[name] = torch.tensor(domains[_slot(name)])[places]
    for name, node in NODES.items():
        relations = [nodes.get(node) if isinstance(nodes := row.get("nodes"), dict) else None for row in table]
        found[name] = _places(path, node, relations, tuple(RELATIONS))
    return {**found, "answer": _places(path, "gold_label", [row.get("gold_label") for row in table], LABELS)}


def negated(relation: Truths, premise: bool, hypothesis: bool) -> Truths:
    """The relation between two phrases of which one, or both, are negated.

    >>> negated(RELATIONS["entails"], True, True) == RELATIONS["reverse entails"]
    True
    """
    return frozenset((first != premise, second != hypothesis) for first, second in relation)


def quantified(premise: str, hypothesis: str, noun: Truths, predicate: Truths) -> Truths:
    """The relation between "some/every N V" and "some/every N′ V′", from those of N to N′ and of V to V′.

    "some" is true if there is a witness, an N that V, and "every" if there is none that does not. So all that matters
    of a model is whether it has the witnesses of each sentence, an N and an N′ (each true of something), and what can
    be is reached by adding one individual after another, of any kind that the two relations allow.

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
    """Entailment if no premise is true without its hypothesis, contradiction if not with it."""
    if PREMISE not in relation:
        return "entailment"
    return "neutral" if BOTH in relation else "contradiction"


def _phrase(modifier: Tensor, other_modifier: Tensor, head: Tensor, other_head: Tensor) -> Tensor:
    """The relation of a noun and its adjective, or a verb and its adverb, to the hypothesis's (`other`)."""
    equivalent, entails, reverse, *_, independent = range(len(RELATIONS))
    relation = torch.where(other_modifier == KNOWN.index(ABSENT), entails, independent)
    relation = torch.where(modifier == KNOWN.index(ABSENT), reverse, relation)
    relation = torch.where(modifier == other_modifier, equivalent, relation)
    return torch.where(head == other_head, relation, independent)


def _quantified(premise: Tensor, hypothesis: Tensor, noun: Tensor, predicate: Tensor) -> Tensor:
    first, second = ((determiner - SOME) % 2 for determiner in (premise, hypothesis))
    return _quantifiers(noun.device)[first, second, noun, predicate]


def _denied(premise: Tensor, hypothesis: Tensor, relation: Tensor) -> Tensor:
    """Negated by determiners: "no" is not "some", "notevery" is not "every"."""
    first, second = ((determiner - SOME) // 2 for determiner in (premise, hypothesis))
    return _negations(relation.device)[first, second, relation]


def _negated(premise: Tensor, hypothesis: Tensor, relation: Tensor) -> Tensor:
    """Negated by "doesnot"."""
    first, second = ((word == KNOWN.index(NEGATION)).long() for word in (premise, hypothesis))
    return _negations(relation.device)[first, second, relation]


def _label(relation: Tensor) -> Tensor:
    return _labels(relation.device)[relation]


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
"""Each variable from words of both sentences, by their slot, and from other variables."""


def _mechanism(function: Callable[..., Tensor], *given: str) -> Callable[..., Tensor]:
    """A function of positions as one of the variables that it is given."""
    sides = [[f"premise_{name}", f"hypothesis_{name}"] if name in SLOTS else [name] for name in given]
    names = [name for side in sides for name in side]

    def mechanism(**parents: Tensor) -> Tensor:
        return function(*(parents[name] for name in names))

    mechanism.__name__ = function.__name__.strip("_")
    parameters = [Parameter(name, Parameter.KEYWORD_ONLY) for name in names]
    mechanism.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return mechanism


@cache
def _quantifiers(device: torch.device) -> Tensor:
    """`[premise's, hypothesis's, relation of nouns, relation of predicates]`, 0 for "some" and 1 for "every"."""
    relations, determiners = RELATIONS.values(), ("some", "every")
    cases = product(determiners, determiners, relations, relations)
    found = [quantified(first, second, noun, predicate) for first, second, noun, predicate in cases]
    return _numbered(found).reshape(2, 2, len(RELATIONS), len(RELATIONS)).to(device)


@cache
def _negations(device: torch.device) -> Tensor:
    """`[premise negated, hypothesis negated, relation]`."""
    found = [negated(relation, *pair) for pair in product((False, True), repeat=2) for relation in RELATIONS.values()]
    return _numbered(found).reshape(2, 2, len(RELATIONS)).to(device)


@cache
def _labels(device: torch.device) -> Tensor:
    """`[relation]`."""
    return torch.tensor([LABELS.index(label(relation)) for relation in RELATIONS.values()], device=device)


def _numbered(relations: list[Truths]) -> Tensor:
    order = list(RELATIONS.values())
    return torch.tensor([order.index(relation) for relation in relations])


def _encode(values: dict[str, Tensor]) -> dict[str, Tensor]:
    words = torch.stack([values[name] for name in INPUTS], 1).long()
    start, end = (words.new_full((len(words), 1), SPECIAL.index(token)) for token in ("[CLS]", "[SEP]"))
    ids = torch.cat([start, words[:, : len(SLOTS)], end, words[:, len(SLOTS) :], end], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _position(place: int) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda values: torch.full_like(values[INPUTS[0]], place, dtype=torch.long)


def _slot(name: str) -> str:
    """Of an input."""
    return name.split("_", 1)[1]


def _balanced(
    n: int,
    draw: Callable[[int], dict[str, Tensor]],
    answers: Callable[[dict[str, Tensor]], Tensor],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """`n` of the examples that `draw` draws, of a label each that is drawn first, one as likely as the others."""
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


def _drawn(n: int, domains: dict[str, list[int]], generator: torch.Generator) -> dict[str, Tensor]:
    """Pairs of sentences of any label; nouns and verbs are mostly the same in both."""
    tossed = _integers(1000, n, generator) < 1000 * UNRELATED
    found: dict[str, Tensor] = {}
    for slot, domain in domains.items():
        first, second = _two(len(domain), n, generator)
        if slot in FIXED:
            second = _integers(len(domain), n, generator)
        elif slot in MODIFIERS:
            first, second = _modifiers(len(domain), n, generator)
        else:
            second = torch.where(tossed & (_integers(2, n, generator) == 0), second, first)
        words = torch.tensor(domain, device=generator.device)
        found |= {f"premise_{slot}": words[first], f"hypothesis_{slot}": words[second]}
    return found


def _modifiers(count: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Of `count` words, the first absent: the same one, one in the hypothesis or premise alone, or two different."""
    first, second = (1 + word for word in _two(count - 1, n, generator))
    same, absent = _integers(count, n, generator), torch.zeros_like(first)
    kind = _integers(4, n, generator)[None]
    premise = torch.stack([same, absent, first, first]).gather(0, kind)[0]
    return premise, torch.stack([same, second, absent, second]).gather(0, kind)[0]


def _two(count: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two numbers below `count`, which differ if they can."""
    first = _integers(count, n, generator)
    return first, (first + 1 + _integers(max(count - 1, 1), n, generator)) % count


def _integers(high: int, n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(high, (n,), generator=generator, device=generator.device)


def _words(folder: Path) -> dict[str, tuple[str, ...]]:
    """The words of each slot, in the training file."""
    path, table = _read(folder, "train")
    columns, words = _columns(path, table), dict(FIXED)
    for slot in SLOTS:
        found = {*columns[f"premise_{slot}"], *columns[f"hypothesis_{slot}"]} - {ABSENT}
        if slot in MODIFIERS and not found:
            raise DistillError(f"{path} has no {slot} but {ABSENT!r}; add a row with one, as {EXAMPLE!r}.")
        words.setdefault(slot, (*[ABSENT][: slot in MODIFIERS], *sorted(found)))
    for name, column in columns.items():
        _places(path, name, column, words[_slot(name)])
    return words


def _numbers(words: dict[str, tuple[str, ...]]) -> dict[str, int]:
    """The number of each word in the vocabulary."""
    others = {word for found in words.values() for word in found} - set(KNOWN)
    return {word: number for number, word in enumerate((*KNOWN, *sorted(others)))}


def _domains(words: dict[str, tuple[str, ...]]) -> dict[str, list[int]]:
    numbers = _numbers(words)
    return {slot: [numbers[word] for word in found] for slot, found in words.items()}


def _read(folder: Path, split: str) -> tuple[Path, list[dict[str, Any]]]:
    path = _path(folder, split)
    return path, read(path)


def _path(folder: Path, split: str) -> Path:
    if split not in SPLITS:
        raise DistillError(f"there is no split {split!r}; give one of {', '.join(map(repr, SPLITS))}.")
    if not folder.is_dir():
        raise DistillError(f"{folder} is not a folder; give that of mqnli_train.jsonl.gz, as 'data/mqnli'.")
    path = next((path for end in ("", ".gz") if (path := folder / f"mqnli_{split}.jsonl{end}").exists()), None)
    if path is None:
        raise DistillError(
            f"{folder} has no mqnli_{split}.jsonl or mqnli_{split}.jsonl.gz; put it there, or name another folder."
        )
    return path


def _columns(path: Path, table: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The words of each input, by row."""
    found = []
    for number, row in enumerate(table, 1):
        sentences = [given.split() if isinstance(given := row.get(key), str) else [] for key in SENTENCES]
        for key, words in zip(SENTENCES, sentences, strict=True):
            if len(words) != len(SLOTS):
                raise DistillError(
                    f"row {number} of {path} has {len(words)} words as {key}, not {len(SLOTS)}: {row.get(key)!r}; "
                    f"write {EXAMPLE!r}, with {ABSENT!r} for what is absent."
                )
        found.append(sentences[0] + sentences[1])
    return dict(zip(INPUTS, map(list, zip(*found, strict=True)), strict=True))


def _places(path: Path, name: str, column: Sequence[Any], known: tuple[str, ...]) -> Int[Tensor, " rows"]:
    """The place of each value among those that are known."""
    places = {word: place for place, word in enumerate(known)}
    for number, given in enumerate(column, 1):
        if not isinstance(given, str) or given not in places:
            listed = ", ".join(map(repr, known[:7])) + (", …" if len(known) > 7 else "")
            raise DistillError(
                f"row {number} of {path} has an unknown {name}: {given!r}; correct it, to one of {listed}."
            )
    return torch.tensor([places[given] for given in column])
