"""The rules of positions: what every rule promises, and Scattered. Span is tested with the sources, in test_sources."""

import pytest
import torch

from distill import DIITO, Answer, DistillError, Scattered, Span, evaluate
from distill.interchange.positions import PositionRule
from tests.distill.interchange.test_sources import PADDED, uniform
from tests.distill.tiny_models import bert, text

RULES = [
    Span(0.3), Span(0.5, consecutive=False), Span(1.0, same=True), Scattered(1), Scattered(2), Scattered(3, same=False),
    Answer(0), Answer(-1),
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("side", PADDED)
def test_every_rule_takes_real_tokens_as_many_of_base_and_source(rule, side):
    base, source = PADDED[side], PADDED[side][[1, 0, 2]]
    assert isinstance(rule, PositionRule)
    for seed in range(10):
        drawn = uniform(3, rule.numbers(10), seed)
        written, read = rule.draw(rule.eligible({}, base), rule.eligible({}, source), drawn)
        assert torch.equal(written.sum(1), read.sum(1))
        assert bool(written.any(1).all())
        assert not (written & ~base).any()
        assert not (read & ~source).any()


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_draw_is_the_same_with_more_padding_and_more_numbers(rule):
    """On the right, where columns are added; the numbers beyond those that a rule takes change nothing."""
    base, source, many = PADDED["right"], PADDED["right"][[1, 0, 2]], uniform(3, 16)
    enough = many[:, :, : max(rule.numbers(10), 1)]
    written, read = rule.draw(base, source, enough)
    wider = [torch.nn.functional.pad(mask, (0, 4)) for mask in (base, source)]
    for again in (rule.draw(base, source, many), rule.draw(*wider, many)):
        assert torch.equal(again[0][:, :10], written)
        assert torch.equal(again[1][:, :10], read)
        assert not again[0][:, 10:].any()


@pytest.mark.parametrize("rule", [each for each in RULES if not isinstance(each, Span)], ids=repr)
def test_same_places_are_counted_over_real_tokens(rule):
    if rule == Scattered(3, same=False):
        rule = Scattered(3)
    for seed in range(10):
        written, read = rule.draw(PADDED["left"], PADDED["right"], uniform(3, seed=seed), aligned=False)
        for row, length in enumerate((10, 4, 1)):
            assert torch.equal(written[row, 10 - length :], read[row, :length])


@pytest.mark.parametrize("count", [1, 2, 3, 20])
@pytest.mark.parametrize("same", [True, False])
def test_scattered_takes_its_count_or_as_many_as_there_are(count, same):
    base, source = PADDED["right"], PADDED["left"][[1, 0, 2]]
    written, read = Scattered(count, same).draw(base, source, uniform(3))
    assert written.sum(1).tolist() == read.sum(1).tolist() == [min(count, 4), min(count, 4), 1]


def test_scattered_tokens_are_drawn_evenly_and_apart_where_asked():
    """2 of 5: every pair equally often (chi-squared of 10 pairs below its 99.9 % quantile, 27.9); apart, unrelated."""
    real = torch.ones(5000, 5, dtype=torch.bool)
    written, read = Scattered().draw(real, real, uniform(5000, 5))
    assert torch.equal(written, read)
    pairs = (written.long() * 2 ** torch.arange(5)).sum(1).bincount()
    counts = pairs[pairs > 0].double()
    assert len(counts) == 10
    assert ((counts - 500) ** 2 / 500).sum() < 27.9
    written, read = Scattered(1, same=False).draw(real, real, uniform(5000, 5))
    alike = (written == read).all(1).double().mean().item()
    assert alike == pytest.approx(1 / 5, abs=0.02)  # standard error .006


def test_scattered_among_content_tokens():
    batch = text(side="left", shortest=3).batch(range(8))
    eligible = Scattered(among="content").eligible(batch, batch["attention_mask"].bool())
    written, _ = Scattered(among="content").draw(eligible, eligible, uniform(8))
    assert (batch["input_ids"][written] != 1).all()
    assert written.sum(1).tolist() == [min(2, int(n)) for n in eligible.sum(1)]


def test_what_scattered_refuses():
    with pytest.raises(DistillError, match=r"Scattered\(count=0\) interchanges nothing; use 1 or more: Scattered\(1\)"):
        Scattered(0)
    with pytest.raises(DistillError, match=r"Scattered\(among='all'\) does not exist; choose one of real, content"):
        Scattered(among="all")
    with pytest.raises(DistillError, match=r"Scattered\(among='content'\) needs a column special_tokens_mask"):
        Scattered(among="content").eligible({}, PADDED["none"])
    with pytest.raises(DistillError, match=r"row 2 of the batch has no position .* use Scattered\(among='real'\)"):
        Scattered(among="content").draw(PADDED["none"], PADDED["none"] & (torch.arange(3) < 2)[:, None], uniform(3))


@pytest.mark.parametrize("odd", ["[CLS]", 3, Span, torch.ones(2)], ids=str)
def test_what_is_no_rule_is_refused(odd):
    with pytest.raises(DistillError, match=r"DIITO\(positions=.*\) draws no tokens; use positions=Span\(0.3\), or"):
        DIITO(positions=odd)
    with pytest.raises(DistillError, match=r"evaluate\(positions=.*\) draws no tokens"):
        evaluate(bert(2), bert(1), "full", text(4), positions=odd)
