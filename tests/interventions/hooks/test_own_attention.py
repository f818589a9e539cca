"""Attention that transformers' functions do not compute: by scaled_dot_product_attention or by products of its own.

Falcon calls scaled_dot_product_attention itself; Bloom, GPT-J and DeBERTa v2 multiply and take a softmax.
"""

import pytest
import torch
from einops import einsum, rearrange
from torch import nn

from interventions import InterventionError, Location, Zero, interchange, intervene, run
from interventions.locations import HEAD_SITES
from tests.interventions.tiny_models import VOCABULARY, WIDTH, trace

HEADS, LAYERS, LENGTH, SIZE = 4, 3, 6, 3
PATTERNS = ("attention_scores", "attention_pattern")
KINDS = {"falcon": "sdpa", "falcon-one-key": "sdpa", "bloom": "own", "gptj": "own", "deberta-v2": "own"}
DECODERS = ("falcon", "falcon-one-key", "bloom", "gptj")
PROJECTIONS = {
    "falcon": "transformer.h.1.self_attention.dense",
    "bloom": "transformer.h.1.self_attention.dense",
    "gptj": "transformer.h.1.attn.out_proj",
    "deberta-v2": "deberta.encoder.layer.1.attention.output.dense",
}


def own(name: str) -> nn.Module:
    """A tiny model in eval mode, its weights spread wide enough that every layer matters."""
    import transformers as tr

    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "bos_token_id": 0,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    many = {**common, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        match name:
            case "falcon" | "falcon-one-key":
                model = tr.FalconForCausalLM(tr.FalconConfig(**many, multi_query=name != "falcon"))
            case "bloom":
                model = tr.BloomForCausalLM(tr.BloomConfig(**common, n_layer=LAYERS, n_head=HEADS))
            case "gptj":
                few = {key: value for key, value in common.items() if key != "hidden_size"}
                model = tr.GPTJForCausalLM(
                    tr.GPTJConfig(**few, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, rotary_dim=4, n_positions=20)
                )
            case _:
                relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "intermediate_size": 32}
                model = tr.DebertaV2ForMaskedLM(tr.DebertaV2Config(**many, **relative, max_position_embeddings=20))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.3)
    return model.eval()


