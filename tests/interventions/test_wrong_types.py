"""Arguments of a wrong type raise our own error where annotations are not enforced, as they are in other tests."""

import json
import subprocess
import sys

import pytest

CASES = {
    "select('last', torch.ones(1, 3).bool())": "positions='last' is not understood; give an int",
    "select([0, 'last'], torch.ones(1, 3).bool())": "is not understood",
    "select(1.0, torch.ones(1, 3).bool())": "positions=1.0 is not understood",
    "select([[0], 1], torch.ones(2, 3).bool())": "is not understood",
    "Location('3')": "layer='3' is not a whole number; write Location(3)",
    "Location(3.0)": "layer=3.0 is not a whole number",
    "Location(True)": "layer=True is not a whole number",
    "Location(3, dims='ab')": "dims='ab' are not whole numbers; write dims=range(0, 64) or dims=[1, 5]",
    "Location(3, dims=1.5)": "dims=1.5 are not whole numbers",
    "Location(3, dims=[True])": "are not whole numbers",
    "Location(3, 7)": "site 7 does not exist",
    "Location(module=7)": "module=7 is not a module path",
    "run(net, x).activations[3]": "a location is needed, and int 3 was given; write Location(3)",
    "run('gpt2', x)": "a torch model is needed and str was given; pass the nn.Module itself",
    "intervene(net, 3, op=Zero()).__enter__()": "a location is needed, and int 3 was given",
    "intervene(net, module='0').__enter__()": "no operator was given; write op=Zero(), or source=",
    "intervene(net, {Location(module='0'): 3}).__enter__()": "3 at module:0 is not an operator",
    "intervene(net, head=3, op=Zero()).__enter__()": "the keywords of a location are layer, site, heads",
}


@pytest.fixture(scope="module")
def messages() -> dict[str, str]:
    code = f"""
import json, torch
from interventions import *
net, x, found = torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.ones(1, 2), {{}}
for text in {list(CASES)!r}:
    try:
        eval(text)
        found[text] = "nothing was raised"
    except Exception as error:
        found[text] = f"{{type(error).__name__}}: {{error}}"
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("text", CASES)
def test_wrong_types_raise(messages, text):
    assert messages[text].startswith("InterventionError: ")
    assert CASES[text] in messages[text]
