"""Subject-verb agreement in sentences of an embedded grammar, for classifiers of a masked verb.

Linzen, Dupoux, Goldberg 2016 (arXiv:1611.01368).
"""

from collections.abc import Sequence
from functools import cache
from random import Random
from typing import Any

import torch
from torch import nn

from distill.data.rows import Rows
from distill.data.task import Recipe, Task, seeded

TRAIN_ROWS, TEST_ROWS = 20_000, 2_000
CLASSES = ("singular", "plural")
NOUNS = tuple(
    tuple(pair.split("/"))
    for pair in (
        "key/keys cabinet/cabinets letter/letters drawer/drawers lamp/lamps table/tables author/authors novel/novels "
        "teacher/teachers pupil/pupils painting/paintings gallery/galleries farmer/farmers horse/horses wagon/wagons "
        "bridge/bridges village/villages river/rivers engine/engines boat/boats sailor/sailors island/islands "
        "baker/bakers oven/ovens "
        "child/children man/men woman/women mouse/mice goose/geese leaf/leaves knife/knives wolf/wolves"
    ).split()
)
DETERMINERS = ("the", "my", "your", "our", "their")
PREPOSITIONS = ("near", "behind", "beside", "with", "under", "from", "above", "across")
# Past tense, so that only the masked verb shows a number.
VERBS = ("liked", "followed", "remembered", "noticed", "avoided", "described", "admired", "passed")
ADVERBS = ("very", "quite", "often", "always", "never", "really")
ADJECTIVES = ("old", "small", "famous", "quiet", "green", "strange", "heavy", "beautiful", "clean", "alone")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = tuple(word for pair in NOUNS for word in pair)
VOCABULARY = (*SPECIAL, "that", ",", ".", *DETERMINERS, *PREPOSITIONS, *VERBS, *ADVERBS, *ADJECTIVES, *WORDS)
IDS = {word: i for i, word in enumerate(VOCABULARY)}

Sentence = tuple[str, ...]


def task() -> Task:
    """Return the task of subject-verb agreement: deciding whether a masked verb is singular or plural.

    Between the verb and its subject stand 0 to 3 attractors. A row is a sentence of an embedded grammar, one token a
    word: `[CLS] near your boats , the keys to ... [MASK] very old . [SEP]`. See `sentence` for the reason why neither
    the nearest nor the first noun, nor the count of plural nouns, predicts the answer. No sentence is in both train and
    test, and half of the test rows with a distractor pair their subject with a noun that it has in no training row.

    The task is that of Linzen, Dupoux, Goldberg 2016 (arXiv:1611.01368); the grammar is this project's.
    """
    seen: set[Sentence] = set()
    train = _draw_sentences(TRAIN_ROWS, seen, Random(0), novel=0.0)
    test = _draw_sentences(TEST_ROWS, seen, Random(1), novel=0.5)
    return Task(
        name="agreement",
        train=rows(train),
        test=rows(test),
        classes=CLASSES,
        network=network,
        recipe=Recipe(steps=600, batch_size=64, lr=1e-3, warmup=0.1, weight_decay=0.01),
        description="Subject-verb agreement: is the masked verb singular or plural, whatever nouns stand between?",
        show=lambda row: " ".join(
            VOCABULARY[i] for i in row["input_ids"].tolist() if i not in (IDS["[CLS]"], IDS["[SEP]"])
        ),
    )


