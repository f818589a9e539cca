"""`distill cache`: answers are there before a training, which then calls no teacher."""

import pytest

from distill.teachers.served import Served
from tests.distill.cli.test_main import distill
from tests.distill.conftest import save_bert, sentences, write_csv


@pytest.fixture
def given(tmp_path, monkeypatch):
    """The arguments that name data and a teacher."""
    monkeypatch.chdir(tmp_path)
    data = write_csv(tmp_path / "films.csv", sentences(40))
    return ["--data", data, "--teacher", save_bert(tmp_path / "teacher", classifier=True)]


def calls_of_teachers(monkeypatch):
    calls, fetch = [], Served._fetch_answers

    def counted(self, batch):
        calls.append(len(batch))
        return fetch(self, batch)

    monkeypatch.setattr(Served, "_fetch_answers", counted)
    return calls


def test_what_is_kept_is_not_computed_again_and_a_training_finds_it(given, tmp_path, monkeypatch):
    calls = calls_of_teachers(monkeypatch)
    keeping = ["cache", *given, "--output", tmp_path / "answers", "--batch-size", 8, "--top-k", 1, "--temperature", 3]
    status, out, err = distill(*keeping)
    assert (status, err) == (0, "")
    assert f"answers to {sum(calls)} samples: {tmp_path / 'answers'}" in out
    assert "cache: batch 4/4  0 s left" in out
    assert calls == [8, 8, 8, 8]  # four fifths of 40 rows
    assert distill(*keeping)[0] == 0
    fitting = ["fit", *given, "--any-teacher", "--objective", "kd", "--steps", 8, "--batch-size", 8,
               "--student-layers", 2, "--cache", tmp_path / "answers", "--top-k", 1]  # fmt: skip
    status, out, err = distill(*fitting, "--temperature", 3)
    assert status == 0, err
    assert calls[4:] == [1, 1]  # each run compares one kept answer with the teacher
    status, _, err = distill(*fitting, "--temperature", 2)
    assert status == 2
    assert "with temperature=3.0, and this one has temperature=2.0; give it a folder of its own" in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--batch-size", 0], "--batch-size 0 is no number of rows"),
        (["--top-k", 0], "Served(top_k=0) keeps nothing"),
        (["--temperature", 0], "Served(temperature=0.0) softens nothing"),
        (["--teacher", "/no/such"], "teacher '/no/such' cannot be loaded"),
    ],
)
def test_bad_settings_are_one_line(given, changes, message, tmp_path):
    status, _, err = distill("cache", *given, "--output", tmp_path / "answers", *changes)
    assert status == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "answers").exists()
