"""McNemar's test against the binomial test of SciPy, and by hand."""

import pytest
from scipy.stats import binomtest

from distill import Discordance, DistillError


@pytest.mark.parametrize(("won", "lost"), [(0, 1), (1, 0), (3, 12), (12, 3), (7, 7), (40, 61), (0, 30)])
def test_it_is_the_exact_binomial_test(won, lost):
    assert Discordance(won, lost).p == pytest.approx(binomtest(won, won + lost).pvalue)


def test_by_hand():
    """Of two rows both are lost with the probability ¼, and as uneven the other way."""
    assert Discordance(0, 2).p == pytest.approx(0.5)
    assert Discordance(0, 0).p == 1
    assert str(Discordance(3, 12)) == "3 won, 12 lost, p = 0.035"


def test_what_counts_nothing_is_refused():
    with pytest.raises(DistillError, match=r"Discordance\(won=-1, lost=2\) counts answers; give numbers of 0 or more"):
        Discordance(-1, 2)
