"""Sites inside blocks: what is read is what hooks by hand read, what is written is what hooks by hand write."""

import pytest
import torch
from torch import nn

from interventions import InterventionError, Location, Zero, interchange, intervene, run
from interventions.locations import BLOCK_SITES, HEAD_SITES, MODEL_SITES
from tests.interventions.tiny_models import LAYERS, TRANSFORMERS, VOCABULARY, WIDTH, answer, batch, make, trace

PATTERNS = ("attention_scores", "attention_pattern")
MODULES = {  # site -> path inside block 1, side: where hooks by hand find it
    "gpt2": {
        "attention_input": ("transformer.h.1.attn", "input"),
        "attention_heads": ("transformer.h.1.attn.c_proj", "input"),
        "attention_output": ("transformer.h.1.attn.c_proj", "output"),
        "mlp_input": ("transformer.h.1.mlp", "input"),
        "mlp_activation": ("transformer.h.1.mlp.c_proj", "input"),
        "mlp_output": ("transformer.h.1.mlp", "output"),
        "final_norm": ("transformer.ln_f", "output"),
        "logits": ("lm_head", "output"),
    },
    "llama": {
        "attention_input": ("model.layers.1.self_attn", "input"),
        "attention_heads": ("model.layers.1.self_attn.o_proj", "input"),
        "attention_output": ("model.layers.1.self_attn", "output"),
        "value": ("model.layers.1.self_attn.v_proj", "output"),
        "mlp_input": ("model.layers.1.mlp", "input"),
        "mlp_activation": ("model.layers.1.mlp.down_proj", "input"),
        "mlp_output": ("model.layers.1.mlp", "output"),
        "final_norm": ("model.norm", "output"),
        "logits": ("lm_head", "output"),
    },
    "bert": {
        "attention_input": ("bert.encoder.layer.1.attention.self", "input"),
        "query": ("bert.encoder.layer.1.attention.self.query", "output"),
        "key": ("bert.encoder.layer.1.attention.self.key", "output"),
        "value": ("bert.encoder.layer.1.attention.self.value", "output"),
        "attention_heads": ("bert.encoder.layer.1.attention.self", "output"),
        "attention_output": ("bert.encoder.layer.1.attention.output.dense", "output"),
        "mlp_input": ("bert.encoder.layer.1.intermediate", "input"),
        "mlp_activation": ("bert.encoder.layer.1.intermediate", "output"),
        "mlp_output": ("bert.encoder.layer.1.output.dense", "output"),
        "logits": ("classifier", "output"),
    },
    "distilbert": {
        "query": ("distilbert.transformer.layer.1.attention.q_lin", "output"),
        "attention_heads": ("distilbert.transformer.layer.1.attention.out_lin", "input"),
        "attention_output": ("distilbert.transformer.layer.1.attention.out_lin", "output"),
        "mlp_input": ("distilbert.transformer.layer.1.ffn", "input"),
        "mlp_activation": ("distilbert.transformer.layer.1.ffn.lin2", "input"),
        "mlp_output": ("distilbert.transformer.layer.1.ffn", "output"),
    },
    "t5": {
        "attention_input": ("decoder.block.1.layer.0.SelfAttention", "input"),
        "query": ("decoder.block.1.layer.0.SelfAttention.q", "output"),
        "attention_heads": ("decoder.block.1.layer.0.SelfAttention.o", "input"),
        "attention_output": ("decoder.block.1.layer.0.SelfAttention.o", "output"),
        "mlp_input": ("decoder.block.1.layer.2.DenseReluDense", "input"),
        "mlp_activation": ("decoder.block.1.layer.2.DenseReluDense.wo", "input"),
        "mlp_output": ("decoder.block.1.layer.2.DenseReluDense", "output"),
        "final_norm": ("decoder.final_layer_norm", "output"),
    },
    "vit": {
        "query": ("vit.layers.1.attention.q_proj", "output"),
        "attention_heads": ("vit.layers.1.attention.o_proj", "input"),
        "attention_output": ("vit.layers.1.attention.o_proj", "output"),
        "mlp_input": ("vit.layers.1.mlp", "input"),
        "mlp_output": ("vit.layers.1.mlp", "output"),
        "final_norm": ("vit.layernorm", "output"),
    },
}
BY_HAND = [(name, site) for name, sites in MODULES.items() for site in sites]


