"""Binarized text: what may be read, what must not be run, how texts are cut and left out."""

import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distill import DistillError
from distill.compat.binarized import binarized_rows, token_probabilities, unpickle


class Words:
    """What is asked of a tokenizer: 0 pads, 1 is unknown, texts stand between 2 and 3, 4 masks."""

    pad_token_id, unk_token_id, cls_token_id, sep_token_id, mask_token_id = range(5)
    bos_token_id = eos_token_id = 2
    all_special_ids = (0, 1, 2, 3, 4)

    def __len__(self) -> int:
        return 30


def text(*middle: int) -> list[int]:
    return [2, *middle, 3]


LONG = text(*range(5, 25))


def dump(path, data, protocol=pickle.HIGHEST_PROTOCOL):
    path.write_bytes(pickle.dumps(data, protocol))
    return path


def rows(path, data, longest=512, masked=True, **settings):
    return binarized_rows(dump(path, data, **settings), Words(), longest=longest, masked=masked)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", [list, np.uint16, np.int32])
def test_lists_and_arrays_of_every_protocol(tmp_path, protocol, kind):
    data = [kind(LONG), kind(text(*range(5, 17)))]
    table = rows(tmp_path / "x.pickle", data, protocol=protocol).table
    assert [ids.tolist() for ids in table["input_ids"]] == [LONG, text(*range(5, 17))]
    assert table["special_tokens_mask"][1].tolist() == [1, *[0] * 12, 1]
    assert table["attention_mask"][0].tolist() == [1] * 22


def test_names_of_old_numpy_are_read(tmp_path):
    written = pickle.dumps([np.uint16(LONG)], 4)
    old = written.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray")
    assert old != written
    # The frame of protocol 4 says how long it is, one byte less now.
    frame = int.from_bytes(old[3:11], "little") - 1
    (tmp_path / "x.pickle").write_bytes(old[:3] + frame.to_bytes(8, "little") + old[11:])
    (found,) = unpickle(tmp_path / "x.pickle")
    assert found.tolist() == LONG


class Dangerous:
    def __reduce__(self):
        return os.mkdir, ("made-by-a-pickle",)


@pytest.mark.parametrize("data", [Dangerous(), [SimpleNamespace()], [eval], np.array([Dangerous()], dtype=object)])
def test_nothing_else_is_run(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DistillError, match=r"cannot be read: it asks for \w+.*, and only lists of numbers are read"):
        unpickle(dump(tmp_path / "x.pickle", data))
    assert not (tmp_path / "made-by-a-pickle").exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps([1, 2])[:-3]])
def test_files_that_are_no_pickle(tmp_path, content):
    (tmp_path / "x.pickle").write_bytes(content)
    with pytest.raises(DistillError, match=r"x.pickle cannot be read: .*; give a pickled list of token id lists"):
        unpickle(tmp_path / "x.pickle")
    with pytest.raises(DistillError, match="does not exist; make it with scripts/binarized_data.py"):
        unpickle(tmp_path / "nowhere")


def test_long_texts_are_cut_into_pieces_with_ends_of_their_own(tmp_path):
    table = rows(tmp_path / "x.pickle", [text(*range(5, 29))], longest=14).table
    first, second = (ids.tolist() for ids in table["input_ids"])
    assert first == [2, *range(5, 16), 3]  # 12 tokens of the text, the first of which begins it already
    assert second == [2, *range(16, 28), 3]
    assert len(table["input_ids"]) == 2  # the rest, [2, 28, 3], has fewer than 12 tokens


def test_short_and_unknown_texts_are_left_out(tmp_path):
    unknown = text(*[1] * 12)
    barely = text(*[1] * 6, *range(5, 12))
    data = [text(5, 6), text(*range(5, 14)), unknown, barely, LONG]
    assert [ids.tolist() for ids in rows(tmp_path / "x.pickle", data).table["input_ids"]] == [barely, LONG]
    with pytest.raises(DistillError, match="no text of .* is left: all 1 have fewer than 12 tokens"):
        rows(tmp_path / "y.pickle", [text(5, 6)])


def test_causal_texts_stand_between_other_tokens(tmp_path):
    told = [2, *range(5, 20), 2]
    assert rows(tmp_path / "x.pickle", [told], masked=False).table["input_ids"][0].tolist() == told
    with pytest.raises(DistillError, match="does not stand between the tokens 2 and 3"):
        rows(tmp_path / "y.pickle", [told], masked=True)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"a": 1}, "holds dict and no list of texts"),
        ([], "holds list and no list of texts"),
        ([[[2, 3]]], r"text 0 of .* has shape \(1, 2\)"),
        ([[2.5, 3.5]], r"text 0 of .* has shape \(2,\) of float64"),
        ([LONG, [5, 6, 3]], "text 1 of .* does not stand between the tokens 2 and 3 of the teacher's tokenizer"),
        ([[2, 99, 3]], "has token 99 and the teacher's tokenizer 30 tokens: it was made with another tokenizer"),
    ],
)
def test_data_of_another_form(tmp_path, data, message):
    with pytest.raises(DistillError, match=message):
        rows(tmp_path / "x.pickle", data)


@pytest.mark.parametrize("kind", [list, np.array])
def test_probabilities_are_counts_to_a_power_and_0_for_special_tokens(tmp_path, kind):
    counts = [100] * 5 + [0, 1, 16, *[1] * 22]
    found = token_probabilities(dump(tmp_path / "c.pickle", kind(counts)), Words(), 30, 0.5)
    assert found[:8].tolist() == pytest.approx([0, 0, 0, 0, 0, 1, 1, 0.25])
    assert found.dtype == torch.float32
    flat = token_probabilities(dump(tmp_path / "c.pickle", kind(counts)), Words(), 30, 0.0)
    assert flat[5:].unique().tolist() == [1.0]


@pytest.mark.parametrize(("counts", "found"), [([1, 2], "2 counts"), ("no", "str")])
def test_counts_of_another_vocabulary(tmp_path, counts, found):
    with pytest.raises(DistillError, match=f"holds {found} and the models know 30 tokens; .*--vocab_size 30"):
        token_probabilities(dump(tmp_path / "c.pickle", counts), Words(), 30, 0.7)
