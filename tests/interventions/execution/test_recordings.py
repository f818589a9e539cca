"""A counterfactual that resumes from a base run is the whole run: in bits, in gradients, in dropout, and cheaper."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from interventions import InterventionError, Location, Mixup, Noise, Swap, Zero, interchange, intervene, run
from interventions.models.architectures import architecture
from tests.interventions.models.test_structure import calls_of, of_depth
from tests.interventions.tiny_models import INNER, LAYERS, TRANSFORMERS, answer, batch, make, places

MODES = {
    "plain": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
}
CONTEXTS = pytest.mark.parametrize("context", MODES.values(), ids=list(MODES))


class InPlace(nn.Module):
    """A block that goes on in place: in what it was given, in what it computed, or in neither."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.linear = where, nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.where == "input":
            x += 1
        out = self.linear(x)
        return out.relu_() if self.where == "output" else out


class Blocks(nn.Module):
    def __init__(self, where: str = "") -> None:
        super().__init__()
        self.layers = nn.ModuleList(InPlace(where) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        for layer in self.layers:
            x = layer(x)
        return x


def vectors(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(seed))


def count_calls(model: nn.Module) -> list[str]:
    """Names of the blocks that really compute, counted at their first inner layer."""
    calls = []
    for stack in architecture(model).stacks:
        for i, block in enumerate(stack.blocks):
            leaf = next(
                module for module in block.modules() if not list(module.children()) and list(module.parameters())
            )
            leaf.register_forward_hook(lambda *_, called=f"{stack.name}{i}": calls.append(called))
    return calls


# --- the same bits ----------------------------------------------------------------------------------------------------


@CONTEXTS
@pytest.mark.parametrize("name", [*TRANSFORMERS, "cnn"])
def test_resumed_is_the_whole_run(name, context):
    model, at = make(name), places(name)
    with context():
        base, sources = run(model, batch(name)), run(model, batch(name, seed=2), at)
        for place in [*at, at[-1:] + at[:3], at[len(at) // 2 :]]:
            whole = interchange(model, base.inputs, sources, place, resume=False).logits
            assert torch.equal(interchange(model, base, sources, place).logits, whole), place
            assert not torch.equal(whole, base.logits), place


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_resumed_is_the_whole_run_for_positional_inputs_and_a_cache_by_default(name):
    model, ids, source = make(name), batch(name)["input_ids"], batch(name, seed=2)["input_ids"]
    base = run(model, ids)
    whole = interchange(model, ids, source, Location(1))
    assert torch.equal(interchange(model, base, source, Location(1)).logits, whole.logits)
    assert interchange(model, base, source, Location(1)).output.get("past_key_values") is None


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_with_dropout_resumed_is_a_seeded_whole_run(name):
    model, base_inputs, source = make(name), batch(name), run(make(name), batch(name, seed=2)).activations
    model.train()
    for place in (Location(0), Location(1, "block_input"), Location(1), Location(module=INNER[name][0])):
        new = source[place].detach()
        torch.manual_seed(0)
        base = run(model, base_inputs)
        outside = torch.get_rng_state()
        resumed = interchange(model, base, None, {place: lambda b, s, g, new=new: new})
        assert torch.equal(torch.get_rng_state(), outside)
        torch.manual_seed(0)
        naive_base = answer(model, base_inputs)
        torch.manual_seed(0)
        with intervene(model, place, op=lambda b, s, g, new=new: new):
            naive = answer(model, base_inputs)
        assert torch.equal(resumed.logits, naive), place
        grads, expected = (
            torch.autograd.grad((a.square() + b.square()).sum(), list(model.parameters()), allow_unused=True)
            for a, b in ((base.logits, resumed.logits), (naive_base, naive))
        )
        size = max(grad.norm() for grad in expected if grad is not None)
        for one, other in zip(grads, expected, strict=True):
            assert (one is None) == (other is None)
            assert one is None or (one - other).norm() <= 1e-6 * (other.norm() + size)


def test_dropout_below_and_beside_the_blocks_is_that_of_the_base_run():
    class Skips(Blocks):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = nn.functional.dropout(x, 0.5)
            for layer in self.layers:
                x = layer(x)
            return first + nn.functional.dropout(x, 0.5)

    model, place = Skips().train(), Location(1)
    torch.manual_seed(0)
    base = run(model, vectors())
    torch.manual_seed(1)
    assert torch.equal(interchange(model, base, None, {place: lambda b, s, g: b.clone()}).logits, base.logits)


def test_a_random_operator_draws_as_outside_of_the_resumed_run():
    model, inputs = make("bert").train(), batch("bert")
    base = run(model, inputs)
    torch.manual_seed(7)
    expected = torch.randn(3, 5, 16)
    after = torch.rand(())
    drawn = []
    torch.manual_seed(7)
    interchange(model, base, None, {Location(1): lambda b, s, g: drawn.append(torch.randn(b.shape)) or b})
    assert torch.equal(drawn[0], expected)
    assert torch.equal(torch.rand(()), after)


@pytest.mark.parametrize("resume", [True, False])
def test_an_interchange_in_eval_mode_leaves_the_default_generator_alone(resume):
    model, before = make("bert"), torch.get_rng_state()
    interchange(model, run(model, batch("bert")), batch("bert", seed=2), Location(1), resume=resume)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_same_generator_gives_the_same_counterfactual():
    model = make("llama")
    base = run(model, batch("llama"))
    for op in (Noise(0.5), Mixup(0.5)):
        one, same, other = (
            interchange(model, base, None, {Location(1): op}, generator=torch.Generator().manual_seed(seed)).logits
            for seed in (1, 1, 2)
        )
        assert torch.equal(one, same)
        assert not torch.equal(one, other)


@CONTEXTS
@pytest.mark.parametrize("where", ["", "input", "output"])
def test_models_that_go_on_in_place(where, context):
    torch.manual_seed(0)
    model, base_inputs, source_inputs = Blocks(where).eval(), vectors(1), vectors(2)
    at = [Location(i, site) for i in range(3) for site in ("block_input", "block_output")]
    with context():
        expected, x = {}, base_inputs * 2
        for i, layer in enumerate(model.layers):
            expected[Location(i, "block_input")] = x.clone()
            x = layer(x)
            expected[Location(i)] = x.clone()
        base, source = run(model, base_inputs), run(model, source_inputs, at)
        kept = {place: source.activations[place].clone() for place in at}
        for place in at:
            assert torch.equal(base.activations[place], expected[place]), place
            resumed = interchange(model, base, source, place).logits
            assert torch.equal(resumed, interchange(model, base_inputs, source_inputs, place).logits), place
            assert all(torch.equal(source.activations[p], kept[p]) for p in at), place
            assert all(torch.equal(base.activations[p], expected[p]) for p in at), place


@pytest.mark.parametrize("in_place", [False, True])
def test_hooks_of_the_user_act_once(in_place):
    model, source = make("gpt2"), batch("gpt2", seed=2)
    for block in model.transformer.h:
        block.register_forward_hook(lambda m, args, out: out.add_(1.0) if in_place else out + 1)
        block.ln_1.register_forward_pre_hook(lambda m, args: (args[0] * 1.1,))
    with torch.no_grad():
        base = run(model, batch("gpt2"))
        for layer in range(LAYERS):
            for site in ("block_input", "block_output"):
                place = Location(layer, site)
                whole = interchange(model, base, source, place, resume=False).logits
                assert torch.equal(interchange(model, base, source, place).logits, whole)
                assert torch.equal(interchange(model, base, base, place).logits, base.logits)


def test_a_place_inside_a_skipped_block_can_be_recorded():
    model, inner, block = make("gpt2"), Location(module="transformer.h.0.attn"), Location(0)
    base = run(model, batch("gpt2"), [inner, block])
    done = interchange(model, base, batch("gpt2", seed=2), Location(2), record=[inner, block])
    assert torch.equal(done.activations[inner], base.activations[inner])
    assert torch.equal(done.activations[block], base.activations[block])


# --- the cost ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_blocks_below_the_write_are_skipped_and_sources_stop_early(name):
    model, source = make(name), batch(name, seed=2)
    prefix = "decoder" if name == "t5" else ""
    below = [f"encoder{i}" for i in range(LAYERS)] if name == "t5" else []
    calls = count_calls(model)
    base = run(model, batch(name))
    everything = [*below, *(f"{prefix}{i}" for i in range(LAYERS))]
    assert calls == everything
    for layer in range(LAYERS):
        for site, reads, skips in (("block_output", layer + 1, layer + 1), ("block_input", layer, layer)):
            calls.clear()
            interchange(
                model, base, source, [Location(layer, site), Location(-1)] if layer == 0 else Location(layer, site)
            )
            read = everything if layer == 0 else everything[: len(below) + reads]
            assert calls == [*read, *everything[len(below) + skips :]]


def test_each_distinct_source_runs_once_and_a_run_never_again():
    model, first, second = make("gpt2"), batch("gpt2", seed=2), batch("gpt2", seed=3)
    calls = count_calls(model)
    base, ran = run(model, batch("gpt2")), run(model, batch("gpt2", seed=4))
    calls.clear()
    at = [Location(1, dims=range(4)), Location(1, dims=range(4, 8)), Location(2), Location(0, dims=[3])]
    interchange(model, base, dict(zip(at, (first, first, second, ran), strict=True)), at)
    assert calls == ["0", "1", "0", "1", "2", "1", "2"]


@torch.no_grad()
def test_a_block_that_is_skipped_or_recorded_takes_few_calls_of_python():
    inputs = {"input_ids": torch.tensor([[1, 2, 3]]), "use_cache": False}
    skipped, recorded, by_hand = [], [], []
    for layers in (4, 20):
        model = of_depth(layers)
        held, place, kept = run(model, inputs), Location(layers - 2), {}

        def resumed(model=model, held=held, place=place) -> None:
            interchange(model, held, held, place)

        def hooked(model=model, kept=kept) -> None:
            hooks = [
                block.register_forward_hook(lambda block, args, out, kept=kept: kept.update({block: out}))
                for block in model.transformer.h
            ]
            model(**inputs)
            for hook in hooks:
                hook.remove()

        def new(model=model) -> None:
            run(model, inputs)

        for counts, function in ((skipped, resumed), (recorded, new), (by_hand, hooked)):
            for _ in range(3):
                function()
            counts.append(calls_of(function, ("call",)))
    assert (skipped[1] - skipped[0]) / 16 <= 9
    assert ((recorded[1] - recorded[0]) - (by_hand[1] - by_hand[0])) / 16 <= 3


# --- when it must not resume ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, lambda p, lr: torch.optim.AdamW(p, lr, foreach=True)])
def test_a_step_of_the_optimizer_makes_runs_stale(optimizer):
    model = make("bert")
    base, step = run(model, batch("bert")), optimizer(model.parameters(), lr=0.1)
    base.logits.sum().backward()
    step.step()
    with pytest.raises(InterventionError, match=r"its weights.* changed since; run it again: run"):
        interchange(model, base, batch("bert"), Location(1))
    with pytest.raises(InterventionError, match=r"older than the model"):
        interchange(model, batch("bert"), base, Location(1))
    with pytest.raises(InterventionError, match=r"older than the model"):
        base.activations[Location(1, "block_input")]


def test_other_weights_in_place_of_the_old_make_runs_stale():
    model = make("bert")
    base = run(model, batch("bert"))
    model.bert.encoder.layer[0].output.dense.weight = nn.Parameter(torch.zeros(16, 32))
    with pytest.raises(InterventionError, match=r"older than the model"):
        interchange(model, base, batch("bert"), Location(1))


@pytest.mark.parametrize("mode", [True, False])
def test_a_flip_of_the_mode_makes_runs_stale(mode):
    model = make("bert").train(not mode)
    base = run(model, batch("bert"))
    model.train(mode)
    with pytest.raises(InterventionError, match=r"train/eval mode changed since; run it again"):
        interchange(model, base, batch("bert"), Location(1))


def test_a_place_that_a_train_run_did_not_keep_is_not_drawn_anew():
    model = make("bert").train()
    base, inner = run(model, batch("bert")), Location(module=INNER["bert"][0])
    base.activations[Location(1)]
    with pytest.raises(InterventionError, match=r"would draw other dropout .* ask for it: run\(model, inputs, at="):
        base.activations[inner]


def test_a_counterfactual_is_no_base():
    model = make("bert")
    done = interchange(model, batch("bert"), batch("bert", seed=2), Location(1))
    with pytest.raises(InterventionError, match=r"pass its base and all locations in one call"):
        interchange(model, done, batch("bert"), Location(2))
    with pytest.raises(
        InterventionError, match=r"was not recorded in this counterfactual run; ask for it: interchange"
    ):
        done.activations[Location(module=INNER["bert"][0])]


@pytest.mark.parametrize("option", ["use_cache", "output_attentions"])
def test_what_is_incomplete_where_blocks_are_skipped_raises(option):
    model = make("gpt2")
    base = run(model, {**batch("gpt2"), option: True})
    with pytest.raises(InterventionError, match=rf"{option}=True .* pass resume=False"):
        interchange(model, base, batch("gpt2", seed=2), Location(1))
    interchange(model, base, batch("gpt2", seed=2), Location(1), resume=False)


def test_blocks_in_another_order_raise():
    class Dropped(Blocks):
        order = (0, 1, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for i in self.order:
                x = self.layers[i](x)
            return x

    model = Dropped()
    base = run(model, vectors())
    model.order = (1, 0, 2)
    with pytest.raises(InterventionError, match=r"another order .* pass resume=False"):
        interchange(model, base, vectors(2), Location(1))


def test_a_base_of_other_circumstances_is_run_in_full():
    model, base_inputs, source = make("gpt2"), batch("gpt2"), batch("gpt2", seed=2)
    outside = run(model, base_inputs)
    with intervene(model, layer=0, op=Zero()):
        inside = run(model, base_inputs)
        whole = interchange(model, base_inputs, source, Location(1, dims=[0]), resume=False).logits
        assert torch.equal(interchange(model, outside, source, Location(1, dims=[0])).logits, whole)
        assert torch.equal(interchange(model, inside, source, Location(1, dims=[0])).logits, whole)
    assert not torch.equal(interchange(model, outside, source, Location(1, dims=[0])).logits, whole)
    with pytest.raises(
        InterventionError, match="the base is a run made inside a block of interventions that is closed"
    ):
        interchange(model, inside, source, Location(1, dims=[0]))


@pytest.mark.parametrize("inner", [False, True])
def test_hooks_added_since_the_base_run_are_not_skipped(inner):
    model, source = make("gpt2"), batch("gpt2", seed=2)
    base = run(model, batch("gpt2"))
    block = model.transformer.h[0]
    (block.mlp if inner else block).register_forward_hook(lambda m, args, out: out + 1)
    whole = interchange(model, base, source, Location(1, dims=[0]), resume=False).logits
    assert torch.equal(interchange(model, base, source, Location(1, dims=[0])).logits, whole)


def test_several_operators_resume_at_the_lowest():
    model, source = make("gpt2"), batch("gpt2", seed=2)
    base = run(model, batch("gpt2"))
    at = {Location(2): Zero(), Location(1, dims=range(8)): Swap(), Location(module="transformer.h.1.attn"): Zero()}
    assert torch.equal(
        interchange(model, base, source, at).logits, interchange(model, base, source, at, resume=False).logits
    )
