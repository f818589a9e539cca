"""The sentences of an audit, each for figures that call for it."""

from dataclasses import replace

import pytest

from distill import Audit, Share
from distill.auditing.behaviour import Behaviour
from distill.auditing.controls import Controls
from distill.auditing.differences import Confusion, Differences, Slice
from distill.auditing.parts import Part
from distill.auditing.sentences import finest, interval, number, percent
from distill.statistics.intervals import Estimate

ROWS = Share(0.95, 0.93, 0.965, 400)
BEHAVIOUR = Behaviour("classes", "rows", 400, 400, 0.02, 1.5, agreement=ROWS)
NOTHING = Differences()
UNTRAINED = replace(BEHAVIOUR, divergence=2.0)


def part(name, site, layer, divergence, head=None, first=None):
    distance = 0.1 if divergence else 0.0
    return Part(name, site, layer, head, None, first, divergence, divergence / 2, distance)


PARTS = (
    part("embedding", "embedding", None, 0.0),
    part("block_output.0", "block_output", 0, 0.03),
    part("attention_heads.0[heads=0]", "attention_heads", 0, 0.03, head=0),
    part("mlp_output.0", "mlp_output", 0, 0.0),
    part("rest of block_output.0", "rest of block", 0, 0.0),
    part("head", "head", None, 0.0),
)


def audited(behaviour=BEHAVIOUR, parts=PARTS, differences=NOTHING, untrained=UNTRAINED):
    return Audit(behaviour, differences, parts, (), {}, Controls(0.0, untrained))


def parts_with(**divergences):
    """The parts with other divergences, by their sites."""
    return tuple(part(e.name, e.site, e.layer, divergences.get(e.site, 0.0), e.head) for e in PARTS)


@pytest.mark.parametrize(
    ("agreement", "begin"),
    [
        (Share(0.999, 0.995, 1.0, 400), "Nearly: it answers as the original on 99.90 % [99.50, 100.00] of 400 answers"),
        (ROWS, "Mostly: it answers as the original on 95.0 % [93.0, 96.5] of 400 answers"),
        (
            Share(0.92, 0.88, 0.95, 400),
            "Perhaps mostly, which more rows would show: it answers as the original on 92.0 %",
        ),
        (Share(0.4, 0.3, 0.5, 400), "No: it answers as the original on 40 % [30, 50] of 400 answers"),
    ],
)
def test_the_first_sentence_is_the_answer(agreement, begin):
    said = audited(replace(BEHAVIOUR, agreement=agreement)).sentences[0]
    assert said.startswith(begin)
    assert "(KL 0.02 nats, 0.01 on a scale on which the original itself is 0 and an untrained network 1)." in said


@pytest.mark.parametrize(
    ("parts", "begin"),
    [
        (parts_with(), "Yes, it is the same computation: all 400 answers are equal to the last bit, and so is"),
        ((), "On these rows, yes: all 400 answers are equal to the last bit; its parts were not compared."),
        (PARTS, "On these rows, yes: all 400 answers are equal to the last bit; some parts compute something else"),
    ],
)
def test_answers_that_are_equal(parts, begin):
    same = replace(BEHAVIOUR, divergence=0.0, largest=0.0, agreement=Share(1.0, 0.99, 1.0, 400))
    assert audited(same, parts).sentences[0].startswith(begin)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (PARTS, "The difference is in attention_heads.0[heads=0] and nowhere else: put into the original alone, it "
                "makes KL 0.03 nats and changes 1.5 % of the answers; 4 of 5 parts compute exactly the same."),
        (parts_with(attention_heads=0.03, head=0.01),
         "Most of it is in attention_heads.0[heads=0]: put into the original alone, it makes KL 0.03 nats and changes "
         "1.5 % of the answers, 75 % of what all parts make one by one; 3 of 5 parts compute exactly the same."),
        (parts_with(attention_heads=0.02, head=0.02, mlp_output=0.01),
         "It is spread over 3 parts; the largest is attention_heads.0[heads=0]: put into the original alone, it makes "
         "KL 0.02 nats and changes 1.0 % of the answers, 40 % of what all parts make one by one; 2 of 5 parts compute "
         "exactly the same."),
    ],
)  # fmt: skip
def test_where_the_difference_is(parts, said):
    assert audited(parts=parts).sentences[1] == said


