"""The page on other trainers shows the committed figures, and its sides compute the same losses."""

import importlib
import json
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
sys.path.append(str(REPOSITORY / "benchmarks"))  # as for a script that is run there
TRAINERS = importlib.import_module("trainers")


def test_the_page_shows_the_committed_figures():
    page = TRAINERS.PAGE.read_text(encoding="utf-8")
    assert TRAINERS.with_figures(page, json.loads(TRAINERS.FILE.read_text(encoding="utf-8"))) == page


def test_the_sides_came_to_the_same_losses():
    for name, side in json.loads(TRAINERS.FILE.read_text(encoding="utf-8"))["sides"].items():
        assert side["losses"]["largest difference from bare loop"] <= 1e-4, name
        assert side["losses"]["last"] < side["losses"]["first"], name


@pytest.mark.skipif(not TRAINERS.MODEL.is_dir(), reason="no ../shared/data")
@pytest.mark.parametrize("side", ["distill.fit", "transformers.Trainer"])
def test_a_side_trains_as_the_bare_loop(side):
    steps = TRAINERS.FIRST + 2
    wanted, found = (TRAINERS.run_side(name, steps) for name in (TRAINERS.BARE, side))
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
    assert len(found["losses"]) == steps
    assert found["step"] > 0
