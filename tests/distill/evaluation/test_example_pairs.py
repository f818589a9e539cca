import pytest
import torch

from distill import InContext, Rows, Shuffle
from distill.evaluation.example_pairs import _numbered, examples_of_rows, joined_examples
from tests.distill.tiny_models import VOCABULARY, text


def drawn(sources, pairs=17, seed=0, rows=7):
    return examples_of_rows(text(rows), pairs, sources, VOCABULARY, seed)


def columns(rows):
    return {name: [row.tolist() for row in column] for name, column in rows.table.items()}


@pytest.mark.parametrize("sources", [Shuffle(), InContext(0.4)])
def test_pairs_share_what_their_numbers_say(sources):
    examples, rows = drawn(sources), columns(text(7))
    for column, values in columns(examples.base).items():
        assert values == [rows[column][i] for i in examples.sharing.base.tolist()]
    if isinstance(sources, Shuffle):
        for column, values in columns(examples.source).items():
            assert values == [rows[column][i] for i in examples.sharing.source.tolist()]
    else:
        assert len(examples.sharing.source.unique()) == 17  # each source was made for its pair alone
        assert int(examples.sharing.source.min()) == 7


@pytest.mark.parametrize("sources", [Shuffle(), InContext(0.4)])
def test_pairs_taken_apart_and_joined_are_the_pairs(sources):
    examples = drawn(sources)
    parts = [examples.take(torch.tensor(places)) for places in ([0, 1, 2], [3], list(range(4, 17)))]
    found = joined_examples(parts)
    assert columns(found.base) == columns(examples.base)
    assert columns(found.source) == columns(examples.source)
    assert torch.equal(found.numbers, examples.numbers)
    assert torch.equal(found.sharing.base, examples.sharing.base)
    assert torch.equal(found.sharing.source, examples.sharing.source)


def test_sources_that_were_made_in_two_rounds_are_not_shared():
    rounds = [_numbered(drawn(InContext(0.4), seed=seed), first, 7) for seed, first in ((0, 0), (1, 17))]
    found = joined_examples(rounds)
    assert len(found.sharing.source.unique()) == 34
    assert found.numbers.tolist() == list(range(34))
    rounds = [_numbered(drawn(Shuffle(), seed=seed), first, 7) for seed, first in ((0, 0), (1, 17))]
    assert int(joined_examples(rounds).sharing.source.max()) < 7


@pytest.mark.parametrize("ragged", [True, False])
def test_rows_of_several_lengths_are_joined(ragged):
    widths = (4, 6 if ragged else 4)
    even = [Rows({"input_ids": torch.full((5, n), n), "attention_mask": torch.ones(5, n).long()}) for n in widths]
    joined = joined_examples([examples_of_rows(each, 6, Shuffle(), VOCABULARY, 0) for each in even]).base
    assert isinstance(joined.table["input_ids"], torch.Tensor) is not ragged
    assert [row.tolist() for row in joined.table["input_ids"]] == [[n] * n for n in widths for _ in range(6)]


def test_clusters_of_rows_go_into_what_pairs_share():
    made_of = torch.tensor([[0, 1], [1, 2], [2, 3], [3, -1], [4, -1]])
    rows = Rows({"inputs": torch.arange(5.0)[:, None]}, clusters=made_of)
    found = examples_of_rows(rows, 12, Shuffle(), None, 0).sharing
    assert torch.equal(found.base_clusters, made_of[found.base])
    assert torch.equal(found.source_clusters, made_of[found.source])
