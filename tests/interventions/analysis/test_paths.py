"""Path patching: against closed forms of a linear network and against hooks written by hand."""

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from torch import nn

from interventions import InterventionError, Location, interchange, run
from interventions.analysis.paths import path_patch
from tests.interventions.analysis.test_sweeps import counted
from tests.interventions.tiny_models import LAYERS, WIDTH, answer, batch, make


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.a(x)
        return x + self.b(x)


class Linears(nn.Module):
    """x + a(x), then x + b(x), three times: every path is a product of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Part() for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def linears() -> tuple[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The model in double precision, a base, a source, and how they differ in what block 0's `a` returns."""
    torch.manual_seed(0)
    model = Linears().double().eval()
    base, source = torch.randn(2, 3, 4).double(), torch.randn(2, 3, 4).double()
    return model, base, source, model.blocks[0].a(source - base)


def at(path: str, io: str = "output") -> Location:
    return Location(module=f"blocks.{path}", io=io)


AFTER = [at("0.b"), at("1.a"), at("1.b"), at("2.a"), at("2.b")]


def test_linear_paths_are_products_of_matrices():
    model, base, source, sent = linears()
    a, b = ([getattr(block, name) for block in model.blocks] for name in "ab")

    def change(receivers, freeze=AFTER):
        return path_patch(model, base, source, at("0.a"), receivers, freeze=freeze).logits - model(base)

    assert torch.allclose(change(Location(2)), sent)  # straight along the residual stream
    assert torch.allclose(change(at("2.b", "input")), b[2](sent))
    into = sent + a[2](sent)
    assert torch.allclose(change(at("2.a", "input")), a[2](sent) + b[2](a[2](sent)))
    first = b[1](sent)  # reaches block 2, but not its b, which receives
    assert torch.allclose(change([at("1.b", "input"), at("2.b", "input")]), b[2](sent) + first + a[2](first))
    open_one = [place for place in AFTER if place != at("2.a")]
    assert torch.allclose(change(at("2.b", "input"), open_one), b[2](into))
    assert torch.allclose(change(Location(2), []), interchange(model, base, source, at("0.a")).logits - model(base))


# --- against hooks by hand --------------------------------------------------------------------------------------------

PATHS = {
    "gpt2": ("transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj", 2, 8),
    "llama": ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj", 4, 4),
}


def by_hand(name, model, base, source, sender, receiver):
    """Sender: (layer, head). Receiver: a module, whose input is received."""
    attention, mlp, _, width = PATHS[name]
    seen: dict[str, torch.Tensor] = {}

    def call(inputs, hooks):
        with ExitStack() as stack:
            for path, kind, function in hooks:
                module = model.get_submodule(path)
                register = module.register_forward_pre_hook if kind == "in" else module.register_forward_hook
                stack.callback(register(function).remove)
            return answer(model, inputs)

    def keep(key):
        return lambda module, args, output: seen.__setitem__(key, output)

    def keep_input(key):
        return lambda module, args: seen.__setitem__(key, args[0])

    components = [path.format(i) for i in range(LAYERS) for path in (attention, mlp)]
    layer, head = sender
    mine = attention.format(layer)
    call(base, [(path, "out", keep(path)) for path in components])
    call(source, [(mine, "in", keep_input("sent"))])
    frozen = components[components.index(mine) + 1 :]

    def send(module, args):
        heads = args[0].clone()
        heads[..., head * width : (head + 1) * width] = seen["sent"][..., head * width : (head + 1) * width]
        return (heads,)

    def froze(path):
        return lambda module, args, output: seen[path]

    hooks = [(mine, "in", send), (receiver, "in", keep_input("received"))]
    call(base, [*hooks, *((path, "out", froze(path)) for path in frozen)])
    return call(base, [(receiver, "in", lambda module, args: (seen["received"],))])


RECEIVERS = {
    "gpt2": {
        Location(2, "mlp_input"): "transformer.h.2.mlp",
        Location(module="transformer.h.2.attn.c_attn", io="input"): "transformer.h.2.attn.c_attn",
        Location(site="logits"): None,
        Location(module="lm_head", io="input"): "lm_head",
    },
    "llama": {
        Location(2, "mlp_input"): "model.layers.2.mlp",
        Location(module="lm_head", io="input"): "lm_head",
    },
}


@pytest.mark.parametrize("name", PATHS)
def test_paths_are_those_of_hooks_by_hand(name):
    model, base, source = make(name), batch(name), batch(name, seed=2)
    for receiver, path in RECEIVERS[name].items():
        freeze = None
        if receiver.module is not None:
            end = LAYERS if receiver.module == "lm_head" else 2
            freeze = [Location(0, "mlp_output")]
            freeze += [Location(i, site) for i in range(1, end) for site in ("attention_output", "mlp_output")]
        for head in range(2):
            sender = Location(0, "attention_heads", heads=head)
            found = path_patch(model, base, source, sender, receiver, freeze=freeze).logits
            expected = by_hand(name, model, base, source, (0, head), path or "lm_head")
            assert torch.allclose(found, expected, atol=1e-5), (receiver, head)
            assert not torch.allclose(found, answer(model, base), atol=1e-3)
            assert not torch.allclose(found, interchange(model, base, source, sender).logits, atol=1e-3)