def at(site: str, layer: int = 1, **fields) -> Location:
    return Location(None if site in MODEL_SITES else layer, site, **fields)


def sites_of(name: str) -> list[str]:
    without = ("final_norm",) if name in ("bert", "distilbert") else ()
    return [site for site in (*BLOCK_SITES, *MODEL_SITES) if site not in without]


def hooked(model: nn.Module, path: str, side: str, function):
    """A hook by hand on the first tensor."""

    def on_input(module, args, kwargs):
        name = next((key for key, value in kwargs.items() if isinstance(value, torch.Tensor)), None)
        if args:
            return (function(args[0]), *args[1:]), kwargs
        return args, {**kwargs, name: function(kwargs[name])}

    def on_output(module, args, output):
        if isinstance(output, torch.Tensor):
            return function(output)
        return (function(output[0]), *output[1:])

    module = model.get_submodule(path)
    if side == "input":
        return module.register_forward_pre_hook(on_input, with_kwargs=True)
    return module.register_forward_hook(on_output)


@torch.no_grad()
@pytest.mark.parametrize(("name", "site"), BY_HAND)
def test_what_is_read_and_written_is_what_hooks_by_hand_read_and_write(name, site):
    model, base, source = make(name), batch(name, 1), batch(name, 2)
    path, side = MODULES[name][site]
    seen = []
    handle = hooked(model, path, side, lambda state: (seen.append(state), state)[1])
    answer(model, source)
    handle.remove()
    mine = run(model, source, at=[at(site)]).activations[at(site)]
    assert torch.equal(mine.reshape(seen[0].shape), seen[0])
    handle = hooked(model, path, side, lambda state: seen[0])
    expected = answer(model, base)
    handle.remove()
    found = interchange(model, run(model, base), source, at(site))
    assert torch.equal(found.logits, expected)
    assert not torch.equal(expected, answer(model, base))


