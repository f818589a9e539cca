"""The page of an audit: one file, well-formed, the answer first, every figure in it."""

import base64
import re
from html import unescape

import pytest

from distill import Rows, audit
from distill.auditing.page import page_of
from tests.distill.cli.test_report import Reader
from tests.distill.tiny_models import bert, gpt2_lm, mlp, spread, text, vectors

FAST = {"pairs": 8, "examples": 6, "batch_size": 6}


def audited(kind):
    if kind == "classes":
        data = Rows({**text(12).table})
        return audit(spread(bert(2), scale=0.5), spread(bert(2), seed=5, scale=0.5), data, slices="labels", **FAST)
    if kind == "modules":
        return audit(spread(mlp()), spread(mlp(), seed=5), vectors(12), **FAST)
    if kind == "embeddings":
        one, other = (spread(gpt2_lm(2), seed=seed).transformer for seed in (0, 5))
        return audit(one, other, text(12, labels=False), **FAST)
    return audit(spread(gpt2_lm(2)), spread(gpt2_lm(2), seed=5), text(12, labels=False), **FAST)


@pytest.mark.parametrize("kind", ["classes", "modules", "embeddings", "language"])
def test_the_page_is_one_file_and_begins_with_the_answer(kind):
    found = audited(kind)
    page, reader = page_of(found, "a <title> & more"), Reader()
    reader.feed(page)
    assert reader.open == []
    assert "script" not in reader.tags
    assert not re.search(r"https?://", page)
    assert [base64.b64decode(source.partition(",")[2])[:4] for source in reader.sources] == [b"\x89PNG"]
    shown = "".join(reader.text)
    first = shown.index("Is it the same computation, and where not?")
    assert 0 < first < shown.index(found.sentences[0]) < shown.index("Which parts compute something else")
    for said in (*found.sentences, "a <title> & more"):
        assert said in unescape(page)
    worst = max(found.parts, key=lambda each: each.divergence)
    assert worst.name in shown
    assert "the original against itself" in shown
    if kind == "classes":
        assert "Slices by labels" in shown
        assert "Rows that differ most" in shown
        assert shown.count("mlp_output.0 ↔ mlp_output.0") == 1


@pytest.mark.parametrize("kind", ["classes", "modules"])
def test_the_picture_has_a_row_for_each_block_and_a_column_for_each_part(kind):
    found = audited(kind)
    left, *more = found.plot().axes
    rows = [each.get_text() for each in left.get_yticklabels()]
    columns = [each.get_text() for each in left.get_xticklabels()]
    if kind == "modules":
        assert (rows, columns) == (["0", "2", "4"], ["whole"])
        assert len(more) == 1  # the color bar
        return
    assert rows == ["embedding", "block 0", "block 1", "head"]
    assert columns == ["whole", "head\n0", "head\n1", "attention\nout", "mlp", "rest"]
    numbers = {(round(t.get_position()[1]), round(t.get_position()[0])) for t in left.texts}
    assert {(0, 0), (1, 5), (2, 3), (3, 0)} <= numbers
    assert (0, 1) not in numbers
    assert more[0].lines[0].get_xdata().tolist() == [each.divergence for each in found.depths[:-1]]
