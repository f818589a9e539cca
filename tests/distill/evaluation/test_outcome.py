import json
from dataclasses import replace

import pytest

from distill import Estimate, InterchangeAccuracy, Outcome, Share

GOOD = Outcome(
    Share(0.75, 0.7, 0.8, 100), 0.4, 0.5, 0.6, 0.65, 0.123, None, 100, 0, effective=Share(0.5, 0.45, 0.55, 40),
    normalized=Estimate(0.375, 0.32, 0.43), correlation=0.81, agreement=Share(0.9, 0.85, 0.95, 100), base_kl=0.01,
)  # fmt: skip
SETTINGS = {"pairs": 100, "shared": {"bases": 50, "sources": 40}}
HALF = replace(GOOD, count=75, left_out=25)
TRAINED = (True, False, None, True)
NONE = Outcome(None, None, None, None, None, None, None, 0, 100)


def accuracy(**pairs):
    return InterchangeAccuracy(GOOD, pairs or {"a ↔ b": GOOD, "c ↔ d": NONE}, SETTINGS)


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
    table, base, sample, note = str(accuracy()).split("\n\n")
    lines = table.split("\n")
    headings = ("IIA", "effective", "normalized", "effect", "do nothing", "replace all", "KL", "shifts")
    values = ("0.750 [0.700", "0.500 [0.450", "0.375", "0.400", "0.600", "0.650", "0.123", "0.810")
    places = [f"{lines[0]} ".index(f"  {word} ") + 2 for word in headings]
    assert lines[0].split() == " ".join(headings).split()
    assert [lines[1].index(value) for value in values] == places
    assert lines[2].split() == "c ↔ d left out".split()
    assert lines[3].startswith("overall")
    assert base == "without an interchange, both answer alike on 0.900 [0.850, 0.950] of the bases, KL 0.010."
    assert sample.startswith("100 pairs of 50 bases and 40 sources. Intervals are at 95 %")
    assert note == accuracy().notes[0]


def test_kinds_are_printed_apart_by_whether_they_were_trained():
    kinds = {name: replace(accuracy(), trained=trained) for name, trained in zip("pqrs", TRAINED, strict=True)}
    found = replace(accuracy(only=GOOD), kinds=kinds)
    parts = [part.split("\n") for part in str(found).split("\n\n")]
    told = {part[0]: [line.split()[0] for line in part[1:]] for part in parts if part[0].endswith(":")}
    assert told == {"kinds trained on:": ["p", "s"], "kinds not trained on:": ["q"], "other kinds:": ["r"]}
    assert list(found.to_pandas().index) == ["only", "overall", "kind: p", "kind: q", "kind: r", "kind: s"]
    assert len(found.plot().axes[0].patches) == 6
    assert InterchangeAccuracy.of(json.loads(json.dumps(found.to_dict()))) == found


def test_what_is_left_out_of_kinds_and_what_was_not_measured_is_said():
    settings = {"pairs": 100, "missing": {"heads": "there are none."}}
    found = InterchangeAccuracy(GOOD, {"a": GOOD}, settings, kinds={"k": InterchangeAccuracy(HALF, {}, {})})
    assert found.notes == (
        "Left out of other kinds, for the same reason: k 25 of 100.", "heads: not measured: there are none.",
    )  # fmt: skip


def test_files_of_an_earlier_version_load():
    names = ("iia effect_rate effective_iia do_nothing replace_all kl error count left_out as_source").split()
    before = {name: value for name, value in accuracy().to_dict()["overall"].items() if name in names}
    saved = {"overall": before, "per_pair": {"a": before}, "settings": {}, "controls": {}, "overlap": None}
    found = InterchangeAccuracy.of(saved)
    assert (found.iia, found.overall.effective_iia, found.overall.effective) == (0.75, 0.5, None)
    assert "0.750 [0.700, 0.800]  0.500 " in str(found)  # without the interval that it did not have
    assert found.sample == ""


def test_the_sample_says_where_pairs_are_effective_ones():
    found = accuracy(only=GOOD)
    assert found.sample.startswith("100 pairs of 50 bases")
    tried = replace(found, overall=replace(GOOD, tried=700)).sample
    assert tried.startswith("100 pairs for each entry, whose interchange changes the teacher's answer, of 50 bases")


def test_how_many_pairs_were_tried_is_said():
    note = accuracy(only=replace(GOOD, tried=700)).notes
    assert note == ("only: 100 pairs that change the teacher's answer, of 700 tried.",)


def test_a_kind_of_which_no_pair_was_found_is_named():
    none = replace(NONE, left_out=0)
    kinds = {name: InterchangeAccuracy(replace(none, tried=tried), {}, {}) for name, tried in (("a", 400), ("b", 0))}
    assert replace(accuracy(only=GOOD), kinds=kinds).notes == (
        "a: none of 400 pairs that were tried changes the teacher's answer.",
        "b: no interchange can be seen there, so no pair was looked for.",
    )


def test_no_effect_no_effective_figure():
    assert "–" in str(accuracy(only=replace(GOOD, effective=None, effective_iia=None)))


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
    assert told["settings"] == SETTINGS
    assert len(told["notes"]) == 1


def test_the_picture_shows_the_measured_pairs():
    figure = accuracy().plot()
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a ↔ b", "overall"]
    assert [bar.get_width() for bar in axes.patches] == [0.75, 0.75]


@pytest.mark.parametrize("format", ["png", "svg"])
def test_the_picture_can_be_saved(tmp_path, format):
    accuracy().plot().savefig(tmp_path / f"x.{format}")
    assert (tmp_path / f"x.{format}").read_bytes().startswith({"png": b"\x89PNG", "svg": b"<?xml"}[format])