def test_the_query_of_a_head_receives():
    model, base, source = make("gpt2"), batch("gpt2"), batch("gpt2", seed=2)
    before, sender, receiver = run(model, base), Location(0, "attention_heads", heads=1), Location(2, "query", heads=0)
    found = path_patch(model, before, source, sender, receiver)
    freeze = ["mlp_output.0", "attention_output.1", "mlp_output.1"]
    qkv = Location(module="transformer.h.2.attn.c_attn", dims=range(WIDTH // 2))  # the query of head 0
    assert torch.allclose(found.logits, path_patch(model, before, source, sender, qkv, freeze=freeze).logits, atol=1e-5)
    at_last = path_patch(model, before, source, sender, receiver, receiver_positions=-1).logits
    assert torch.allclose(at_last[:, -1], found.logits[:, -1], atol=1e-5)
    assert torch.allclose(at_last[:, :-1], before.logits[:, :-1], atol=1e-5)
    sent_last = path_patch(model, before, source, sender, receiver, positions=-1).logits
    assert torch.allclose(sent_last[:, :-1], before.logits[:, :-1], atol=1e-5)
    assert not torch.allclose(sent_last[:, -1], before.logits[:, -1], atol=1e-3)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_path_from_the_same_inputs_changes_nothing(name):
    model, base = make(name), batch(name)
    before = run(model, base)
    for sender in (Location(0, "attention_heads", heads=0), Location(0), Location(site="embedding")):
        for receiver in (Location(2), Location(1, "mlp_input"), Location(2, "attention_input"), Location(1, "query")):
            found = path_patch(model, before, base, sender, receiver).logits
            assert torch.allclose(found, before.logits, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_direct_path_from_a_component_is_its_change(name):
    """In a pre-norm model what a component sends along the residual stream arrives as it is."""
    model, base, source = make(name), batch(name), batch(name, seed=2)
    places = [Location(0, "attention_output"), Location(1, "mlp_output"), Location(0, "mlp_output"), Location(1)]
    before, after = run(model, base, places), run(model, source, places)
    for sender in places:
        last = Location(2)
        found = path_patch(model, before, after, sender, last)
        change = after.activations[sender] - before.activations[sender]
        expected = before.activations[last] + change
        swapped = interchange(model, before, {last: replace(before, activations={last: expected})}, last)
        assert torch.allclose(found.logits, swapped.logits, atol=1e-4), sender


def test_receivers_on_the_way_to_each_other_are_read_apart():
    model, source = make("gpt2"), batch("gpt2", seed=2)
    base = run(model, batch("gpt2"))
    sender, near, far = Location(0, "attention_output"), Location(1, "mlp_output"), Location(2, "attention_input")
    held = [Location(0, "mlp_output"), Location(1, "attention_output")]
    received = {}
    for end, frozen in ((near, held), (far, [*held, near])):
        sources = {sender: source, **dict.fromkeys(frozen, base)}
        received[end] = interchange(model, base, sources, [sender, *frozen], record=end)
    expected = interchange(model, base, received, [near, far]).logits
    assert torch.allclose(path_patch(model, base, source, sender, [near, far]).logits, expected, atol=1e-6)
    for alone in (near, far):
        assert not torch.allclose(path_patch(model, base, source, sender, alone).logits, expected, atol=1e-3)


def test_only_the_base_and_the_source_run_in_full():
    model, base, source = make("gpt2"), batch("gpt2"), batch("gpt2", seed=2)
    with counted(model, "transformer.h") as calls:
        path_patch(model, base, source, Location(1, "mlp_output"), [Location(2, "query"), Location(2, "mlp_input")])
    assert calls == {"model": 3, "first": 2, "last": 3}  # the source run stops at the sender, before the last block


def test_gradients_reach_the_base():
    model = make("gpt2")
    path_patch(model, batch("gpt2"), batch("gpt2", seed=2), Location(0), Location(2, "query")).logits.sum().backward()
    assert model.transformer.wte.weight.grad is not None


@pytest.mark.parametrize(
    ("name", "sender", "receivers", "match"),
    [
        ("gpt2", Location(1), Location(1, "query"), r"query\.1 does not come after the sender block_output\.1"),
        ("gpt2", Location(1), Location(1), r"does not come after the sender"),
        ("gpt2", Location(1), [], r"no receiver was given"),
        (
            "gpt2",
            Location(0),
            Location(module="lm_head"),
            r"module:lm_head stands among the blocks is not known.*freeze=",
        ),
        ("gpt2", Location(module="transformer.h.0.mlp"), Location(2), r"is not known; name a site of a block"),
        ("gpt2", Location(9), Location(2), r"out of range"),
        ("t5", Location(0), Location(2), r"block 1 .* second attention \(cross-attention\).*freeze="),
        ("t5", Location(0, stack="encoder"), Location(2), r"lies in another stack than the sender"),
    ],
)
def test_what_makes_no_sense_raises(name, sender, receivers, match):
    with pytest.raises(InterventionError, match=match):
        path_patch(make(name), batch(name), batch(name, seed=2), sender, receivers)
    with pytest.raises(InterventionError, match=r"in train mode"):
        path_patch(make(name).train(), batch(name), batch(name, seed=2), Location(0), Location(2), freeze=[])