@torch.no_grad()
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_laws(name):
    """Every site of every model: identity, resumed = full, an effect, and nothing left behind."""
    model, base, source = make(name), batch(name, 1), batch(name, 2)
    before, plain = trace(model), run(model, batch(name, 1))
    for site in sites_of(name):
        location = at(site)
        here = run(model, base, at=[location]) if site in PATTERNS else plain
        assert torch.equal(interchange(model, plain, base, location).logits, here.logits)
        resumed = interchange(model, plain, source, location)
        assert torch.equal(resumed.logits, interchange(model, plain, source, location, resume=False).logits)
        assert not torch.equal(resumed.logits, here.logits)
        with intervene(model, location, source=source):
            assert torch.equal(answer(model, base), resumed.logits)
    assert trace(model) == before
    assert torch.equal(answer(model, base), plain.logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5", "vit", "distilbert"])
@pytest.mark.parametrize("site", HEAD_SITES)
def test_what_is_not_selected_stays(name, site):
    model, base, source = make(name), batch(name, 1), batch(name, 2)
    heads_axis = 1 if site in PATTERNS else 2
    whole = run(model, base, at=[at(site)]).activations[at(site)]
    other = run(model, source, at=[at(site)]).activations[at(site)]
    part = at(site, heads=1, dims=[0, 2])
    found = interchange(model, base, source, part, record=[at(site)]).activations[at(site)]
    selected = torch.zeros_like(whole, dtype=torch.bool)
    selected.select(heads_axis, 1)[..., [0, 2]] = True
    assert torch.equal(found[~selected], whole[~selected])
    assert torch.equal(found[selected], other[selected])
    assert not torch.equal(whole[selected], other[selected])
    found = interchange(model, base, source, at(site, heads=0), positions=[1, 3], record=[at(site)])
    selected = torch.zeros_like(whole, dtype=torch.bool)
    (selected[:, 0] if site in PATTERNS else selected.select(2, 0))[:, [1, 3]] = True
    assert torch.equal(found.activations[at(site)][~selected], whole[~selected])
    assert torch.equal(found.activations[at(site)][selected], other[selected])


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "llama"])
def test_patterns_are_those_of_the_model(name):
    model, inputs = make(name), batch(name, 1)
    if name != "vit":
        inputs["attention_mask"][0, :2] = 0
    model.set_attn_implementation("eager")
    expected = model(**inputs, output_attentions=True)
    places = [at(site, layer) for layer in range(LAYERS) for site in PATTERNS]
    eager = run(model, inputs, at=places)
    for layer in range(LAYERS):
        pattern = eager.activations[at("attention_pattern", layer)]
        assert torch.equal(pattern, expected.attentions[layer])
        assert torch.equal(eager.activations[at("attention_scores", layer)].softmax(-1), pattern)
    model.set_attn_implementation("sdpa")
    fast = run(model, inputs, at=places)
    for place in places:
        real = torch.ones_like(fast.activations[place], dtype=torch.bool)
        if name != "vit":
            real[0, :, :2] = False  # rows of padding attend to nothing in one, to everything in the other
            real[0, :, :, :2] = False
        shown = eager.activations[place].clamp_min(-1e4), fast.activations[place].clamp_min(-1e4)
        assert torch.allclose(shown[0][real], shown[1][real], atol=1e-5)
    assert model.config._attn_implementation == "sdpa"


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_written_pattern_mixes_the_values(name, implementation):
    model, inputs = make(name), batch(name, 1)
    model.set_attn_implementation(implementation)
    uniform = torch.full((3, model.config.num_attention_heads, 5, 5), 0.2)
    value = run(model, inputs, at=[at("value")]).activations[at("value")]
    with intervene(model, at("attention_pattern"), op=lambda base, source, generator: torch.full_like(base, 0.2)):
        heads = run(model, inputs, at=[at("attention_heads")]).activations[at("attention_heads")]
    value = value.repeat_interleave(uniform.shape[1] // value.shape[2], 2)
    assert torch.allclose(heads, torch.einsum("bhqk,bkhd->bqhd", uniform, value), atol=1e-6)


@torch.no_grad()
def test_query_and_key_are_after_rotary_embedding():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model, inputs = make("llama"), batch("llama", 1)
    found = run(model, inputs, at=[at("attention_input"), at("query"), at("key")])
    state, attention = found.activations[at("attention_input")], model.model.layers[1].self_attn
    query, key = (
        projection(state).view(3, 5, -1, 4).transpose(1, 2) for projection in (attention.q_proj, attention.k_proj)
    )
    angles = model.model.rotary_emb(state, torch.arange(5)[None])
    query, key = apply_rotary_pos_emb(query, key, *angles)
    assert torch.equal(found.activations[at("query")], query.transpose(1, 2))
    assert torch.equal(found.activations[at("key")], key.transpose(1, 2))


@torch.no_grad()
def test_heads_may_be_wider_than_the_model_and_fewer():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=8, intermediate_size=32)  # fmt: skip
    model, inputs = LlamaForCausalLM(config).eval(), batch("llama", 1)
    places = [at(site) for site in HEAD_SITES]
    shapes = {place.site: list(state.shape) for place, state in run(model, inputs, at=places).activations.items()}
    assert shapes == {
        "query": [3, 5, 4, 8], "key": [3, 5, 2, 8], "value": [3, 5, 2, 8], "attention_scores": [3, 4, 5, 5],
        "attention_pattern": [3, 4, 5, 5], "attention_heads": [3, 5, 4, 8],
    }  # fmt: skip
    for site, count, what in (("key", 2, "key and value heads"), ("attention_heads", 4, "heads")):
        match = rf"{site}\.1\[heads=7\] names head 7 and there are {count} {what}; write heads=range\(0, {count}\)"
        with pytest.raises(InterventionError, match=match):
            interchange(model, inputs, inputs, at(site, heads=7))
        with pytest.raises(InterventionError, match=match):
            run(model, inputs, at=[at(site, heads=7)])
    assert torch.equal(model(**inputs).logits, run(model, inputs).logits)


