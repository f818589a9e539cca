"""Nothing imports nnsight, which changes torch for the whole process, until a model of nnsight is passed."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
import torch

backward, run_backward = torch.Tensor.backward, torch.autograd.backward
attributes, plain = set(dir(torch.Tensor)), set(dir(object))

import distill
import interventions
from interventions import Location, Mixup, describe, interchange, intervene, record, run, sweep

net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
base, source, at = torch.ones(3, 4), torch.zeros(3, 4), Location(module="1")
with intervene(net, at, op=Mixup(0.5)), record(net, at) as activations:
    net(base).sum().backward()
interchange(net, run(net, base, at), source, at)
sweep(net, base, source, [at], positions=None, metric=lambda logits: logits[:, 0])
describe(net)

assert torch.Tensor.backward is backward and backward.__module__ == "torch._tensor", torch.Tensor.backward
assert torch.autograd.backward is run_backward
assert not hasattr(object, "save") and not hasattr(net, "save") and not hasattr(torch.Tensor, "save")
assert set(dir(object)) == plain
loaded = sorted(name for name in sys.modules if name.split(".")[0] == "nnsight")
assert not loaded, loaded
assert not any(name.startswith("interventions.tracing") for name in sys.modules)
"""


def test_a_plain_model_leaves_torch_as_it_is():
    folder = Path(__file__).parents[3]
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_it_is_nnsight_that_changes_torch():
    """So the test above would notice."""
    program = "import torch; backward = torch.Tensor.backward; import nnsight; assert hasattr(object, 'save'); "
    program += "assert torch.Tensor.backward is not backward"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
