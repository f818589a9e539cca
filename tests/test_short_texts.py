"""What is printed of rows, tasks, schedules, runs and models is short, whatever they hold, and says nothing as code."""

import pytest
import torch

import distill
import interventions
from distill import Rows, Schedule, Task
from tests.distill.tiny_models import bert, mlp

ROWS = 2000
EVIL = "<script>alert(1)</script>\x1b[31m"


def large() -> Rows:
    """Return many long rows, with a column and classes of evil names."""
    columns = {"input_ids": torch.arange(ROWS * 500).reshape(ROWS, 500) % 30, EVIL: torch.rand(ROWS, 400)}
    return Rows.of({**columns, "labels": [f"{EVIL}{row % 500}" for row in range(ROWS)]})


def run_of_many() -> interventions.Run:
    model = bert(2).eval()
    return interventions.run(model, {"input_ids": torch.randint(5, 30, (32, 12))})


SHOWN = {
    "Rows": large,
    "Task": lambda: Task(EVIL, large(), large(), tuple(map(str, range(500))), lambda seed: mlp()),
    "Schedule": lambda: Schedule(decay=lambda share: 1 - share, optimizer=torch.optim.NAdam),
    "Description": lambda: interventions.describe(bert(2)),
    "Run": run_of_many,
}
"""Objects that notebooks show as a table or a text, and which draw nothing."""


@pytest.mark.parametrize("name", SHOWN)
def test_the_text_and_the_page_are_short(name):
    shown = SHOWN[name]()
    assert type(shown).__name__ == name
    assert len(repr(shown)) < 5000
    assert len(shown._repr_html_()) < 10_000
    for text in (repr(shown), str(shown), shown._repr_html_()):
        assert "\x1b" not in text
        assert "tensor(" not in text
    assert "<script" not in shown._repr_html_()


def test_rows_and_tasks_name_their_columns_and_sizes():
    rows = distill.tasks.load("pvr").train
    assert f"{len(rows):,} rows" in repr(rows)
    assert all(name in rows._repr_html_() for name in rows.table)
    assert "pvr" in distill.tasks.load("pvr")._repr_html_()
