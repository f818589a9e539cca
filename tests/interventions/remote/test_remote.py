"""A model of nnsight here, simulated as remote, and on a host without our packages answers as the plain model does."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.interventions.remote import asking, hostile, tiny

REPOSITORY = Path(__file__).parents[3]
WHERE = ("here", "simulated", "host", "absent")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("remote") / "answers.pt"
    command = [sys.executable, "-m", "tests.interventions.remote.asking", str(file)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.load(file, weights_only=False)


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    model, tokenizer = tiny.network(), tiny.tokenizer()

    def generate(text):
        return model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=5, do_sample=False)

    return asking.asked(model) | asking.traces(model, lambda inputs: model(**inputs).logits, generate)


NAMES = (
    "run|run_to|keep|swap|one head|pattern|subspace|several|function|mean|draws|run as source|own words|own imports|"
    "sweep|own trace|nested|generation|values in the cache"
).split("|")


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_numbers_as_the_plain_model(name, where, found, plain):
    expected, answered = plain[name], found[where][name]
    pairs = zip(*([each] if isinstance(each, torch.Tensor) else each for each in (expected, answered)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_every_answer_is_compared(plain, found):
    assert set(NAMES) == set(plain) == set(found["host"])


def test_interventions_change_something(plain):
    untouched = tiny.network()(**asking.drawn(0)).logits
    for name in ("swap", "one head", "pattern", "subspace", "several", "function", "mean"):
        assert not torch.equal(plain[name][0], untouched), name
    assert not torch.equal(plain["draws"][0], plain["draws"][1])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a step that is never made", ["block_output.1", "steps=7", "nothing was written"]),
        ("a place that never runs", ["transformer.h.0.attn#self__upcast_and_reordered_attn_0", "never ran"]),
        ("an operation that is not there", ["'nope_0'", "did you mean", "describe(model)"]),
        ("an inner operation that is not there", ["attn.attention_interface_1 has no operation 'nope_0'"]),
        ("a position that is not there", ["positions=9", "length 6"]),
        ("a record of a remote trace", ["record block", "run(model, inputs, at=[…], remote=…)"]),
        ("counts", ["on another machine", "open a trace on this machine"]),
        ("a re-entrant checkpoint", ["torch.utils.checkpoint", "turn its checkpointing off"]),
        ("a model without a name", ["was made of a module, without one", "remote='local'"]),
    ],
)
def test_errors_come_back_in_our_words(name, words, found):
    message = found["errors"][name]
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert not message.startswith("RemoteError")


def test_a_model_that_runs_elsewhere_is_not_loaded_here(found):
    assert found["loaded"] is False


def test_an_operation_of_the_model_itself(found):
    logits = tiny.network()(**asking.drawn(0)).logits
    assert all(torch.equal(each, logits) for each in found["model's own operation"])


HOSTILE = [
    *hostile.OPERATORS,
    *("another thread", "another task", "the task itself", "an edited copy", "a run of a closed block"),
    *("five tokens, four heads", "four tokens, four heads", "an operation inside what is computed by us"),
    *("a subspace without a width", "no tensor", "looked up tokens", "keep", "query", "steps across traces"),
]


@pytest.mark.parametrize("name", HOSTILE)
def test_what_once_went_wrong(name, found):
    assert found["hostile"][name]


def test_all_that_once_went_wrong_is_looked_at(found):
    assert set(found["hostile"]) == set(HOSTILE)


def test_nothing_is_left_behind(found):
    assert found["left"] == {"modules": [], "edits": 0, "hooks": 0, "opened": []}
    assert found["edits"] == 0
    assert found["touched"] == []
