import json
from dataclasses import replace

import pytest

from distill import InterchangeAccuracy, Outcome, Share

GOOD = Outcome(Share(0.75, 0.7, 0.8, 100), 0.4, 0.5, 0.6, 0.65, 0.123, None, 100, 0)
NONE = Outcome(None, None, None, None, None, None, None, 0, 100)


def accuracy(**pairs):
    return InterchangeAccuracy(GOOD, pairs or {"a ↔ b": GOOD, "c ↔ d": NONE}, {"pairs": 100})


def test_figures():
    found = accuracy()
    assert (found.iia, found.interval) == (0.75, (0.7, 0.8))
    assert InterchangeAccuracy(NONE, {}, {}).iia is None
    assert InterchangeAccuracy(NONE, {}, {}).interval is None


def test_what_is_left_out_is_said():
    (note,) = accuracy().notes
    assert note.startswith("c ↔ d: 100 of 100 counterfactuals replace all that an output can see")
    assert accuracy(only=GOOD).notes == ()


def test_the_table_holds_every_figure():
    lines = str(accuracy()).split("\n")
    assert lines[0].split() == ["IIA", "effect", "effective", "do", "nothing", "replace", "all", "KL"]
    assert lines[1].split() == "a ↔ b 0.750 [0.700, 0.800] 0.400 0.500 0.600 0.650 0.123".split()
    assert lines[2].split() == "c ↔ d left out".split()
    assert lines[3].startswith("overall")
    assert str(accuracy()).endswith(accuracy().notes[0])
    columns = [lines[0].index(word) for word in ("IIA", "effect", "effective", "do nothing", "replace all", "KL")]
    values = ("0.750", "0.400", "0.500", "0.600", "0.650", "0.123")
    assert [lines[1].index(v) for v in values] == columns


def test_no_effect_no_effective_figure():
    assert "–" in str(accuracy(only=replace(GOOD, effective_iia=None)))


def test_regression():
    outcome = replace(NONE, error=0.25, count=7, left_out=0)
    found = InterchangeAccuracy(outcome, {"a ↔ b": outcome}, {})
    assert (
        str(found)
        == "a ↔ b: mean absolute error 0.25 (7 counterfactuals)\noverall: mean absolute error 0.25 (7 counterfactuals)"
    )
    partly = InterchangeAccuracy(outcome, {"a ↔ b": outcome, "c ↔ d": NONE}, {})
    assert "c ↔ d: left out" in str(partly)


def test_plain_data():
    told = json.loads(json.dumps(accuracy().to_dict()))
    assert told["overall"]["iia"] == {"value": 0.75, "low": 0.7, "high": 0.8, "count": 100}
    assert told["per_pair"]["c ↔ d"]["iia"] is None
    assert told["settings"] == {"pairs": 100}
    assert len(told["notes"]) == 1


def test_the_picture_shows_the_measured_pairs():
    figure = accuracy().plot()
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a ↔ b", "overall"]
    assert [bar.get_width() for bar in axes.patches] == [0.75, 0.75]


@pytest.mark.parametrize("format", ["png", "svg"])
def test_the_picture_can_be_saved(tmp_path, format):
    accuracy().plot().savefig(tmp_path / f"x.{format}")
