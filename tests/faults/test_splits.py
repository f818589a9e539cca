"""Rows are held out by a seed of their own, kept with the teacher; what a network was trained on is left out."""

import json
from functools import partial

import pytest
import torch

import distill
from distill import DistillError
from distill.data.seen_rows import SeenRows
from distill.data.trained_on import save_split, split_seed_of, without_trained_on
from distill.tasks import load
from tests.distill.cli.test_main import distill as command
from tests.distill.conftest import save_bert, sentences, write_csv
from tests.distill.tiny_models import vectors

FILE = "films.csv"


@pytest.fixture
def film_data(tmp_path, monkeypatch):
    monkeypatch.setattr("distill.evaluation.measurement.MOST_PAIRS", 20)
    monkeypatch.setattr("distill.cli.evaluate.evaluate", partial(distill.evaluate, pairs=20))
    monkeypatch.chdir(tmp_path)
    return write_csv(tmp_path / FILE, sentences(60))


@pytest.fixture
def encoder(tmp_path):
    return save_bert(tmp_path / "encoder", classifier=False)


def rows_of(path, **settings):
    from transformers import AutoTokenizer

    task = load(data=path, tokenizer=AutoTokenizer.from_pretrained(settings.pop("encoder")), **settings)
    return [[row.tolist() for row in rows.table["input_ids"]] for rows in (task.train, task.test)]


def test_the_split_does_not_depend_on_the_seed(film_data, encoder):
    first = rows_of(film_data, encoder=encoder, seed=0)
    assert rows_of(film_data, encoder=encoder, seed=1) == first
    assert rows_of(film_data, encoder=encoder, split_seed=1) != first


def taught(film_data, encoder, folder, *more):
    status, _, err = command("teach", "--data", film_data, "--from", encoder, "--output", folder, "--steps", 3,
                             "--batch-size", 8, *more)  # fmt: skip
    assert status == 0, err


def distilled(film_data, teacher, folder, *more):
    return command("fit", "--data", film_data, "--teacher", teacher, "--output", folder, "--objective", "kd", "--steps",
                   2, "--any-teacher", *more)  # fmt: skip


def test_another_seed_measures_on_what_the_teacher_never_saw(film_data, encoder, tmp_path):
    taught(film_data, encoder, tmp_path / "t", "--split-seed", 3)
    assert split_seed_of(tmp_path / "t") == 3
    status, out, err = distilled(film_data, tmp_path / "t", tmp_path / "r", "--seed", 1)
    assert status == 0, err
    train, test = rows_of(film_data, encoder=encoder, split_seed=3)
    again = sum(ids in train for ids in test)  # sentences that the file holds twice
    assert f"of {len(test)} held-out rows are left out" in out if again else "left out" not in out
    told = json.loads((tmp_path / "r/result.json").read_text())
    assert told["models"][0]["accuracy"]["count"] == len(test) - again


def test_rows_that_the_teacher_was_trained_on_are_left_out_and_counted(film_data, encoder, tmp_path):
    taught(film_data, encoder, tmp_path / "t")
    status, out, err = distilled(film_data, tmp_path / "t", tmp_path / "r", "--split-seed", 5)
    assert status == 0, err
    trained = {tuple(ids) for ids in rows_of(film_data, encoder=encoder)[0]}
    tested = rows_of(film_data, encoder=encoder, split_seed=5)[1]
    count = sum(tuple(ids) in trained for ids in tested)
    assert 0 < count < len(tested)
    assert f"note: {count} of {len(tested)} held-out rows are left out, as the teacher was trained on them" in out
    status, out, err = command("evaluate", "--data", film_data, "--teacher", tmp_path / "t", "--student",
                               tmp_path / "r/kd/student", "--pairs", 20)  # fmt: skip
    assert status == 0, err
    assert "held-out rows are left out, as student student was trained on them" in out


def test_nothing_is_measured_on_rows_that_were_all_trained_on(tmp_path):
    rows = vectors()
    SeenRows.of(rows.table).save(tmp_path)
    task = distill.tasks.Task("t", rows, rows, ("a", "b", "c"))
    with pytest.raises(DistillError, match=r"was trained on all 24 held-out rows of t, .* give others: --eval-data"):
        without_trained_on(task, tmp_path, "the teacher")
    others = vectors(6, seed=5)
    both = {name: torch.cat([column, others.table[name]]) for name, column in rows.table.items()}
    half = distill.tasks.Task("t", rows, distill.Rows(both), ("a", "b", "c"))
    kept, told = without_trained_on(half, tmp_path, "the teacher")
    assert told == "24 of 30 held-out rows are left out, as the teacher was trained on them"
    assert not SeenRows.of(rows.table).among(kept.test.table).any()
    assert without_trained_on(half, tmp_path / "nowhere", "the teacher") == (half, "")
    assert torch.equal(kept.test.table["inputs"], others.table["inputs"])


def test_the_seed_of_the_split_is_read_or_refused(tmp_path):
    assert split_seed_of(tmp_path) is None
    save_split(tmp_path, 4)
    assert split_seed_of(tmp_path) == 4
    (tmp_path / "split.json").write_text('{"split_seed": "four"}')
    with pytest.warns(UserWarning, match="without a checksum"), pytest.raises(DistillError, match="names no seed but"):
        split_seed_of(tmp_path)
