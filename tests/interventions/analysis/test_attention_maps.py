"""Pictures of attention patterns: the numbers of the head, blank beyond the mask, without padding."""

import pytest

from interventions import InterventionError, Location, attention_map, run
from tests.interventions.analysis.test_sweeps import padded
from tests.interventions.tiny_models import batch, make


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_causal_pattern_is_blank_above_its_diagonal(side):
    inputs = padded(batch("gpt2"), [5, 3, 4], side)
    done = run(make("gpt2"), inputs).detach()
    axes = attention_map(done, 1, 1, example=1, tokens=["▁a", "Ġb", "c"]).axes[0]
    columns = range(3) if side == "right" else range(2, 5)
    weights = done.activations[Location(1, "attention_pattern")][1, 1][columns][:, columns]
    shown = {(int(t.get_position()[1]), int(t.get_position()[0])): float(t.get_text()) for t in axes.texts}
    assert set(shown) == {(row, column) for row in range(3) for column in range(row + 1)}
    assert all(abs(value - float(weights[place])) <= 0.0051 for place, value in shown.items())
    assert (len(axes.patches), len(axes.lines)) == (3, 0)
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0 a", "1 b", "2 c"]


def test_a_bidirectional_pattern_is_whole():
    axes = attention_map(run(make("bert"), batch("bert")), 0, 0).axes[0]
    assert (len(axes.texts), len(axes.patches)) == (25, 0)


def test_what_is_not_there_is_refused():
    done = run(make("gpt2"), batch("gpt2"))
    with pytest.raises(InterventionError, match=r"example=3 does not exist: there are 3"):
        attention_map(done, 0, 0, example=3)
    with pytest.raises(InterventionError, match=r"1 tokens were given for 5 real ones of example 0"):
        attention_map(done, 0, 0, tokens=["a"])
    with pytest.raises(InterventionError, match=r"names head 2 and there are 2"):
        attention_map(done, 0, 2)