def sentence(plural: bool, novel: bool, random: Random) -> Sentence:
    """Draw a sentence.

    Between subject and verb stand 0 to 3 attractors (with weights 1, 3, 3, 3), in prepositional phrases and relative
    clauses; before the subject stand 0 to 2 more distractors, in an opening phrase. The number of distractors that
    agree with the subject is uniform over 0 to all. So each agrees half of the time, and for every number of nouns and
    of plural nouns both answers are equally likely, except if all nouns agree. Adjectives move the subject's place.

    Args:
        plural: whether the subject is plural.
        novel: whether it has a pair of nouns that is held out from training.
        random: the generator.
    """
    attractors = random.choices((0, 1, 2, 3), weights=(1, 3, 3, 3))[0]
    before = random.choice((0, 1, 2))
    subject, distractors = _draw_lemmas(attractors + before, novel, random)
    agreeing = random.randint(0, len(distractors))
    numbers = [plural] * agreeing + [not plural] * (len(distractors) - agreeing)
    random.shuffle(numbers)
    phrases = [_draw_phrase(NOUNS[lemma][number], random) for lemma, number in zip(distractors, numbers, strict=True)]
    opening = [word for phrase in phrases[:before] for word in (random.choice(PREPOSITIONS), *phrase)]
    comma = [","] if before else []
    modifiers = [word for phrase in phrases[before:] for word in _draw_modifier(phrase, random)]
    ending = (random.choice(ADVERBS), random.choice(ADJECTIVES), ".")
    return (*opening, *comma, *_draw_phrase(NOUNS[subject][plural], random), *modifiers, "[MASK]", *ending)


def held_out(subject: int, distractor: int) -> bool:
    """Return whether two nouns (places in NOUNS) are never paired in training: one distractor in eight a subject."""
    return (subject * 3 + distractor) % 8 == 0


def rows(sentences: Sequence[tuple[Sentence, int]]) -> Rows:
    """Return sentences and their labels as rows of token ids, of different lengths."""
    ids = [torch.tensor([IDS[word] for word in ("[CLS]", *words, "[SEP]")]) for words, _ in sentences]
    special = torch.arange(len(VOCABULARY)) < len(SPECIAL)
    return Rows(
        {
            "input_ids": ids,
            "attention_mask": [torch.ones_like(row) for row in ids],
            "special_tokens_mask": [special[row].long() for row in ids],
            "labels": torch.tensor([label for _, label in sentences]),
        },
        pad_id=IDS["[PAD]"],
    )


def network(seed: int) -> nn.Module:
    """Return an untrained BERT that classifies from its first token, `[CLS]`."""
    from transformers import BertConfig, BertForSequenceClassification

    settings: dict[str, Any] = dict(
        vocab_size=len(VOCABULARY),
        id2label=dict(enumerate(CLASSES)),
        label2id={name: i for i, name in enumerate(CLASSES)},
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        # BERT's 0.02 suits a width of 768; at this width some seeds then leave their plateau too late, or never.
        initializer_range=0.06,
        pad_token_id=IDS["[PAD]"],
    )
    return seeded(seed, lambda: BertForSequenceClassification(BertConfig(**settings)))


def _draw_sentences(count: int, seen: set[Sentence], random: Random, novel: float) -> list[tuple[Sentence, int]]:
    """Draw `count` new sentences, as many singular as plural, in random order; add them to `seen`."""
    found: list[tuple[Sentence, int]] = []
    while len(found) < count:
        label = len(found) % 2
        words = sentence(bool(label), random.random() < novel, random)
        if words not in seen:
            seen.add(words)
            found.append((words, label))
    random.shuffle(found)
    return found


def _draw_lemmas(count: int, novel: bool, random: Random) -> tuple[int, list[int]]:
    """Draw a subject and `count` distractors, all different."""
    subject = random.randrange(len(NOUNS))
    distractors = random.sample(_partners(subject, novel=False), count)
    if novel and count:
        distractors[random.randrange(count)] = random.choice(_partners(subject, novel=True))
    return subject, distractors


@cache
def _partners(subject: int, novel: bool) -> tuple[int, ...]:
    return tuple(lemma for lemma in range(len(NOUNS)) if lemma != subject and held_out(subject, lemma) == novel)


def _draw_phrase(noun: str, random: Random) -> Sentence:
    adjective = (random.choice(ADJECTIVES),) if random.random() < 0.3 else ()
    return (random.choice(DETERMINERS), *adjective, noun)


def _draw_modifier(phrase: Sentence, random: Random) -> Sentence:
    verb = random.choice(VERBS)
    return random.choice(((random.choice(PREPOSITIONS), *phrase), ("that", *phrase, verb), ("that", verb, *phrase)))
