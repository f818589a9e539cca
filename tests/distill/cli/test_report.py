import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console

from distill import DIITO, KD, Estimate, Evaluation, FitResult, InterchangeAccuracy, Outcome, Record, Share
from distill.cli.report import HEADINGS, ComparedModel, Report, environment
from distill.results import curves
from distill.tasks import Task
from tests.distill.tiny_models import mlp, vectors

OUTCOME = Outcome(
    Share(0.75, 0.7, 0.8, 100), 0.4, 0.5, 0.6, 0.65, 0.1, None, 90, 10, effective=Share(0.5, 0.45, 0.55, 40),
    normalized=Estimate(0.37, 0.3, 0.4), agreement=Share(0.8, 0.75, 0.85, 100), base_kl=0.02,
)  # fmt: skip
MEASURED = Evaluation(Share(0.9, 0.88, 0.92, 500), InterchangeAccuracy(OUTCOME, {"a <b> ↔ c": OUTCOME}, {"pairs": 100}))
RECORDS = tuple(Record(i, 60, 1 / i, {"kd": 1 / i, "kd_cf": 0.5 / i}, 1e-3) for i in range(1, 61))


def report():
    task = Task("own <task>", vectors(8), vectors(4), ("a", "b", "c"), description="What & why.")
    fitted = FitResult(mlp(), RECORDS, MEASURED, {"weights": {}}, 1.25)
    entries = [
        ComparedModel("teacher", 6, 1_234_567, Evaluation(Share(0.95, 0.9, 1.0, 500), None)),
        ComparedModel("KD", 3, 600_000, MEASURED, 12.34, fitted),
        ComparedModel("noted", 3, 5, Evaluation(None, None, "no interchange accuracy: because"), 1.0),
    ]
    return Report("A <title>", task, entries, {"seed": 0, "task": "<script>"})


def printed(width=80):
    console = Console(width=width, no_color=True, record=True, file=io.StringIO())
    console.print(report().table())
    return console.export_text()


def test_the_table_holds_a_row_for_each_model_and_fits():
    lines = printed().splitlines()
    assert max(map(len, lines)) <= 80
    assert [name for name in HEADINGS if name not in lines[2]] == []
    rows = {line.split("  ")[0].strip(): line.split() for line in lines}
    assert rows["teacher"] == ["teacher", "0.950"]
    assert rows["KD"] == "KD 0.900 0.750 0.500 [0.450, 0.550] 0.400 0.600 12.3".split()
    assert rows["noted"] == ["noted", "1.0"]


def test_without_interchanges_neither_table_nor_page_speaks_of_them():
    found = report()
    alone = replace(MEASURED, interchange=None)
    found = replace(found, models=[replace(each, evaluation=alone) for each in found.models[:2]])
    assert list(found.headings) == ["accuracy", "s"]
    text = re.sub(r"data:image[^\"]*|<pre>.*?</pre>", "", found.html(), flags=re.S)
    assert "IIA" not in text
    assert "Interchange" not in text


def test_result_json(tmp_path):
    path = report().save(tmp_path / "deep" / "folder")
    assert path == tmp_path / "deep" / "folder" / "report.html"
    told = json.loads((path.parent / "result.json").read_text())
    assert [model["name"] for model in told["models"]] == ["teacher", "KD", "noted"]
    assert told["models"][1]["interchange"]["overall"]["iia"]["value"] == 0.75
    assert told["models"][1]["fit"]["steps"] == 60
    assert told["models"][2]["note"] == "no interchange accuracy: because"
    assert told["task"]["majority"] == report().task.majority
    assert told["settings"]["seed"] == 0
    assert told["versions"].keys() >= {"python", "torch", "causal-distillation", "device"}
    assert environment() == told["versions"]


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.sources, self.tags, self.text = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_one_file_well_formed_and_escaped():
    page, reader = report().html(), Reader()
    reader.feed(page)
    assert reader.open == []
    assert "script" not in reader.tags
    assert not re.search(r"https?://", page)
    assert "@import" not in page
    assert len(reader.sources) == 2  # curves and bars
    for source in reader.sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    text = "".join(reader.text)
    for expected in (
        "A <title>",
        "What & why.",
        "0.900 [0.880, 0.920]",
        "0.500 [0.450, 0.550]",
        "0.370 [0.300, 0.400]",
        "0.800 [0.750, 0.850]",
        "1,234,567",
        "a <b> ↔ c",
        '"task": "<script>"',
        "10 of 100 counterfactuals",
    ):
        assert expected in text
    assert "no interchange accuracy: because" in text


def test_curves_of_several_runs_share_their_axes():
    figure = curves({"KD": RECORDS, "other": RECORDS[:30]})
    assert figure._repr_png_().startswith(b"\x89PNG")  # notebooks show it
    assert [axes.get_title() for axes in figure.axes] == ["kd", "kd_cf"]
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [60, 30]
    first = figure.axes[0].lines[0].get_ydata()
    assert first[0] == 1.0
    smooth = curves({"": [Record(i, 200, 0, {"x": float(i)}, 0) for i in range(1, 201)]}).axes[0].lines[0].get_ydata()
    assert smooth[3] == 2.5  # the mean of 1, 2, 3, 4: over 2 % of 200 steps
    assert smooth[-1] == 198.5


def test_objectives_are_told_in_full():
    assert repr(KD(3.0)) == "KD(temperature=3.0)"
    assert "Span(share=0.3" in repr(DIITO())


@pytest.mark.parametrize("records", [(), RECORDS[:1]])
def test_results_of_short_runs_print(records):
    result = FitResult(mlp(), records, Evaluation(None, None))
    assert str(result)
    assert result.to_dict()["steps"] == len(records)
