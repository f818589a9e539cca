from collections import Counter, defaultdict
from random import Random

import pytest
import torch
from rich.console import Console

import distill
from distill.networks import LSTMClassifier, TransformerClassifier
from distill.tasks import agreement

NUMBER = {noun: number for pair in agreement.NOUNS for number, noun in enumerate(pair)}
LEMMA = {noun: lemma for lemma, pair in enumerate(agreement.NOUNS) for noun in pair}


@pytest.fixture(scope="module")
def task():
    return agreement.task()


def sentences(rows):
    return [([agreement.VOCABULARY[i] for i in row["input_ids"].tolist()], int(row["labels"])) for row in rows]


def subject(words):
    """The first noun of the main clause, which an opening phrase may precede, ended by a comma."""
    clause = words[words.index(",") + 1 :] if "," in words else words
    return next(word for word in clause if word in NUMBER)


def nouns(words):
    return [word for word in words if word in NUMBER]


@pytest.fixture(scope="module")
def test_sentences(task):
    return sentences(task.test)


@pytest.fixture(scope="module")
def train_sentences(task):
    return sentences(task.train)


def test_every_label_is_the_number_of_the_subject(train_sentences, test_sentences):
    assert all(NUMBER[subject(words)] == label for words, label in train_sentences + test_sentences)


def test_labels_are_balanced_and_sentences_disjoint(task, train_sentences, test_sentences):
    assert task.majority == 0.5
    assert sum(label for _, label in train_sentences) == len(train_sentences) / 2
    train, test = ({tuple(words) for words, _ in part} for part in (train_sentences, test_sentences))
    assert not train & test
    assert (len(train), len(test)) == (20_000, 2_000)


def test_half_of_the_test_sentences_pair_nouns_as_no_training_sentence_does(train_sentences, test_sentences):
    def pairs(words):
        return {(LEMMA[subject(words)], LEMMA[noun]) for noun in nouns(words) if noun != subject(words)}

    seen = set().union(*(pairs(words) for words, _ in train_sentences))
    assert not any(agreement.held_out(*pair) for pair in seen)
    several = [words for words, _ in test_sentences if len(nouns(words)) > 1]
    assert sum(bool(pairs(words) - seen) for words in several) / len(several) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("place", [0, -1], ids=["first", "nearest to the verb"])
def test_neither_the_first_nor_the_nearest_noun_solves_it(train_sentences, place):
    right = sum(NUMBER[nouns(words[: words.index("[MASK]")])[place]] == label for words, label in train_sentences)
    assert right / len(train_sentences) < 0.7


def test_each_distractor_agrees_as_often_as_not(train_sentences):
    agree = defaultdict(list)
    for words, label in train_sentences:
        others = [noun for noun in nouns(words) if noun != subject(words)]
        for place, noun in enumerate(others):
            agree[len(others), place].append(NUMBER[noun] == label)
    assert len(agree) == 1 + 2 + 3 + 4 + 5
    for found in agree.values():
        assert sum(found) / len(found) == pytest.approx(0.5, abs=5 * 0.5 / len(found) ** 0.5)


def test_the_best_rule_that_counts_nouns_and_plurals_fails(train_sentences):
    table = defaultdict(Counter)
    for words, label in train_sentences:
        found = nouns(words)
        table[len(found), sum(NUMBER[noun] for noun in found)][label] += 1
    assert sum(max(counts.values()) for counts in table.values()) / len(train_sentences) < 0.72
    for (total, plural), counts in table.items():
        if 0 < plural < total:
            assert counts[1] / counts.total() == pytest.approx(0.5, abs=5 * 0.5 / counts.total() ** 0.5)


def test_no_word_but_a_noun_leans_to_either_label(train_sentences):
    counts = defaultdict(Counter)
    for words, label in train_sentences:
        for word in set(words) - set(NUMBER):
            counts[word][label] += 1
    for word, found in counts.items():
        assert found[1] / found.total() == pytest.approx(0.5, abs=5 * 0.5 / found.total() ** 0.5), word


def test_special_tokens_are_marked_and_rows_are_ragged(task):
    row = task.test[0]
    names = [agreement.VOCABULARY[i] for i in row["input_ids"].tolist()]
    assert row["special_tokens_mask"].tolist() == [int(name.startswith("[")) for name in names]
    assert (names[0], names[-1], names.count("[MASK]")) == ("[CLS]", "[SEP]", 1)
    batch = task.test.batch(range(64))
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (batch["input_ids"][padding] == agreement.IDS["[PAD]"]).all()
    assert (batch["special_tokens_mask"][padding] == 1).all()


def test_the_data_are_the_same_every_time(task):
    again = agreement.task()
    for one, other in ((task.train, again.train), (task.test, again.test)):
        assert torch.equal(torch.cat(list(one.table["input_ids"])), torch.cat(list(other.table["input_ids"])))


def test_vocabulary_has_each_word_once_and_every_length_fits(task):
    assert len(set(agreement.VOCABULARY)) == len(agreement.VOCABULARY)
    network = task.network(0).eval()
    assert max(map(len, task.train.table["input_ids"])) <= network.config.max_position_embeddings
    batch = task.test.batch([0, 1, 2])
    batch.pop("special_tokens_mask")
    assert network(**batch).logits.shape == (3, 2)


@pytest.mark.parametrize("kind", [LSTMClassifier, TransformerClassifier])
def test_plain_networks_read_it_and_learn_it(task, kind):
    torch.manual_seed(0)
    model = kind(len(agreement.VOCABULARY), len(agreement.CLASSES), width=32)
    assert 0.4 < distill.accuracy(model, task.test.take(range(200))).value < 0.6
    given = dict(objective=distill.Labels(), batch_size=32, lr=1e-2, console=Console(quiet=True))
    fitted = distill.fit(None, model, data=task.train.take(range(64)), steps=60, **given)
    assert fitted.records[-1].loss < 0.25
    assert distill.accuracy(model, task.train.take(range(64))).value > 0.9


def test_a_sentence_follows_its_generator():
    assert agreement.sentence(True, False, Random(5)) == agreement.sentence(True, False, Random(5))
    assert NUMBER[subject(agreement.sentence(True, True, Random(5)))] == 1
