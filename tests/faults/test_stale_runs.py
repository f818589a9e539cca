"""A run that is older than its model is refused, or answers as a fresh one; where nothing changed, it is taken up."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, parametrize, prune, vector_to_parameters

from interventions import InterventionError, Location, Zero, interchange, intervene, record, run
from interventions.execution import numbers, stamps
from tests.interventions.tiny_models import INNER, OTHERS, TRANSFORMERS, answer, batch, make, middle

KINDS = [*TRANSFORMERS, *OTHERS]


# --- changes ----------------------------------------------------------------------------------------------------------


def matrix(model: nn.Module) -> nn.Parameter:
    """A weight that every answer depends on."""
    return next(p for p in reversed(list(model.parameters())) if p.ndim > 1)


def early(model: nn.Module) -> nn.Parameter:
    return [p for p in model.parameters() if p.ndim > 1][1 if len(list(model.parameters())) > 8 else 0]


def by_data(model):
    early(model).data.mul_(1.5)


def by_a_row_of_data(model):
    early(model).data[-1] = 0


def by_a_column_of_data(model):
    early(model).data[..., 1] = 0


def by_one_number_of_numpy(model):
    early(model).detach().numpy().reshape(-1)[-1] += 1


def by_an_exchange_in_numpy(model):
    rows = early(model).detach().numpy()
    rows[:] = rows[::-1].copy()


def by_signs_in_numpy(model):
    early(model).detach().numpy()[:] *= -1


def by_other_data(model):
    early(model).data = early(model).data * 2


def by_the_last_weight(model):
    matrix(model).data.neg_()


def by_a_vector(model):
    vector_to_parameters(parameters_to_vector(model.parameters()) * 1.1, model.parameters())


def by_loading(model):
    model.load_state_dict({k: v * 2 if v.is_floating_point() else v for k, v in model.state_dict().items()})


def by_assigned_loading(model):
    state = {k: v * 2 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def by_a_step(model):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def by_the_mode(model):
    model.train()


def by_the_mode_of_a_part(model):
    next(iter(model.children())).train()


def by_the_type(model):
    model.double()


def by_the_type_and_back(model):
    model.half().float()


def by_another_module(model):
    path, old = next((p, m) for p, m in model.named_modules() if isinstance(m, nn.Linear))
    model.set_submodule(path, nn.Linear(old.in_features, old.out_features, bias=old.bias is not None))


def by_a_setting(model):
    for module in model.modules():
        if hasattr(module, "eps") or hasattr(module, "variance_epsilon"):
            module.eps = module.variance_epsilon = 1.5


def by_a_parametrization(model):
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    module = next(m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    parametrize.register_parametrization(module, "weight", Twice())


def by_pruning(model):
    prune.l1_unstructured(next(m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)), "weight", 0.5)


def by_a_hook(model):
    list(model.modules())[-1].register_forward_hook(lambda module, args, output: output * 2)


def by_another_forward(model):
    module = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    old = module.forward
    module.forward = lambda *args: 2 * old(*args)


def by_quantizing(model):
    if any(isinstance(module, nn.LSTM) for module in model.modules()):
        return  # it becomes another class, which is no place of ours
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)


def by_statistics(model):
    model.bn1.running_mean.add_(0.5)


def by_statistics_of_data(model):
    model.bn1.running_var.data.mul_(3)


def by_statistics_in_numpy(model):
    model.layer1[0].bn2.running_mean.numpy()[:] = 0.7


def by_statistics_of_a_train_run(model):
    answer(model.train(), batch("cnn", 5))
    model.eval()


def by_untying(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)


def by_an_activation(model):
    for block in model.transformer.h:
        block.mlp.act = nn.ReLU()


def by_a_number_of_the_config(model):
    model.config.resid_pdrop = 0.3
    model.transformer.h[0].attn.scale_attn_weights = False


ALL = [value for name, value in list(globals().items()) if name.startswith("by_")]
OF_ONE = {**dict.fromkeys([by_untying, by_an_activation, by_a_number_of_the_config], "gpt2")}
OF_ONE |= dict.fromkeys([each for each in ALL if "statistics" in each.__name__], "cnn")
CASES = [(kind, change) for kind in KINDS for change in ALL if OF_ONE.get(change, kind) == kind]


def outcomes(model: nn.Module, kind: str, change: Callable[[nn.Module], object]) -> list[str]:
    """How a base, a source and a late activation of a run fare after a change: refused, the same as fresh, or wrong."""
    place, other = middle(kind), batch(kind, 2)
    inner = Location(
        module={**{name: paths[0] for name, paths in INNER.items()}, "cnn": "fc", "mlp": "0"}.get(kind, "embed")
    )
    old = run(model, batch(kind), at=place)
    change(model)
    uses = {
        "base": lambda given: interchange(model, given, other, place).logits,
        "source": lambda given: interchange(model, other, given, place).logits,
        "late": lambda given: (given if given is old else run(model, given)).activations[inner],
    }
    found = []
    for name, use in uses.items():
        torch.manual_seed(0)
        try:
            now = use(old)
        except InterventionError:
            found.append("refused")
            continue
        torch.manual_seed(0)
        found.append("same" if torch.equal(now, use(old.inputs)) else f"{name} is stale")
    return found


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "change"), CASES, ids=lambda each: getattr(each, "__name__", each))
def test_a_run_older_than_its_model_is_never_used(kind, change):
    assert set(outcomes(make(kind), kind, change)) <= {"refused", "same"}


# --- adapters ---------------------------------------------------------------------------------------------------------


def lora(model: nn.Module, **settings: object) -> nn.Module:
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False, **settings)
        adapted = peft.get_peft_model(model, config)
        adapted.add_adapter("other", config)
    return adapted.eval()


def by_disabling(model):
    model.base_model.disable_adapter_layers()


def by_another_adapter(model):
    model.set_adapter("other")


def by_scaling(model):
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 3


def by_merging(model):
    model.merge_adapter()


def by_deleting(model):
    model.delete_adapter("default")


def by_numbers_of_the_adapter(model):
    next(p for name, p in model.named_parameters() if "lora_B.default" in name).data.add_(1)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [by_disabling, by_another_adapter, by_scaling, by_merging, by_deleting, by_numbers_of_the_adapter],
)
def test_a_run_of_other_adapters_is_never_used(change):
    model, place, other = lora(make("llama")), Location(1), batch("llama", 2)
    old = run(model, batch("llama"), at=place)
    before = old.logits.clone()
    change(model)
    assert not torch.allclose(run(model, old.inputs).logits, before) or change is by_merging
    for base, source in ((old, other), (other, old)):
        with pytest.raises(InterventionError, match=r"the run is older than the model: .* run it again: run\(model"):
            interchange(model, base, source, place)


@torch.no_grad()
def test_an_adapter_that_is_switched_off_for_a_while():
    model, place, other = lora(make("llama")), Location(1), batch("llama", 2)
    old = run(model, batch("llama"), at=place)
    expected = interchange(model, old, other, place).logits
    with model.disable_adapter(), pytest.raises(InterventionError, match="older than the model"):
        interchange(model, old, other, place)
    assert torch.equal(interchange(model, old, other, place).logits, expected)


# --- no change --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_changes_nothing_is_never_refused(kind, training, tmp_path):
    model, place = make(kind).train(training), middle(kind)
    old, other = run(model, batch(kind), at=place), batch(kind, 2)
    answer(model, batch(kind, 3, size=2)).square().sum().backward()
    with intervene(model, place, op=Zero()), record(model, place):
        answer(model, other)
    if kind in ("gpt2", "llama"):
        model.generate(**batch(kind), max_new_tokens=3, do_sample=False)
        model(**batch(kind), output_hidden_states=True, use_cache=True)
    torch.save(copy.deepcopy(model).state_dict(), tmp_path / "weights")
    model.zero_grad()
    model.train(not training).train(training).requires_grad_(False)
    assert interchange(model, old, run(model, other, at=place), place).is_counterfactual
    assert interchange(model, other, old, place).is_counterfactual


def test_large_models_are_seen_to_change_in_any_row_and_column(monkeypatch):
    monkeypatch.setattr(numbers, "WHOLE", 0)
    for shape in ((4, 9), (9, 4), (7, 7), (1, 6), (6, 1), (12, 8), (8, 12), (3, 4, 6), (5,), (64, 30), (30, 64)):
        module = nn.ParameterList([nn.Parameter(torch.randn(shape))])
        rows = module[0].detach().view(-1, shape[-1]).numpy()
        assert module[0][None].numel() >= len(rows.reshape(-1)[:: numbers._stride(module[0].shape)])
        for axis in (0, 1):
            for which in range(rows.shape[axis]):
                made = stamps.Stamp.of(module)
                rows[(slice(None),) * axis + (which,)] += 1
                assert not made.is_of(module), (shape, axis, which)
