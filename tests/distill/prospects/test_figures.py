"""The figures of headroom: their spread by hand, and advice that says what they are."""

import math
import statistics

import pytest

from distill import EntryHeadroom, Headroom
from distill.prospects.figures import Spread


def entry(ratio=30.0, cosine=0.05, void=0.0, kind="a", name="x ↔ y", base=0.1, norms=(1.0, 6.0)) -> EntryHeadroom:
    changed = base * ratio if base else ratio
    return EntryHeadroom(
        kind, name, 0.25, void, 0.0, base, changed, Spread.of_ratio([changed], [base]), *norms, Spread(cosine, 0.1), 64
    )  # fmt: skip


def result(*entries: EntryHeadroom, steps: int = 250) -> Headroom:
    kinds = dict.fromkeys((each.kind for each in entries), Spread(0.1, 0.02))
    settings = {"batches": 4, "batch_size": 16, "tolerance": 0.01, "seed": 0}
    return Headroom(entries, kinds, "kd", "KD(temperature=2.0)", steps, settings)


def test_a_spread_is_mean_and_standard_error():
    values = [0.1, 0.5, 0.3, -0.2]
    found = Spread.of([*values, math.nan])
    assert found.mean == pytest.approx(statistics.mean(values))
    assert found.error == pytest.approx(statistics.stdev(values) / 2)
    assert Spread.of([math.nan]) == Spread(None)
    assert Spread.of([2.0]) == Spread(2.0)
    assert [str(each) for each in (Spread(None), Spread(math.inf), Spread(34.94, 8.501), Spread(1.0, 1e-9))] == [
        "–", "∞", "34.9 ± 8.5", "1.00 ± 0.00",
    ]  # fmt: skip


def test_a_ratio_is_that_of_the_means():
    above, below = [4.0, 8.0, 6.0], [1.0, 3.0, 2.0]
    found = Spread.of_ratio(above, below)
    assert found.mean == 3
    residuals = [1.0, -1.0, 0.0]  # above − 3 · below
    assert found.error == pytest.approx(statistics.stdev(residuals) / math.sqrt(3) / 2)
    assert Spread.of_ratio([3.0, 6.0], [1.0, 2.0]) == Spread(3.0, 0.0)
    assert Spread.of_ratio([1.0], [0.0]).mean == math.inf
    assert Spread.of_ratio([0.0], [0.0]).mean is None


def test_the_error_of_a_ratio_is_the_spread_that_it_has():
    """Over many measurements of 8 batches, the ratio varies as its standard errors say."""
    import torch

    draw = torch.Generator().manual_seed(0)
    below = 1 + 0.2 * torch.rand(3000, 8, generator=draw, dtype=torch.float64)
    above = 5 * below + torch.randn(3000, 8, generator=draw, dtype=torch.float64)
    found = [Spread.of_ratio(a, b) for a, b in zip(above.tolist(), below.tolist(), strict=True)]
    varies = statistics.stdev(each.mean for each in found)
    assert math.sqrt(statistics.mean(each.error**2 for each in found)) == pytest.approx(varies, rel=0.05)


@pytest.mark.parametrize(
    ("each", "said"),
    [
        (entry(34, -0.01, norms=(1.7, 12.6)), "34.0 times the base loss (3.40 against 0.100) and its gradient 7.41 "
         "times as long and nearly orthogonal (cosine -0.01; of the base loss on two batches +0.10): the causal "
         "term asks for something else than the base loss, and may matter"),
        (entry(5, 0.76), "mostly in the same direction (cosine +0.76; of the base loss on two batches +0.10): the "
         "causal term is mostly a second helping of the base loss on changed inputs"),
        (entry(40, 0.76), "a second helping of the base loss"),
        (entry(2, 0.3), "partly in the same direction (cosine +0.30; of the base loss on two batches +0.10): the "
         "causal term asks for something else than the base loss, but little of it"),
        (entry(20, -0.6), "against it (cosine -0.60"),
        (entry(3, None, base=0.0), "the base loss is 0 and the counterfactual loss of x ↔ y 3.00"),
        (entry(0, None, base=0.0, norms=(0.0, 0.0)), "both losses of x ↔ y are 0"),
    ],
)  # fmt: skip
def test_the_advice_says_what_the_figures_are(each, said):
    advice = result(each).advice
    assert said in advice
    assert advice.startswith("After 250 steps of KD(temperature=2.0) ")
    assert advice.count(". ") == 0
    assert result(each, steps=0).advice.startswith("As the student is, ")


def test_the_advice_is_about_the_entry_that_leaves_most():
    small, large = entry(2, 0.9, name="small", norms=(1, 1)), entry(30, 0.1, name="large")
    void = entry(90, 0.0, void=1.0, name="last")
    assert "loss of large is 30.0 times" in result(small, large, void).advice
    assert "no interchange of last can be seen" in result(small, large, void).advice
    assert result(void).advice == "No interchange of last can be seen: map a block below the last, or other positions."
    assert "no interchange of last (a, b) can be seen" in result(large, void, entry(90, 0, 1.0, "b", "last")).advice
    assert "large (b)" in result(small, entry(30, 0.1, name="large", kind="b")).advice


def test_the_table_has_every_figure():
    found = str(result(entry(), entry(3, None, base=0.0, kind="b", name="other")))
    assert "After 250 steps of KD(temperature=2.0), dropout off, 4 batches of 16 rows" in found
    (line,) = (each for each in found.splitlines() if each.startswith("x ↔ y"))
    assert line.split()[3:] == [
        "0.250",
        "0.000",
        "0.000",
        "0.100",
        "3.00",
        "30.0",
        "1.00",
        "6.00",
        "+0.05",
        "±",
        "0.10",
    ]
    (line,) = (each for each in found.splitlines() if each.startswith("other"))
    assert "∞" in line
    assert "b; cosine of two batches of kd: 0.10 ± 0.02" in found


def test_the_picture_has_a_dot_for_each_entry_that_has_both_figures():
    found = result(entry(), entry(3, 0.9, void=1.0, name="last"), entry(3, None, base=0.0, name="none"))
    picture = found.plot()
    (axes,) = picture.axes
    texts = [each.get_text() for each in axes.texts]
    assert texts[:2] == ["1", "2"]
    assert axes.texts[0].get_position() == (pytest.approx(30), 0.05)
    assert axes.get_xscale() == "log"
    assert "something else: may matter" in texts
    (legend,) = picture.legends
    assert [each.get_text() for each in legend.get_texts()] == ["1: x ↔ y", "2: last", "cannot be seen"]


def test_the_picture_names_the_kinds_where_there_are_several():
    (legend,) = result(entry(), entry(kind="b")).plot().legends
    assert [each.get_text() for each in legend.get_texts()] == ["1: x ↔ y", "a", "b"]
