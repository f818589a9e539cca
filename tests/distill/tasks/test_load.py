import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distill.errors import DistillError
from distill.tasks import load, names


def test_names():
    assert names() == ("pvr", "agreement", "digits", "mnist", "sst2")


@pytest.mark.parametrize("name", ["pvr", "agreement", "digits"])
def test_an_embedded_task_loads_by_name_and_fraction_leaves_the_test_alone(name):
    whole = load(name)
    part, same, other = (load(name, fraction=0.01, seed=seed) for seed in (0, 0, 1))
    assert whole.name == name
    assert len(part.train) == len(whole.train) // 100
    assert len(part.test) == len(whole.test)
    first = part.train.columns[0]
    rows = [task.train.batch(range(len(part.train)))[first] for task in (part, same)]
    assert torch.equal(*rows)
    assert not torch.equal(part.train.table["labels"], other.train.table["labels"])


@pytest.mark.parametrize("name", ["pvr", "agreement", "digits"])
def test_the_network_depends_on_its_seed_alone(name):
    network = load(name, fraction=0.001).network
    one, same, other = (torch.cat([weight.flatten() for weight in network(seed).parameters()]) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


UNTOUCHED = """
import random, numpy, torch
from distill.tasks import load

def states():
    return torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())

before = states()
for name in ("pvr", "agreement", "digits"):
    task = load(name, fraction=0.5, seed=3)
    task.network(1)
    assert states() == before, name
"""


def test_no_global_generator_is_touched():
    # In a process of its own, since beartype, which checks types here, itself draws from Python's generator.
    subprocess.run([sys.executable, "-c", UNTOUCHED], check=True, cwd=Path(__file__).parents[3])


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("pvrr", {}, "no task 'pvrr'; did you mean 'pvr'. tasks are pvr, agreement, digits, mnist, sst2"),
        ("qqqq", {}, "no task 'qqqq'; tasks are"),
        ("my.csv", {}, "'my.csv' is a file, .* --data my.csv"),
        (None, {}, "no task was named and no data"),
        ("pvr", {"data": "x.csv"}, "'pvr' takes no data"),
        ("sst2", {"text": "body"}, "'sst2' takes no text .*'body'"),
        ("pvr", {"fraction": 0.0}, r"fraction=0.0 .* fraction=0\.1"),
        (None, {"data": "x.csv", "fraction": 1.5}, "fraction=1.5"),
    ],
)
def test_what_cannot_be_loaded_says_why(name, settings, message):
    with pytest.raises(DistillError, match=message) as raised:
        load(name, **settings)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["pvr", "agreement"])
def test_the_network_knows_the_classes_of_its_task(name):
    task = load(name, fraction=0.001)
    config = task.network(0).config
    assert tuple(config.id2label[i] for i in range(config.num_labels)) == task.classes
