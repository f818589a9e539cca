"""Fingerprints: equal for what computes alike, and other for each kind of change."""

from functools import partial

import numpy as np
import pytest
import torch

from interventions import Add, Location, Mean, Rotation, Zero, intervene, logit_difference, run
from interventions.analysis.fingerprints import fingerprint_of, fingerprint_of_model
from interventions.metrics import kl
from tests.interventions.tiny_models import batch, make


def reads(token: int):
    return lambda output: output.logits[:, token]


class Reads:
    """A metric that keeps its token to itself."""

    def __init__(self, token):
        self._token = token

    def __call__(self, output):
        return output.logits[:, self._token]


def written(token: int):
    """Return a function as a user writes it in a notebook, which reads a global."""
    around = {"token": token, "__name__": "__main__"}
    exec("def pick(output): return output[token]\nmetric = lambda output: pick(output.logits[:, 0])", around)
    return around["metric"]


ALIKE = {
    "tensors": (lambda: torch.arange(6.0), lambda: torch.arange(6.0) + 1),
    "shapes": (lambda: torch.zeros(2, 3), lambda: torch.zeros(3, 2)),
    "dtypes": (lambda: torch.zeros(2), lambda: torch.zeros(2, dtype=torch.bfloat16)),
    "nesting": (lambda: [[1], 2], lambda: [1, [2]]),
    "texts": (lambda: ["ab", "c"], lambda: ["a", "bc"]),
    "kinds of numbers": (lambda: 1, lambda: True),
    "arrays": (lambda: np.arange(3), lambda: np.arange(4)),
    "operators": (lambda: Add(torch.ones(2)), lambda: Add(torch.ones(2), scale=2.0)),
    "classes of operators": (Zero, Mean),
    "subspaces": (lambda: Rotation(2, 4), lambda: Rotation(2, 4, seed=1)),
    "metrics": (lambda: logit_difference([0, 1], 2), lambda: logit_difference([1, 1], 2)),
    "references": (lambda: kl(torch.zeros(2, 3)), lambda: kl(torch.eye(3)[:2])),
    "closures": (lambda: reads(0), lambda: reads(1)),
    "private attributes": (lambda: Reads(0), lambda: Reads(1)),
    "globals": (lambda: written(0), lambda: written(1)),
    "partial functions": (lambda: partial(reads, 0), lambda: partial(reads, 1)),
    "functions of torch": (lambda: torch.relu, lambda: torch.sigmoid),
    "slices": (lambda: slice(0, 2), lambda: slice(0, 3)),
    "inputs": (lambda: batch("gpt2"), lambda: batch("gpt2", seed=2)),
    "runs": (lambda: run(make("mlp"), batch("mlp")), lambda: run(make("mlp"), batch("mlp", seed=2))),
    "locations": (lambda: Location(1), lambda: Location(2)),
}


@pytest.mark.parametrize("kind", ALIKE)
def test_values_are_recognised(kind):
    one, other = ALIKE[kind]
    assert fingerprint_of(one()) == fingerprint_of(one())
    assert fingerprint_of(one()) != fingerprint_of(other())


def test_a_metric_that_was_used_is_the_same():
    metric, logits = logit_difference([0, 1], 2), torch.eye(3)[:2]
    before = fingerprint_of(metric)
    metric(logits)
    assert fingerprint_of(metric) == before


def test_an_object_that_holds_itself_is_read_once():
    around: list = [1]
    around.append(around)
    assert fingerprint_of(around) == fingerprint_of(around)


@pytest.mark.parametrize("name", ["gpt2", "mlp"])
def test_a_model_is_recognised_by_weights_dtype_and_configuration(name):
    model = make(name)
    whole = fingerprint_of_model(model)
    assert fingerprint_of_model(make(name)) == whole != fingerprint_of_model(make(name, seed=1))
    with torch.no_grad():
        weight = next(each for each in model.parameters() if each.ndim > 1)
        weight[-1, -1] += 1e-3
    assert fingerprint_of_model(model) != whole
    assert fingerprint_of_model(make(name).bfloat16()) != whole
    if name == "gpt2":
        model = make(name)
        model.config.layer_norm_epsilon *= 2
        assert fingerprint_of_model(model) != whole


def test_adapters_that_are_switched_off_are_another_model():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make("llama"), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    on = fingerprint_of_model(model)
    with model.disable_adapter():
        assert fingerprint_of_model(model) != on
    assert fingerprint_of_model(model) == on


def test_a_row_of_a_large_matrix_that_changes_is_seen():
    model = torch.nn.Linear(700, 700)
    before = fingerprint_of_model(model)
    with torch.no_grad():
        model.weight[123] *= 1.5
    assert fingerprint_of_model(model) != before


def activated(function):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 3), function, torch.nn.Linear(3, 3)).eval()


def test_a_model_with_the_same_weights_that_computes_otherwise_is_another():
    one = fingerprint_of_model(activated(torch.nn.ReLU()))
    assert one == fingerprint_of_model(activated(torch.nn.ReLU()))
    others = [torch.nn.GELU(), torch.nn.LeakyReLU(0.1), torch.nn.LeakyReLU(0.2)]
    assert len({one, *(fingerprint_of_model(activated(each)) for each in others)}) == 4


def test_a_model_into_which_a_block_writes_is_another():
    model = make("gpt2")
    alone, found = fingerprint_of_model(model), set()
    for at, op in ((1, Zero()), (2, Zero()), (1, Add(torch.ones(16))), (1, Add(2 * torch.ones(16)))):
        with intervene(model, Location(at), op=op):
            found.add(fingerprint_of_model(model))
            assert fingerprint_of_model(make("gpt2")) == alone
            run(model, batch("gpt2"))
            found.add(fingerprint_of_model(model))  # the same after it wrote
    assert len(found | {alone}) == 5
    assert fingerprint_of_model(model) == alone
