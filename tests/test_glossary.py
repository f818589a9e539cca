"""The glossary names what is there: its files exist, and its public names are those of the packages."""

import re
from pathlib import Path

import pytest

import distill
import interventions

REPOSITORY = Path(__file__).parents[1]
TEXT = (REPOSITORY / "docs/glossary.md").read_text()
ROWS = [
    line.split(" | ")
    for line in TEXT.splitlines()
    if line.startswith("| ") and not line.startswith(("| word", "| ---"))
]
CODE = sorted({code for row in ROWS for code in re.findall(r"`([^`]+)`", row[-1])})
PROMISED = "base source counterfactual place site tap write term mapping pair entry".split()


@pytest.mark.parametrize("word", PROMISED)
def test_a_word_is_defined_once(word):
    """Under this word, in one row."""
    assert sum(word in re.split(r", |\| ?", row[0]) for row in ROWS) == 1


@pytest.mark.parametrize("code", CODE)
def test_what_a_row_names_is_there(code):
    """A file, or an expression whose names are public."""
    if re.fullmatch(r"[\w/]+(\.py)?", code) and "/" in code:
        assert (REPOSITORY / code).exists()
        return
    called = re.findall(r"(?<![\w.=\"])([A-Za-z_]\w*)(?=[(.]|$)", code)
    unknown = [name for name in called if not any(hasattr(module, name) for module in (interventions, distill))]
    assert [name for name in unknown if name not in {"distill", "interventions", *interventions.SITES}] == []


def test_the_law_sees_a_name_that_is_not_there():
    """An invented class is reported."""
    with pytest.raises(AssertionError):
        test_what_a_row_names_is_there("Imagined(0.3)")
    with pytest.raises(AssertionError):
        test_what_a_row_names_is_there("distill/imagined.py")
