"""What a step holds whose logits are large: counted here at a small size, and committed for a large one."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from distill import Rows, evaluate

REPOSITORY = Path(__file__).parents[1]
sys.path.append(str(REPOSITORY / "benchmarks"))  # as for a script that is run there
BENCHMARK = importlib.import_module("chunked_losses")
PAGE = json.loads((REPOSITORY / "benchmarks" / "chunked_losses.json").read_text(encoding="utf-8"))
MOST = {"KD + CausalLM + DIITO": 2.0}


@pytest.mark.parametrize("name", BENCHMARK.OBJECTIVES)
def test_a_step_in_parts_holds_little_beside_its_logits(name, monkeypatch):
    monkeypatch.setattr(BENCHMARK, "WIDTH", 16)
    torch.manual_seed(0)
    teacher, student = BENCHMARK.model(2, 2000, 256).eval().requires_grad_(False), BENCHMARK.model(2, 2000, 256)
    found = BENCHMARK.compared(name, (teacher, student), BENCHMARK.data(4, 256, 2000), 1)
    assert found["in parts: peak over logits"] < MOST.get(name, 1.5) < 4 < found["whole: peak over logits"]
    assert found["difference of terms, relative"] < 1e-6
    assert found["difference of gradients, over the largest"] < 1e-5


def test_an_evaluation_in_parts_holds_little_beside_its_logits(monkeypatch):
    """Perplexity, agreement, divergence and accuracy of decoders."""
    monkeypatch.setattr(BENCHMARK, "WIDTH", 16)
    torch.manual_seed(0)
    teacher, student = BENCHMARK.model(2, 2000, 256).eval(), BENCHMARK.model(2, 2000, 256).eval()
    rows, found, most = Rows({"input_ids": torch.randint(3, 2000, (8, 256))}), {}, {}
    for whole in (True, False):
        with BENCHMARK.whole(logits=whole), BENCHMARK.LiveBytes(torch.nn.ModuleList([teacher, student])) as live:
            found[whole] = evaluate(teacher, student, {}, rows)
        most[whole] = live.most / (rows.table["input_ids"].numel() * 2000 * 4)
    assert most[False] < 1.5 < 2 < most[True]
    assert found[False].figures == pytest.approx(found[True].figures, rel=1e-6)


def test_the_bytes_that_are_alive_are_counted():
    with BENCHMARK.LiveBytes(torch.nn.Linear(1, 1)) as live:
        kept = torch.zeros(1000)
        again = kept.view(10, 100)  # of the same memory
        (kept + 1).sum()
        (kept + again.flatten() + 1).sum()
    assert live.most == 4 * 3000


def test_the_committed_figures_keep_to_the_limits():
    assert PAGE["settings"]["rows"] * PAGE["settings"]["length"] == 4096
    assert PAGE["settings"]["vocabulary"] == 32000
    assert PAGE["steps"].keys() == BENCHMARK.OBJECTIVES.keys()
    for name, found in PAGE["steps"].items():
        assert found["in parts: peak over logits"] <= MOST.get(name, 1.5)
        assert found["in parts over whole: seconds"] <= 1
