"""Promise 1, for sites inside attention, compiled code and generation: what does not happen is said."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

from interventions import Add, InterventionError, Location, Zero, interchange, intervene, record, run
from interventions.locations import HEAD_SITES
from interventions.models.architectures import architecture
from interventions.models.overrides import EXCEPTIONS, register_blocks
from tests.interventions.tiny_models import VOCABULARY, batch, make

from .attentions import PATTERNS, at

PUSH = Add(torch.tensor(1.5))
SETTINGS = dict(max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True, eos_token_id=None)


def prompts(size: int = 2, length: int = 4) -> dict:
    ids = torch.randint(1, VOCABULARY, (size, length), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def generated(model, **settings) -> torch.Tensor:
    return torch.stack(model.generate(**prompts(), **{**SETTINGS, **settings}).logits)


@torch.no_grad()
@pytest.mark.parametrize("site", [*HEAD_SITES, "mlp_activation"])
def test_a_part_of_the_model_that_does_not_run(site):
    model, inputs, place = make("t5"), batch("t5"), Location(1, site, stack="encoder")
    encoded = model.encoder(inputs.pop("input_ids"))
    for block in (intervene(model, place, op=Zero()), record(model, place)):
        with pytest.raises(InterventionError, match=rf"encoder/{site}\.1 never ran in.*describe\(model\)"), block:
            model(**inputs, encoder_outputs=encoded)
    with pytest.raises(InterventionError, match=rf"encoder/{site}\.1 never ran in(side)? the counterfactual run"):
        interchange(model, {**inputs, "encoder_outputs": encoded}, None, {place: Zero()})


@pytest.mark.parametrize("site", HEAD_SITES)
def test_never_ran_is_not_said_while_another_exception_passes(site):
    model = make("llama")
    for block in (intervene(model, at(site), op=Zero()), record(model, at(site))):
        with pytest.raises(ZeroDivisionError), block:
            1 / 0  # noqa: B018
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        interchange(model, {"no such argument": 1}, None, {at(site): Zero()})


def test_never_ran_is_not_said_to_a_generator_that_is_closed():
    def waiting():
        with intervene(make("llama"), at("query"), op=Zero()):
            yield

    going = waiting()
    next(going)
    going.close()


@torch.no_grad()
@pytest.mark.parametrize("site", HEAD_SITES)
def test_sources_that_do_not_fit(site):
    model, inputs, place = make("llama"), batch("llama"), at(site)
    with pytest.raises(InterventionError, match="is a run of another model"):
        interchange(model, inputs, run(make("llama"), inputs, at=[place]), place)
    for positions, match in (
        (None, "in the source run; pad both"),
        (-1, "the base has 3 examples and the source .* 2"),
    ):
        with pytest.raises(InterventionError, match=match):
            interchange(model, inputs, batch("llama", 2, size=2), place, positions=positions)
    if site not in PATTERNS:
        with pytest.raises(InterventionError, match=r"position 5 of row 0, length 5|positions=5"):
            interchange(model, inputs, None, {place: Zero()}, positions=5)
    source = run(model, inputs, at=[place])
    source.activations[place][0, 0, 0, 0] = torch.nan
    with pytest.raises(InterventionError, match=rf"the source has NaN at {site}\.1 in 1 of"):
        interchange(model, inputs, source, place)


@torch.no_grad()
@pytest.mark.parametrize("site", HEAD_SITES)
def test_positions_on_padding(site):
    model, inputs = make("llama"), batch("llama")
    inputs["attention_mask"][0, 3:] = 0
    with pytest.raises(InterventionError, match=r"row 0, length 3"):
        interchange(model, inputs, None, {at(site): Zero()}, positions=4)


@torch.no_grad()
@pytest.mark.parametrize("wrong", [lambda b: b[:, :1], lambda b: b.double(), lambda b: None, lambda b: b.sum()],
                         ids=["narrower", "double", "nothing", "scalar"])  # fmt: skip
@pytest.mark.parametrize("site", HEAD_SITES)
def test_what_an_operator_returns_must_fit(site, wrong):
    model = make("gpt2")
    with pytest.raises(InterventionError, match=rf"returned .* for torch\.float32 \[3, .*\] at {site}\.1; return"):
        interchange(model, batch("gpt2"), None, {at(site): lambda base, source, generator: wrong(base)})


@torch.no_grad()
@pytest.mark.parametrize("size", [3, 1])
def test_a_source_of_another_batch_size_at_a_step(size):
    model = make("gpt2")
    source = run(model, prompts(size, 6))
    with (
        pytest.raises(InterventionError, match=f"{size}"),
        intervene(model, Location(1), source=source, steps=1),
    ):
        generated(model, use_cache=False)


@torch.no_grad()
@pytest.mark.parametrize("outer", [DataParallel], ids=["DataParallel"])
def test_padding_is_known_to_a_model_around_the_model(outer):
    model, inputs = make("gpt2"), prompts()
    inputs["attention_mask"][0, 2:] = 0
    answers = []
    for called in (model, outer(model)):
        with intervene(called, Location(1), op=Zero(), positions=-1):
            answers.append(called(inputs["input_ids"], None, inputs["attention_mask"]).logits)
    assert torch.equal(*answers)


@torch.no_grad()
@pytest.mark.parametrize("site", ["key", "value"])
def test_a_generation_by_the_model_inside_the_model(site):
    model = make("llama")
    with intervene(model, at(site), op=PUSH):
        expected = generated(model)
    with intervene(DataParallel(model), at(site), op=PUSH):
        assert torch.allclose(generated(model), expected, atol=1e-4)


def test_an_exception_holds_inside_another_model():
    class Misleading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body = (nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2)) for _ in range(2))

    register_blocks("Misleading", "body")
    try:
        assert [stack.path for stack in architecture(Misleading()).stacks] == ["body"]
        assert [stack.path for stack in architecture(DataParallel(Misleading())).stacks] == ["module.body"]
    finally:
        EXCEPTIONS.pop("Misleading")


@torch.no_grad()
@pytest.mark.parametrize("op", [lambda b, s, g: b.mul_(2), lambda b, s, g: s.mul_(2)], ids=["base", "source"])
def test_an_operator_that_writes_in_place_raises_or_changes_nothing(op):
    model, base_place, place = make("llama"), Location(0), Location(1, "block_input")
    base, source = run(model, batch("llama"), at=[base_place]), run(model, batch("llama", 2), at=[place])
    kept = base.activations[base_place].clone(), source.activations[place].clone()
    try:
        interchange(model, base, source, place, op=op)
    except InterventionError:
        return
    assert torch.equal(base.activations[base_place], kept[0])
    assert torch.equal(source.activations[place], kept[1])