@torch.no_grad()
def test_a_cross_attention_goes_by_its_path():
    model, base, source = make("t5"), batch("t5", 1), batch("t5", 2)
    path = "decoder.block.1.layer.1.EncDecAttention"
    pattern = Location(module=path, io="attention_pattern")
    assert run(model, base, at=[pattern]).activations[pattern].shape == (3, 2, 4, 5)
    heads = Location(module=path, io="attention_heads", heads=1)
    seen = []
    handle = hooked(model, f"{path}.o", "input", lambda state: (seen.append(state), state)[1])
    answer(model, source)
    handle.remove()
    handle = hooked(model, f"{path}.o", "input", lambda state: torch.cat([state[..., :8], seen[0][..., 8:]], -1))
    expected = answer(model, base)
    handle.remove()
    assert torch.equal(interchange(model, base, source, heads).logits, expected)


@torch.no_grad()
def test_several_sites_at_once_are_written_in_the_order_of_the_model():
    model, base, source = make("llama"), batch("llama", 1), batch("llama", 2)
    places = [at("mlp_output", 2), at("query", 1), at("attention_heads", 0, heads=[1, 3]), at("key", 1, heads=0)]
    together = interchange(model, run(model, base), source, places).logits
    kept = run(model, source, at=places)
    with (
        intervene(model, places[0], source=kept),
        intervene(model, places[1], source=kept),
        intervene(model, places[2], source=kept),
        intervene(model, places[3], source=kept),
    ):
        assert torch.equal(answer(model, base), together)


def test_gradients_reach_both_runs_through_heads():
    model = make("llama")
    found = {}
    for site in (*HEAD_SITES, "mlp_activation"):
        base, source = (model.model.embed_tokens(batch("llama", i)["input_ids"]).detach() for i in (1, 2))
        base.requires_grad_(), source.requires_grad_()
        place = at(site, heads=[0]) if site in HEAD_SITES else at(site)
        interchange(model, {"inputs_embeds": base}, {"inputs_embeds": source}, place).logits.square().sum().backward()
        found[site] = min(float(base.grad.abs().sum()), float(source.grad.abs().sum()))
    assert min(found.values()) > 0


@pytest.mark.parametrize(
    ("name", "location", "match"),
    [
        (
            "bert",
            Location(site="final_norm"),
            r"final_norm does not exist in this 'bert' model: no normalisation comes",
        ),
        ("cnn", Location(0, "query"), r"needs blocks|query\.0 .* ambiguous"),
        ("t5", Location(module="encoder.block.0", io="query"), r"has no query that can be read: .* its part "),
        ("gpt2", Location(module="lm_head", io="attention_heads"), r"Linear computes no attention itself"),
        ("gpt2", Location(module="lm_head", io="cell_state"), r"io='cell_state' goes with a recurrent module"),
    ],
)
def test_what_is_missing_is_said(name, location, match):
    model = make(name)
    with pytest.raises(InterventionError, match=match):
        run(model, batch(name), at=[location])


def test_logits_with_labels_raise():
    model, inputs = make("bert"), batch("bert")
    with (
        pytest.raises(InterventionError, match=r"logits are written when the loss has been computed"),
        intervene(model, site="logits", op=Zero()),
    ):
        model(**inputs, labels=torch.zeros(3, dtype=torch.long))


