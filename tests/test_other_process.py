"""A program in a process of its own answers what it is asked, and says why it cannot.

`python -m tests.test_other_process` is such a program.
"""

import os

import pytest
import torch

from tests.other_process import Answers, serve


def answer(question):
    print("this is no answer")
    if question == "end":
        os._exit(1)
    return {"process": os.getpid(), "tensor": torch.arange(int(question))}


@pytest.fixture
def answers():
    with Answers("tests.test_other_process") as answers:
        yield answers


def test_one_process_answers_all_questions(answers):
    first, second = answers["3"], answers["4"]
    assert first["tensor"].tolist() == [0, 1, 2]
    assert second["tensor"].tolist() == [0, 1, 2, 3]
    assert first["process"] == second["process"] != os.getpid()


def test_an_error_is_told_and_the_next_question_answered(answers):
    with pytest.raises(AssertionError, match="ValueError: invalid literal"):
        answers["three"]
    assert len(answers["1"]["tensor"]) == 1


def test_a_program_that_ended_says_what_it_printed(answers):
    with pytest.raises(AssertionError, match="this is no answer"):
        answers["end"]
    with pytest.raises(AssertionError, match="ended"):
        answers["1"]


def test_no_question_starts_no_process():
    with Answers("tests.nowhere") as answers:
        pass
    assert answers.process is None


if __name__ == "__main__":
    serve(answer)
