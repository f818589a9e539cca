import pytest
import torch

from distill import DistillError, InContext, Shuffle, Span
from tests.distill.tiny_models import VOCABULARY, text

RIGHT = torch.tensor(
    [[1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0]]
).bool()
PADDED = {"right": RIGHT, "left": RIGHT.flip(1), "none": torch.ones(3, 10, dtype=torch.bool)}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(rows: int, width: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, 2, width, generator=generator(seed))


def is_contiguous(mask: torch.Tensor) -> bool:
    columns = mask.nonzero()[:, 0]
    return bool(columns[-1] - columns[0] == len(columns) - 1)


@pytest.mark.parametrize("side", PADDED)
@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("consecutive", [True, False])
@pytest.mark.parametrize("same", [True, False])
def test_counts_padding_and_contiguity(side, share, consecutive, same):
    base, source = PADDED[side], PADDED[side][[1, 0, 2]]
    for seed in range(20):
        chosen, taken = Span(share, consecutive=consecutive, same=same).draw(base, source, uniform(3, seed=seed))
        for row in range(3):
            shorter = min(int(base[row].sum()), int(source[row].sum()))
            count = max(1, int(shorter * share + 1e-6))
            assert int(chosen[row].sum()) == int(taken[row].sum()) == count
            assert not (chosen[row] & ~base[row]).any()
            assert not (taken[row] & ~source[row]).any()
            assert not consecutive or (is_contiguous(chosen[row]) and is_contiguous(taken[row]))


def test_same_positions_count_from_the_first_real_token_of_each():
    for consecutive in (True, False):
        for seed in range(20):
            span = Span(0.5, consecutive=consecutive, same=True)
            chosen, taken = span.draw(PADDED["left"], PADDED["right"], uniform(3, seed=seed))
            for row, length in enumerate((10, 4, 1)):
                assert torch.equal(chosen[row, 10 - length :], taken[row, :length])


def test_the_pairs_say_whether_positions_are_the_same():
    full = PADDED["none"]
    draws = {a: Span(0.3).draw(full, full, uniform(3), aligned=a) for a in (True, False)}
    assert torch.equal(*draws[True])
    assert not torch.equal(*draws[False])
    assert torch.equal(*Span(0.3, same=True).draw(full, full, uniform(3)))
    assert not torch.equal(*Span(0.3, same=False).draw(full, full, uniform(3), aligned=True))
    assert InContext().aligned
    assert not Shuffle().aligned


def test_spans_start_everywhere_equally_often():
    """8 tokens, 2 of them: 7 starts; the chi-squared statistic of 7000 draws stays below its 99.9 % quantile, 22.5."""
    real = torch.zeros(7000, 10, dtype=torch.bool)
    real[:, 1:9] = True
    chosen, taken = Span(0.25).draw(real, real, uniform(7000, 1))
    for mask in (chosen, taken):
        starts = mask.int().argmax(1) - 1
        counts = starts.bincount(minlength=7)
        assert counts.shape == (7,)
        assert ((counts - 1000.0) ** 2 / 1000).sum() < 22.5
    assert abs(torch.corrcoef(torch.stack([chosen.int().argmax(1), taken.int().argmax(1)]).double())[0, 1]) < 0.05


def test_scattered_positions_are_uniform_and_not_always_neighbours():
    real = torch.ones(6000, 6, dtype=torch.bool)
    chosen, _ = Span(1 / 3, consecutive=False).draw(real, real, uniform(6000, 6))
    assert (chosen.double().mean(0) - 1 / 3).abs().max() < 0.03
    neighbours = sum(is_contiguous(row) for row in chosen) / 6000
    assert abs(neighbours - 5 / 15) < 0.03  # 5 of the 15 pairs of 6 positions are neighbours


def test_a_number_at_the_edge_stays_inside():
    ones = torch.full((3, 2, 1), 1 - 1e-7)
    chosen, _ = Span(0.3).draw(RIGHT, RIGHT, ones)
    assert chosen.sum(1).tolist() == [3, 1, 1]
    assert chosen[0].nonzero()[:, 0].tolist() == [7, 8, 9]


def test_products_lose_nothing_to_rounding():
    real = torch.ones(1, 100, dtype=torch.bool)
    assert int(Span(0.29).draw(real, real, uniform(1, 1))[0].sum()) == 29
    assert 100 * 0.29 < 29