@torch.no_grad()
def test_final_norm_and_logits_resume_after_all_blocks():
    model, base, source = make("gpt2"), batch("gpt2", 1), batch("gpt2", 2)
    plain, calls = run(model, base), []
    handles = [block.mlp.register_forward_hook(lambda *_: calls.append(1)) for block in model.transformer.h]
    plain = run(model, base)
    calls.clear()
    for site in ("final_norm", "logits"):
        interchange(model, plain, run(model, source, at=[at(site)]), at(site))
        assert len(calls) == LAYERS  # those of the source
        calls.clear()
    for handle in handles:
        handle.remove()


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True), nn.GRU(16, 5)
        self.cell, self.gru_cell = nn.LSTMCell(5, 4), nn.GRUCell(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states, (h, c) = self.lstm(x)
        _, last = self.gru(states.transpose(0, 1))
        h_cell, c_cell = self.cell(last[0] + h.mean((0, 2))[:, None] + c.mean((0, 2))[:, None])
        return self.gru_cell(h_cell * c_cell)


@torch.no_grad()
def test_final_states_of_recurrent_modules():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, base, source = Cells().eval(), torch.randn(3, 5, 6), torch.randn(3, 5, 6)
    shapes = {
        ("lstm", "hidden_state"): (4, 3, 8),
        ("lstm", "cell_state"): (4, 3, 8),
        ("gru", "hidden_state"): (1, 3, 5),
        ("cell", "hidden_state"): (3, 4),
        ("cell", "cell_state"): (3, 4),
        ("gru_cell", "hidden_state"): (3, 3),
    }
    for (path, io), shape in shapes.items():
        place = Location(module=path, io=io)
        plain, other = run(model, base, at=[place]), run(model, source, at=[place])
        assert plain.activations[place].shape == shape
        assert torch.equal(interchange(model, base, base, place).logits, model(base))
        found = interchange(model, base, source, place, record=[place])
        assert torch.equal(found.activations[place], other.activations[place])
        assert not torch.equal(found.logits, plain.logits)
        if len(shape) == 3 and shape[0] > 1:
            part = interchange(model, base, source, place, positions=1, record=[place]).activations[place]
            assert torch.equal(part[1], other.activations[place][1])
            assert torch.equal(part[[0, 2, 3]], plain.activations[place][[0, 2, 3]])
    with pytest.raises(InterventionError, match="GRU has no cell_state, only an LSTM has"):
        run(model, base, at=[Location(module="gru", io="cell_state")])


def torch_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


class Written(nn.Module):
    """An attention of its own that is called with query, key and value, by name."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads = 2
            self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, query: torch.Tensor, *, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            scores = torch.matmul(self.q_proj(query), self.k_proj(key).transpose(-1, -2))
            return self.out_proj(torch.matmul(scores.softmax(-1), self.v_proj(value)))

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), self.Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = self.norm(x)
        return x + self.attention(given, key=given, value=given)


@torch.no_grad()
@pytest.mark.parametrize("kind", [torch_layer, Written])
def test_an_attention_given_one_tensor_as_query_key_and_value_has_one_input(kind):
    """With the input of the source it returns what it does in the source, and with its own what it does anyway."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(*(kind() for _ in range(2)), nn.Linear(8, 3)).eval()
        base, source = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    given, returned = Location(1, "attention_input"), Location(1, "attention_output")
    wanted = run(model, source, at=[returned]).activations[returned]
    found = interchange(model, base, source, given, record=[returned])
    assert torch.equal(found.activations[returned], wanted)
    path = Location(module=f"1.{'self_attn' if kind is torch_layer else 'attention'}", io="input")
    assert torch.equal(interchange(model, base, source, path).logits, found.logits)
    plain = run(model, base, at=[given]).logits
    assert torch.equal(interchange(model, base, base, given).logits, plain)
