import io

import pytest
from rich.console import Console

from distill import Record
from distill.training.progress import show_progress


def records(count, first=1, total=None):
    for step in range(first, count + 1):
        yield Record(step, total or count, 1.25, {"kd": 0.5, "kd_cf": 0.75}, 1e-3)


def drawn(steps, **settings):
    console = Console(file=io.StringIO(), width=120, **settings)
    passed = list(show_progress(steps, "student", console))
    return passed, console.file.getvalue()


def test_piped_output_is_ten_plain_lines():
    passed, out = drawn(records(200))
    assert passed == list(records(200))
    assert "\x1b" not in out
    assert "\r" not in out
    lines = out.splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("student: step 20/200  loss 1.2500  kd 0.5000  kd_cf 0.7500  0:0")
    assert lines[-1].startswith("student: step 200/200")
    assert lines[-1].endswith("0:00 left")


@pytest.mark.parametrize("count", [1, 3, 10, 11])
def test_short_runs_and_resumed_ones(count):
    _, out = drawn(records(count))
    assert out.splitlines()[-1].startswith(f"student: step {count}/{count}")
    assert len(out.splitlines()) <= min(count, 10)
    _, out = drawn(records(20, first=11))
    assert [line.split()[2] for line in out.splitlines()] == ["12/20", "14/20", "16/20", "18/20", "20/20"]


def test_a_terminal_shows_a_bar_with_the_terms():
    passed, out = drawn(records(5), force_terminal=True)
    assert len(passed) == 5
    assert "student" in out
    assert "5/5" in out
    assert "kd_cf 0.7500" in out


def test_the_records_are_closed_with_the_bar():
    closed = []

    def steps():
        try:
            yield from records(5)
        finally:
            closed.append(True)

    for force in (True, False):
        showing = show_progress(steps(), "x", Console(file=io.StringIO(), force_terminal=force))
        next(showing)
        showing.close()
    assert closed == [True, True]
