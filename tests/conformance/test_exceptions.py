"""The table of exceptions: an entry decides where the blocks are, and only where its lists exist."""

import pytest
from torch import nn

from interventions import InterventionError
from interventions.models.architectures import architecture
from interventions.models.overrides import EXCEPTIONS, register_blocks


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])
        self.body = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)) for _ in range(3)])


def paths(model: nn.Module) -> list[str]:
    return [stack.path for stack in architecture(model).stacks]


@pytest.fixture
def _restored(monkeypatch):
    for name in ("Net", "Sequential"):
        monkeypatch.setitem(EXCEPTIONS, name, None)


@pytest.mark.usefixtures("_restored")
def test_an_entry_decides():
    assert paths(Net()) == ["stem", "body"]
    register_blocks("Net", "body")
    assert paths(Net()) == ["body"]


@pytest.mark.usefixtures("_restored")
def test_a_model_with_a_head_in_front():
    register_blocks("Sequential", "body")
    assert paths(nn.Sequential(Net(), nn.Linear(2, 2))) == ["0.body"]


@pytest.mark.usefixtures("_restored")
def test_an_entry_whose_lists_are_not_there_is_passed_over():
    register_blocks("Net", "trunk")
    assert paths(Net()) == ["stem", "body"]


def test_stages_of_blocks_are_one_stack():
    stages = nn.ModuleList([nn.ModuleList([nn.Sequential(nn.Linear(2, 2))] * 1) for _ in range(3)])
    model = nn.Module()
    model.stages = stages
    (stack,) = architecture(model).stacks
    assert stack.path == "stages"
    assert stack.blocks == tuple(stage[0] for stage in stages)


@pytest.mark.parametrize("path", [None, 3, ["body"]])
def test_a_path_is_a_text(path):
    with pytest.raises(InterventionError, match=r"register_blocks\('Net', .*\): a path must be a text; write"):
        register_blocks("Net", "body", path)
    assert "Net" not in EXCEPTIONS
