"""Measurements that take long say how far they are, and others say nothing."""

import io

import pytest
from rich.console import Console

from distill.evaluation import progress
from distill.evaluation.progress import counting, measurements_shown


def counted(console, seconds, monkeypatch, total=50):
    """Count one by one, with a clock by which each takes so many seconds."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with measurements_shown(console, "fit"), counting("pairs", total) as count:
        for _ in range(total):
            now[0] += seconds
            count(1)


def console_on(file, **settings):
    return Console(file=file, width=100, **settings)


def test_a_long_measurement_has_a_line_for_each_tenth(monkeypatch):
    counted(console_on(file := io.StringIO()), 1.0, monkeypatch)
    lines = file.getvalue().splitlines()
    assert lines[0] == "fit: measuring 50 pairs: 5 done, 0:45 left"
    assert lines[-1] == "fit: measuring 50 pairs: 45 done, 0:05 left"
    assert len(lines) == 9


@pytest.mark.parametrize(("seconds", "quiet"), [(0.01, False), (0.1, False), (1.0, True)])
def test_a_short_one_and_a_quiet_console_say_nothing(seconds, quiet, monkeypatch):
    counted(console_on(file := io.StringIO(), quiet=quiet), seconds, monkeypatch)
    assert not file.getvalue()


def test_a_terminal_has_a_bar_that_goes_away(monkeypatch):
    console = console_on(file := io.StringIO(), force_terminal=True)
    counted(console, 1.0, monkeypatch)
    assert "measuring 50 pairs" in file.getvalue()
    assert "\x1b[?25h" in file.getvalue()  # the cursor is back


def test_outside_of_a_block_nothing_is_shown(capsys):
    with counting("rows", 3) as count:
        count(3)
    assert count.done == 3
    assert capsys.readouterr() == ("", "")