def test_content_tokens_only():
    batch = text(side="left").batch(range(8))
    real = batch["attention_mask"].bool()
    eligible = Span(among="content").eligible(batch, real)
    assert torch.equal(eligible, real & (batch["input_ids"] != 1))
    for seed in range(10):
        chosen, _ = Span(0.5, among="content").draw(eligible, eligible, uniform(8, seed=seed))
        assert (batch["input_ids"][chosen] != 1).all()
        assert chosen.sum(1).tolist() == [max(1, int(n) // 2) for n in eligible.sum(1)]


def test_labelled_tokens_only():
    labels = torch.tensor([[-100, 4, -100, 5, 6], [7, -100, -100, -100, -100]])
    batch = {"labels": labels, "input_ids": labels}
    real = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    span = Span(1.0, among="labelled")
    eligible = span.eligible(batch, real)
    assert eligible.nonzero().tolist() == [[0, 1], [0, 3], [1, 0]]
    chosen, _ = span.draw(eligible, eligible, uniform(2, 5))
    assert torch.equal(chosen, eligible)


def test_contiguous_among_the_eligible():
    eligible = torch.tensor([[1, 0, 1, 0, 1, 0, 1, 0]]).bool()
    for seed in range(10):
        chosen, _ = Span(0.5).draw(eligible, eligible, uniform(1, 1, seed))
        assert chosen[0].nonzero()[:, 0].tolist() in ([0, 2], [2, 4], [4, 6])


@pytest.mark.parametrize("share", [0, -0.1, 1.01])
def test_a_span_needs_a_share(share):
    with pytest.raises(DistillError, match=r"is not a share above 0 and up to 1; use e.g. Span\(0.3\)"):
        Span(share)


def test_a_share_that_is_no_number_is_refused():
    with pytest.raises(DistillError, match=r"Span\(share=nan\): share must be a number; write share=0.3"):
        Span(float("nan"))


def test_what_a_span_cannot_find():
    with pytest.raises(DistillError, match=r"among='words'\) does not exist: ?|choose one of real, content, labelled"):
        Span(among="words")
    real = torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(DistillError, match=r"column special_tokens_mask of shape \[2, 4\], found none"):
        Span(among="content").eligible({}, real)
    with pytest.raises(DistillError, match=r"column labels of shape \[2, 4\], found \[2\]"):
        Span(among="labelled").eligible({"labels": torch.zeros(2)}, real)
    none = torch.tensor([[True], [False]])
    with pytest.raises(DistillError, match=r"row 1 of the batch has no position to interchange among 'real'"):
        Span().draw(none, none, uniform(2, 1))


def test_shuffle_is_a_permutation_that_the_generator_decides():
    batch = text().batch(range(20))
    before = torch.random.get_rng_state()
    drawn = Shuffle().draw(batch, None, generator())
    assert sorted(drawn.tolist()) == list(range(20))
    assert drawn.tolist() != list(range(20))
    assert torch.equal(drawn, Shuffle().draw(batch, None, generator()))
    assert not torch.equal(drawn, Shuffle().draw(batch, None, generator(1)))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_in_context_replaces_the_share_of_each_text_and_nothing_special(side, share):
    batch = text(side=side).batch(range(24))
    words = torch.arange(100, 120)  # none of the texts has these
    source = InContext(share, words=words).draw(batch, 120, generator())
    changed = source["input_ids"] != batch["input_ids"]
    content = batch["attention_mask"].bool() & ~batch["special_tokens_mask"].bool()
    assert not (changed & ~content).any()
    assert changed.sum(1).tolist() == [min(int(n), max(1, int(int(n) * share))) for n in content.sum(1)]
    assert torch.isin(source["input_ids"][changed], words).all()
    assert source.keys() == batch.keys()
    assert all(torch.equal(source[name], batch[name]) for name in batch if name != "input_ids")


def test_in_context_share_0_is_the_identity():
    batch = text().batch(range(24))
    source = InContext(0).draw(batch, VOCABULARY, generator())
    assert all(torch.equal(source[name], batch[name]) for name in batch)


def test_in_context_draws_from_the_vocabulary_but_no_special_token():
    batch = text(rows=400).batch(range(400))
    source = InContext(1.0).draw(batch, VOCABULARY, generator())
    content = batch["attention_mask"].bool() & ~batch["special_tokens_mask"].bool()
    drawn = source["input_ids"][content]
    assert set(drawn.tolist()) == set(range(VOCABULARY)) - {0, 1}  # 0 pads, 1 is special


def test_in_context_candidates():
    batch = {
        "input_ids": torch.tensor([[3, 4, 5, 3], [5, 5, 4, 6]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
    }
    pairs = InContext(1.0, candidates={3: [13, 14], 4: [24]})
    seen = set()
    for seed in range(20):
        ids = pairs.draw(batch, None, generator(seed))["input_ids"]
        assert ids[0, 1:].tolist() == [24, 5, 3]  # 5 has no candidates, the last 3 is padding
        assert ids[1].tolist() == [5, 5, 24, 6]
        seen.add(int(ids[0, 0]))
    assert seen == {13, 14}


def test_in_context_is_decided_by_its_generator_alone():
    batch = text().batch(range(10))
    before = torch.random.get_rng_state()
    one, again, other = (InContext(0.5).draw(batch, VOCABULARY, generator(s))["input_ids"] for s in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_in_context_errors():
    with pytest.raises(DistillError, match=r"InContext\(share=1.5\) is not a share; use a number from 0 to 1"):
        InContext(1.5)
    with pytest.raises(DistillError, match=r"no input_ids but pixel_values; use sources=Shuffle\(\)"):
        InContext().draw({"pixel_values": torch.zeros(1)}, None, generator())
    with pytest.raises(DistillError, match="knows no vocabulary"):
        InContext().draw({"input_ids": torch.ones(1, 3).long()}, None, generator())
