"""The laws can fail: of a model in which something else than its blocks, or its final norm, is taken for them."""

from collections.abc import Iterator

import pytest
from torch import nn

from interventions.models import architectures
from interventions.models.overrides import EXCEPTIONS, Blocks
from tests.conformance.building import quiet, subject
from tests.conformance.cases import Case
from tests.conformance.laws import LAWS


def reason(model_type: str, law: str) -> str | None:
    with quiet():
        return LAWS[law](Case(subject(model_type)))


def norms(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, nn.LayerNorm))


@pytest.mark.parametrize("paths", [("ffns",), ("attentions",), ("attentions", "ffns")])
def test_a_stack_past_which_the_residual_stream_goes_breaks_the_last_swap(paths, monkeypatch):
    assert reason("xlm", "last swap") is None
    monkeypatch.setitem(EXCEPTIONS, "xlm", Blocks(paths, "halves of its layers"))
    assert "the last block does not decide the output alone" in reason("xlm", "last swap")


@pytest.mark.parametrize("model_type", ["gpt2", "bart", "vit"])
def test_the_first_norm_that_was_registered_breaks_the_law_of_the_final_norm(model_type, monkeypatch):
    assert reason(model_type, "final norm") is None
    monkeypatch.setattr(architectures, "final_norm", lambda model, *_: next(norms(model)))
    assert "never runs after the last block" in reason(model_type, "final norm")