def tokens(seed: int = 1) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, VOCABULARY, (SIZE, LENGTH), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def projection(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(PROJECTIONS[name.removesuffix("-one-key")])


def values(model: nn.Module, name: str, state: torch.Tensor) -> torch.Tensor:
    """The values that layer 1 computes from its input, by hand: [batch, token, head, dim]."""
    attention = model.get_submodule(PROJECTIONS[name.removesuffix("-one-key")].rpartition(".")[0])
    if name == "gptj":
        return rearrange(attention.v_proj(state), "b t (h d) -> b t h d", h=HEADS)
    if name == "deberta-v2":
        own = model.deberta.encoder.layer[1].attention.self
        return rearrange(own.value_proj(state), "b t (h d) -> b t h d", h=HEADS)
    if name == "falcon-one-key":  # queries, then one key and one value for all of them
        return attention.query_key_value(state)[..., None, -WIDTH // HEADS :].expand(-1, -1, HEADS, -1)
    return rearrange(attention.query_key_value(state), "b t (h three d) -> three b t h d", h=HEADS, three=3)[2]


def at(site: str, layer: int = 1, **fields) -> Location:
    return Location(layer, site, **fields)


def sites_of(name: str) -> tuple[str, ...]:
    return HEAD_SITES if KINDS[name] == "sdpa" else (*PATTERNS, "attention_heads")


def written(tensor: torch.Tensor):
    """An operator that writes `tensor`, `[batch, head, query, key]`; operators see positions before heads."""
    return lambda base, source, generator: rearrange(tensor, "b h q k -> b q h k").clone()


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_heads_are_the_input_of_the_output_projection(name):
    model, seen = own(name), []
    handle = projection(model, name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    heads = run(model, tokens(), at=[at("attention_heads")]).activations[at("attention_heads")]
    handle.remove()
    assert heads.shape == (SIZE, LENGTH, HEADS, WIDTH // HEADS)
    assert torch.equal(rearrange(heads, "b t h d -> b t (h d)"), seen[0])


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_a_swapped_head_is_that_of_the_source_in_the_input_of_the_projection(name):
    model, seen, width = own(name), [], WIDTH // HEADS
    keep = projection(model, name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**tokens(2))
    keep.remove()

    def by_hand(module, args):
        state = args[0].clone()
        state[..., 2 * width : 3 * width] = seen[0][..., 2 * width : 3 * width]
        return (state,)

    handle = projection(model, name).register_forward_pre_hook(by_hand)
    expected = model(**tokens(1)).logits
    handle.remove()
    found = interchange(model, tokens(1), tokens(2), at("attention_heads", heads=2)).logits
    assert torch.equal(found, expected)
    assert not torch.equal(found, model(**tokens(1)).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_the_pattern_is_the_softmax_of_the_scores_and_mixes_the_values(name):
    model = own(name)
    places = [at(site) for site in (*PATTERNS, "attention_heads", "attention_input")]
    scores, pattern, heads, state = (run(model, tokens(), at=places).activations[place] for place in places)
    assert pattern.shape == (SIZE, HEADS, LENGTH, LENGTH)
    assert torch.allclose(pattern.sum(-1), torch.ones(SIZE, HEADS, LENGTH))
    assert torch.equal(scores.softmax(-1), pattern)
    above = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    assert (pattern[..., above].max() == 0) == (name in DECODERS)
    mixed = einsum(pattern, values(model, name, state), "b h q k, b k h d -> b q h d")
    assert torch.allclose(heads, mixed, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_a_written_pattern_mixes_the_values(name):
    model, draw = own(name), torch.Generator().manual_seed(3)
    pattern = torch.rand(SIZE, HEADS, LENGTH, LENGTH, generator=draw).softmax(-1)
    state = run(model, tokens(), at=[at("attention_input")]).activations[at("attention_input")]
    with intervene(model, at("attention_pattern"), op=written(pattern)):
        heads = run(model, tokens(), at=[at("attention_heads")]).activations[at("attention_heads")]
    mixed = einsum(pattern, values(model, name, state), "b h q k, b k h d -> b q h d")
    assert torch.allclose(heads, mixed, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_written_scores_decide_the_pattern(name):
    model, draw = own(name), torch.Generator().manual_seed(3)
    scores = torch.randn(SIZE, 1, LENGTH, LENGTH, generator=draw)
    with intervene(model, at("attention_scores", heads=1), op=written(scores)):
        pattern = run(model, tokens(), at=[at("attention_pattern")]).activations[at("attention_pattern")]
    both = run(model, tokens(), at=[at("attention_pattern"), at("attention_scores")]).activations
    plain, before = both[at("attention_pattern")], both[at("attention_scores")]
    hidden = before[:, 1] < torch.finfo(before.dtype).min / 4
    assert torch.allclose(pattern[:, 1], scores[:, 0].masked_fill(hidden, -torch.inf).softmax(-1), atol=1e-6)
    assert torch.equal(pattern[:, [0, 2, 3]], plain[:, [0, 2, 3]])


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_its_own_state_changes_no_bit_another_does_and_nothing_is_left(name):
    model, base, source = own(name), tokens(1), tokens(2)
    before, plain = trace(model), run(model, base)
    for site in sites_of(name):
        here = run(model, base, at=[at(site)]) if site in PATTERNS else plain
        assert torch.equal(interchange(model, plain, base, at(site)).logits, here.logits)
        resumed = interchange(model, plain, source, at(site, heads=0))
        assert torch.equal(resumed.logits, interchange(model, plain, source, at(site, heads=0), resume=False).logits)
        assert not torch.allclose(resumed.logits, here.logits)
    assert trace(model) == before
    assert torch.equal(model(**base).logits, plain.logits)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind == "own"])
@pytest.mark.parametrize("site", ["query", "key", "value"])
def test_what_cannot_be_told_from_products_says_so(name, site):
    model = own(name)
    before = trace(model)
    with pytest.raises(InterventionError, match=rf"by products of its own; name the projection of the {site} by path"):
        run(model, tokens(), at=[at(site)])
    assert trace(model) == before


@torch.no_grad()
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("place", [at("attention_heads", heads=[0, 3]), at("attention_pattern", dims=0)])
def test_generation_with_a_cache_writes_what_generation_without_one_does(name, place):
    """A written head, and a first token that no later one attends to, in the prompt and in each step."""
    model = own(name)
    before = trace(model)
    settings = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(**tokens(), **settings)
    with intervene(model, place, op=Zero()) as handle:
        cached = model.generate(**tokens(), **settings)
        once = handle.firings[place]
        whole = model.generate(**tokens(), **settings, use_cache=False)
    assert (once, handle.firings[place]) == (4, 8)
    assert torch.equal(cached.sequences, whole.sequences)
    assert torch.allclose(torch.stack(cached.logits), torch.stack(whole.logits), atol=1e-4)
    assert not torch.allclose(cached.logits[-1], plain.logits[-1], atol=1e-3)
    assert trace(model) == before
    assert torch.equal(model.generate(**tokens(), **settings).sequences, plain.sequences)
