"""`intervene` on a vLLM engine of nnsight: the same tokens and logits as on the plain model with the same weights.

vLLM itself is not installed: `engine/stand_in.py` stands in for it, and all of nnsight's support of vLLM is its own.
"""

import re

import pytest
import torch

from tests.interventions.engine.engine_side import ALSO, FAILS, OWN, SAME
from tests.other_process import Answers

CASES = [*SAME, *(f"{name}, {also}" for also, names in ALSO.items() for name in names)]


@pytest.fixture(scope="session")
def answers():
    """{case: answer}."""
    with Answers("tests.interventions.engine.engine_side") as answers:
        yield answers


@pytest.mark.parametrize("case", CASES)
def test_the_same_as_on_the_plain_model(case, answers):
    answer = answers[case]
    assert "engine" in answer, answer
    engine, plain = answer["engine"], answer["plain"]
    assert engine["tokens"] == plain["tokens"]
    for mine, theirs in zip(engine["logits"], plain["logits"], strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=1e-4)
    differs = [not torch.allclose(a, b, atol=1e-2) for a, b in zip(plain["logits"], answer["base"], strict=True)]
    assert any(differs), "the intervention changes nothing, so nothing is compared"


@pytest.mark.parametrize("case", [case for case in CASES if "preempted" not in case])
def test_what_is_counted_comes_back(case, answers):
    answer = answers[case]
    assert answer["engine"]["firings"] == answer["plain"]["firings"] > 0
    mine, theirs = answer["change"]
    if len(mine) == len(theirs):
        assert mine == pytest.approx(theirs, rel=1e-3)
    else:
        assert all(0 < each < 1e4 for each in mine)


@pytest.mark.parametrize("case", OWN)
def test_of_the_engine_alone(case, answers):
    assert not {"error", "broke"} & answers[case].keys(), answers[case]
    assert all(answers[case].values()), answers[case]


@pytest.mark.parametrize("case", FAILS)
def test_what_cannot_be_done_says_so_in_one_line(case, answers):
    message = (answers[case] or {"broke": "nothing was raised"}).get("error", "")
    assert re.search(FAILS[case][1], message), answers[case]
    assert "\n" not in message
