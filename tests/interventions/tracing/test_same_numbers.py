"""The same numbers under nnsight as on the plain model, bit for bit; and the same errors, in the same words."""

import re
from functools import cache

import pytest
import torch

from interventions.locations import SITES
from tests.interventions.tracing.cases import CASES, TEXT
from tests.interventions.tracing.programs import OPERATORS, computed
from tests.interventions.tracing.subjects import KINDS, NAMES, plain

# What happens here when a trace of the user's runs elsewhere: counts, draws, and what `record` keeps.
LOCAL = ("firings", "change", "then", "recorded")
# The two sides call a model in different ways, and say so.
CALLS = ("open a trace of the model inside the block", "call the model inside the block")


def in_plain_words(error):
    return re.sub(r"0x[0-9a-f]+", "0x…", error).replace(*CALLS)


@cache
def left_alone(name):
    """The logits of a plain model into which nothing is written."""
    subject = plain(name)
    return subject.call(subject.base).detach()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same(case, nnsight_side):
    theirs, ours = nnsight_side[str(case)], computed(case, plain(case.model))
    assert "broke" not in {*ours, *theirs}, ours.get("broke") or theirs["broke"]
    if "error" in {*ours, *theirs}:
        assert case.fails, ours.get("error", theirs.get("error"))
        assert in_plain_words(ours.get("error", "no error")) == in_plain_words(theirs.get("error", "no error"))
        assert re.search(case.fails, ours["error"])
        return
    assert not case.fails
    if case.kind == "remote":
        ours, theirs = ({name: each for name, each in answer.items() if name.split()[-1] not in LOCAL}
                        for answer in (ours, theirs))  # fmt: skip
    assert ours.keys() == theirs.keys()
    if case.changes and "logits" in ours:
        assert not torch.equal(ours["logits"], left_alone(case.model)), "nothing is changed, so nothing is compared"
    apart = {name: distance(ours[name], theirs[name]) for name in ours}
    assert {name: by for name, by in apart.items() if not by <= case.within} == {}


def distance(ours, theirs):
    """The largest difference; 0 if they are the same bit for bit."""
    if torch.equal(ours, theirs):
        return 0.0
    return (ours.float() - theirs.float()).abs().max().item() if ours.shape == theirs.shape else torch.inf


def test_each_case_has_its_name():
    assert len({str(case) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("cnn", "recurrent")])
def test_all_that_the_issue_names_is_compared(name):
    mine = {str(case) for case in CASES if case.model == name and not case.fails}
    if name in TEXT:
        assert {op for op in OPERATORS if any(f"{name} {op} at " in case for case in mine)} == set(OPERATORS)
        assert {kind for kind in KINDS for case in CASES if (case.model, case.kind) == (name, kind)} == set(KINDS)
    refused = {str(case).split()[1].split(".")[0] for case in CASES if case.model == name and case.fails}
    sites = {site for site in SITES if any(re.search(rf"[ /]{site}\b.* swapped", case) for case in mine)}
    assert sites | refused >= set(SITES)