def test_blocks_that_are_not_divided_count_as_one():
    """Without a rest of the block its parts do not cover it."""
    assert [each.name for each in finest(PARTS)] == [e.name for e in PARTS if e.site != "block_output"]
    some = tuple(each for each in PARTS if each.site != "rest of block")
    assert [each.name for each in finest(some)] == ["embedding", "block_output.0", "head"]
    segment = part("block_output.0 (blocks 0 to 1)", "block_output", 0, 0.1, first=0)
    assert segment in finest([*PARTS, segment])


@pytest.mark.parametrize(
    ("won", "lost", "gain", "p_value", "end"),
    [
        (3, 5, Estimate(-0.005, -0.02, 0.01), 0.727,
         ". On 3 rows it alone is right, on 5 the original alone: -0.5 [-2.0, +1.0] points (McNemar's p = 0.727), no "
         "difference that these rows can show."),
        (0, 9, Estimate(-0.0225, -0.04, -0.01), 0.0039,
         "-2.2 [-4.0, -1.0] points (McNemar's p = 0.0039), a difference that chance seldom makes."),
        (1, 5, Estimate(-0.01, -0.04, 0.01), None,
         ". On 1 row it alone is right, on 5 the original alone: -1.0 [-4.0, +1.0] points, no difference that these "
         "rows can show."),
        (0, 0, Estimate(0.0, 0.0, 0.0), 1.0, ": both are right on the same rows."),
    ],
)  # fmt: skip
def test_accuracies(won, lost, gain, p_value, end):
    both = (Share(0.9, 0.87, 0.92, 400), Share(0.895, 0.86, 0.92, 400))
    figures = replace(BEHAVIOUR, accuracy=both, gain=gain, won=won, lost=lost, p_value=p_value)
    said = audited(figures).sentences[1]
    assert said.startswith("Its accuracy is 89.5 % [86.0, 92.0], the original's 90.0 % [87.0, 92.0]")
    assert said.endswith(end)


def test_perplexities_values_and_embeddings():
    assert (
        "Its perplexity is 6.2, the original's 5.81." in audited(replace(BEHAVIOUR, perplexity=(5.81, 6.2))).sentences
    )
    values = Behaviour("values", "rows", 10, 10, 0.5, 1.0)
    assert audited(values).sentences[0].startswith("Not to the last bit: over 10 answers, mean difference 0.5, 0.25 on")
    near = Behaviour("embeddings", "rows", 10, 10, 0.001, 0.2, agreement=Share(0.8, 0.7, 0.9, 100))
    said = audited(near).sentences[0]
    assert said.startswith("No: it keeps 80 % [70, 90] of the nearest neighbours of 10 rows (1 − cosine 0.001")


def test_classes_and_slices():
    worst = Slice("short", 40, 0.1, Share(0.8, 0.65, 0.9, 40))
    found = Differences((), (Confusion("a", "b", 15, 0.1),), "length", (worst, replace(worst, value="long")))
    *_, moved, sliced = audited(differences=found).sentences
    assert moved == "Its most common change of answer is b in place of a: 15 of 20."
    assert sliced == "Of the slices by length, 'short' (40 rows) is the worst: an agreement of 80 % [65, 90]."


@pytest.mark.parametrize("value", [0.0, 1e-9, 0.00123, 0.5, 0.99996, 1.0])
def test_percents_keep_what_differs(value):
    assert float(percent(value)[:-2]) / 100 == pytest.approx(value, rel=0.2, abs=1e-5)
    assert (percent(value) == "100 %") == (value == 1.0)
    assert float(number(value)) == pytest.approx(value, rel=1e-2)
    assert interval(Share(value, value, value, 3)).startswith(f"{100 * value:.1f} % [")
