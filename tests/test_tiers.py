"""The default tier runs some cases of every test function, and never none."""

import pytest

from tests.tiers import BUDGET, CASES, Count, default_tier, seconds_of, slowest


class Item:
    """A test case, as far as tiers look at it."""

    def __init__(self, nodeid: str, full: bool = False) -> None:
        self.nodeid, self.full = nodeid, full

    def get_closest_marker(self, name):
        return name if name == "full" and self.full else None


def names(*items: Item) -> list[str]:
    return [item.nodeid for item in default_tier(items)]


def test_few_cases_are_all_kept():
    assert names(Item("f[0]"), Item("g"), Item("f[1]")) == ["f[0]", "g", "f[1]"]


def test_of_many_the_first_and_the_last():
    many = [Item(f"f[{i}]") for i in range(10)]
    assert names(*many) == ["f[0]", "f[9]"]
    assert CASES == 2


def test_marked_cases_are_left_to_the_full_tier():
    assert names(Item("f[0]", full=True), Item("f[1]"), Item("f[2]", full=True)) == ["f[1]"]


def test_a_function_whose_cases_are_all_marked_is_refused():
    with pytest.raises(pytest.UsageError, match="f has no case without the marker full"):
        names(Item("f[0]", full=True), Item("f[1]", full=True), Item("g"))


def test_what_each_tier_runs_is_counted_by_folder():
    count = Count()
    cases = [Item(f"tests/distill/data/test_rows.py::test_rows[{i}]") for i in range(5)]
    count.pytest_collection_modifyitems([*cases, Item("tests/test_shapes.py::test_shapes"), Item("a/b/c/d/e.py::f")])
    assert count.default == {"tests/distill/data": 2, "tests/test_shapes.py": 1, "a/b/c": 1}
    assert count.full_alone == {"tests/distill/data": 3}


def test_the_slowest_files_of_a_report(tmp_path):
    """As pytest writes them: also tests in classes, and one without a time."""
    report = tmp_path / "report.xml"
    times = [f'time="{BUDGET}"', 'time="1.5"', 'time="0.25"', ""]
    cases = zip(("tests.a", "tests.b", "tests.a.TestIt", "tests.c"), times, strict=True)
    text = "".join(f'<testcase classname="{name}" name="f" {time} />' for name, time in cases)
    report.write_text(f"<testsuites><testsuite>{text}</testsuite></testsuites>")
    assert dict(seconds_of(report)) == {"tests.a": BUDGET + 0.25, "tests.b": 1.5, "tests.c": 0}
    over, *others = list(slowest(report))[1:]
    assert over == "   120.2 s  tests.a  over the 120 s of a file"
    assert others == ["     1.5 s  tests.b", "     0.0 s  tests.c"]
