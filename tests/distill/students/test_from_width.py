"""Widths against teachers of which a part is dead, or double, so that what is left must answer as the whole."""

import re

import pytest
import torch
from torch import nn

from distill import DistillError, from_layers
from distill.interchange.mapping import depth
from distill.students.from_width import KNOWN, from_width
from tests.conformance.building import quiet
from tests.conformance.shrinking import tiny
from tests.distill.tiny_models import CNN, bert, gpt2, llama, masked_lm, same, spread, t5, weights

GROUPED = "llama mistral ministral phi3 qwen2 qwen3 starcoder2 granite smollm3".split()
UNITS = "intermediate_size n_inner d_ff hidden_dim ffn_dim encoder_ffn_dim decoder_ffn_dim".split()
WRITES_NOT = re.compile(r"(^|[._])(q|k|v|query|key|value)(_(lin|proj))?\.(weight|bias)$")
MERGED = {"c_attn": 3, "Wqkv": 3, "gate_up_proj": 2, "Wi": 2}


def model(kind: str, seed: int = 0) -> nn.Module:
    from transformers import AutoModel

    config = tiny(kind)
    if kind in GROUPED:
        config.num_key_value_heads = 2
    for name in UNITS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, 48)  # unlike any other width
    with quiet():
        return spread(AutoModel.from_config(config), seed, 0.2)


def answers(network: nn.Module) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    if network.main_input_name == "pixel_values":
        size = network.config.image_size
        inputs = {"pixel_values": torch.randn(2, network.config.num_channels, size, size, generator=draw)}
    else:
        ids = torch.randint(5, 60, (2, 7), generator=draw)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if network.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids[:, :4]
    with torch.no_grad(), quiet():
        output = network(**inputs)
    names = ("last_hidden_state", "encoder_last_hidden_state")
    return [output[name] for name in names if name in output]


def doubled(small: nn.Module, large: nn.Module) -> None:
    """Give `large` the weights by which it computes the stream of `small`, twice.

    What reads the stream reads the first half; what writes to it writes both; heads and units beyond are never read.
    """
    source, width = dict(small.named_parameters(remove_duplicate=False)), large.config.hidden_size
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for path, module in large.named_modules():
            for name, target in module.named_parameters(recurse=False):
                full = f"{path}.{name}" if path else name
                part = source[full]
                merged = next((count for key, count in MERGED.items() if f".{key}." in f".{full}"), None)
                if isinstance(module, nn.Linear | nn.Conv2d) or type(module).__name__ == "Conv1D":
                    turned = type(module).__name__ == "Conv1D" and target.ndim == 2
                    target.copy_(_linear(part, target, full, width, merged, turned, draw))
                else:
                    axes = [n for n, (a, b) in enumerate(zip(part.shape, target.shape, strict=True)) if a != b]
                    for axis in axes:
                        rest = part if target.shape[axis] == width else torch.randn(part.shape, generator=draw)
                        part = torch.cat([part, rest.narrow(axis, 0, target.shape[axis] - part.shape[axis])], axis)
                    target.copy_(part)


def _linear(part, target, name, width, merged, turned, draw):
    if name.endswith("qkv_proj.weight"):  # twice as many key heads as in `small`, one after the other
        (q, k), new = (part.shape[0] // 2, part.shape[0] // 4), target.shape[0]
        parts = [_rows(each, target[: size], draw) for each, size in
                 zip(part.split((q, k, k)), (new // 2, new // 4, new // 4), strict=True)]  # fmt: skip
        return torch.cat(parts)
    part, target = (part.T, target.T) if turned else (part, target)
    if merged:
        each = target.shape[0] // merged
        made = torch.cat([_rows(one, target[:each], draw) for one in part.chunk(merged)])
    elif target.shape[0] == width and not WRITES_NOT.search(name) and "query_key_value" not in name:
        made = torch.cat([_rows(part, target[: width // 2], draw)] * 2)
    else:
        made = _rows(part, target, draw)
    return made.T if turned else made


def _rows(part, target, draw):
    """`part` in the first rows and columns; random numbers in the other rows, nothing in the other columns."""
    made, read = torch.zeros_like(target), (slice(None), *map(slice, part.shape[1:]))
    made[read] = torch.randn(made[read].shape, generator=draw)
    made[tuple(map(slice, part.shape))] = part
    return made


@pytest.mark.parametrize("kind", sorted(KNOWN))
def test_half_of_a_double_model_answers_as_the_whole(kind):
    large = model(kind)
    width = large.config.hidden_size // 2
    small = spread(from_width(model(kind, 1), width), 3, 0.2)
    doubled(small, large)
    student = from_width(large, width)
    assert same(weights(student), weights(small))
    for whole, half in zip(answers(large), answers(student), strict=True):
        assert half.std() > 0.1
        assert torch.allclose(whole[..., :width], half, atol=1e-4)
        assert torch.allclose(whole[..., width:], half, atol=1e-4)


def last_projections(network: nn.Module, site: str) -> list[tuple[nn.Module, int]]:
    """Those of all blocks, each with the axis of its inputs."""
    from interventions import Location, architecture

    found = architecture(network)
    modules = [
        found.place(Location(i, site, stack=stack.name or None)).module
        for stack in found.stacks
        for i in range(len(stack.blocks))
    ]
    if site == "attention_output":
        modules += [m for path, m in network.named_modules() if path.endswith("EncDecAttention.o")]
    return [(module, 0 if type(module).__name__ == "Conv1D" else 1) for module in modules]


def kill(network: nn.Module, site: str, share: float) -> None:
    """Let nothing through that lies beyond the first share of the units, or heads."""
    with torch.no_grad():
        for module, axis in last_projections(network, site):
            size = module.weight.shape[axis]
            module.weight.narrow(axis, round(size * share), size - round(size * share)).zero_()


@pytest.mark.parametrize("kind", sorted(KNOWN))
def test_units_that_nothing_reads_are_not_missed(kind):
    teacher = model(kind)
    before = answers(teacher)
    kill(teacher, "mlp_activation", 0.25)
    units = last_projections(teacher, "mlp_activation")
    student = from_width(teacher, intermediate=round(units[0][0].weight.shape[units[0][1]] * 0.25))
    for whole, part, old in zip(answers(teacher), answers(student), before, strict=True):
        assert torch.allclose(whole, part, atol=1e-5)
        assert not torch.allclose(whole, old, atol=1e-2)
    assert sum(p.numel() for p in student.parameters()) < sum(p.numel() for p in teacher.parameters())


@pytest.mark.parametrize("kind", sorted(k for k in KNOWN if k in {"t5", "mt5", "umt5", "llama", "mistral", "qwen3"}))
def test_heads_that_nothing_reads_are_not_missed(kind):
    teacher = model(kind)
    before = answers(teacher)
    kill(teacher, "attention_output", 0.5)
    student = from_width(teacher, heads=teacher.config.num_attention_heads // 2)
    for whole, part, old in zip(answers(teacher), answers(student), before, strict=True):
        assert torch.allclose(whole, part, atol=1e-5)
        assert not torch.allclose(whole, old, atol=1e-2)
    assert student.config.num_attention_heads == 2


@pytest.mark.parametrize("kind", sorted(KNOWN))
def test_the_student_is_saved_and_loaded(kind, tmp_path):
    teacher = model(kind)
    student = spread(from_width(teacher, teacher.config.hidden_size // 2, intermediate=20), 4, 0.2)
    student.save_pretrained(tmp_path)
    with quiet():
        again = type(student).from_pretrained(tmp_path).eval()
    for one, other in zip(answers(student), answers(again), strict=True):
        assert torch.equal(one, other)


def distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    return DistilBertForMaskedLM(DistilBertConfig(vocab_size=40, dim=16, n_layers=2, n_heads=4, hidden_dim=24))


PARTS = {
    # the teacher, {weight: what of each of its axes}; all others are whole
    "bert": (bert, {
        "bert.embeddings.word_embeddings.weight": (slice(None), slice(8)),
        "bert.encoder.layer.1.attention.self.query.weight": (slice(8), slice(8)),
        "bert.encoder.layer.1.attention.self.value.bias": (slice(8),),
        "bert.encoder.layer.1.attention.output.dense.weight": (slice(8), slice(8)),
        "bert.encoder.layer.1.intermediate.dense.weight": (slice(12), slice(8)),
        "bert.encoder.layer.1.intermediate.dense.bias": (slice(12),),
        "bert.encoder.layer.1.output.dense.weight": (slice(8), slice(12)),
        "bert.encoder.layer.1.output.LayerNorm.bias": (slice(8),),
        "bert.pooler.dense.weight": (slice(8), slice(8)),
        "classifier.weight": (slice(None), slice(8)),
        "classifier.bias": (slice(None),),
    }),
    "distilbert": (distilbert, {
        "distilbert.embeddings.position_embeddings.weight": (slice(None), slice(8)),
        "distilbert.transformer.layer.1.attention.k_lin.weight": (slice(8), slice(8)),
        "distilbert.transformer.layer.1.attention.out_lin.weight": (slice(8), slice(8)),
        "distilbert.transformer.layer.1.ffn.lin1.weight": (slice(12), slice(8)),
        "distilbert.transformer.layer.1.ffn.lin2.weight": (slice(8), slice(12)),
        "vocab_transform.weight": (slice(8), slice(8)),
        "vocab_projector.weight": (slice(None), slice(8)),
        "vocab_projector.bias": (slice(None),),
    }),
    "gpt2": (gpt2, {
        "transformer.wpe.weight": (slice(None), slice(8)),
        # queries, keys and values lie side by side: 3 × 16 columns, of each the first 8
        "transformer.h.1.attn.c_attn.weight": (slice(8), [*range(8), *range(16, 24), *range(32, 40)]),
        "transformer.h.1.attn.c_attn.bias": ([*range(8), *range(16, 24), *range(32, 40)],),
        "transformer.h.1.attn.c_proj.weight": (slice(8), slice(8)),
        "transformer.h.1.mlp.c_fc.weight": (slice(8), slice(32)),
        "transformer.h.1.mlp.c_proj.weight": (slice(32), slice(8)),
        "score.weight": (slice(None), slice(8)),
    }),
    "llama": (llama, {  # 4 heads of 4, 2 for keys and values
        "model.embed_tokens.weight": (slice(None), slice(8)),
        "model.layers.1.self_attn.q_proj.weight": (slice(8), slice(8)),
        "model.layers.1.self_attn.k_proj.weight": (slice(4), slice(8)),
        "model.layers.1.self_attn.o_proj.weight": (slice(8), slice(8)),
        "model.layers.1.mlp.gate_proj.weight": (slice(12), slice(8)),
        "model.layers.1.mlp.down_proj.weight": (slice(8), slice(12)),
        "model.norm.weight": (slice(8),),
        "lm_head.weight": (slice(None), slice(8)),
    }),
    "t5": (t5, {  # 2 heads of 8
        "shared.weight": (slice(None), slice(8)),
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (slice(None), slice(1)),
        "decoder.block.1.layer.0.SelfAttention.q.weight": (slice(8), slice(8)),
        "decoder.block.1.layer.1.EncDecAttention.v.weight": (slice(8), slice(8)),
        "decoder.block.1.layer.1.EncDecAttention.o.weight": (slice(8), slice(8)),
        "encoder.block.1.layer.1.DenseReluDense.wi.weight": (slice(12), slice(8)),
        "encoder.block.1.layer.1.DenseReluDense.wo.weight": (slice(8), slice(12)),
        "lm_head.weight": (slice(None), slice(8)),
    }),
}  # fmt: skip


@pytest.mark.parametrize("family", PARTS)
def test_the_weights_are_the_leading_ones_and_none_is_shared(family):
    make, parts = PARTS[family]
    teacher = spread(make(), scale=0.5)
    before, state = weights(teacher), torch.random.get_rng_state()
    student = from_width(teacher, 8)
    assert torch.equal(state, torch.random.get_rng_state())
    assert type(student) is type(teacher)
    assert depth(student) == depth(teacher)
    found = student.state_dict()
    for name, axes in parts.items():
        expected = before[name]
        for axis, kept in enumerate(axes):
            index = torch.arange(expected.shape[axis])[kept]
            expected = expected.index_select(axis, index)
        assert torch.equal(found[name], expected), name
    addresses = {p.data_ptr() for p in (*teacher.parameters(), *teacher.buffers())}
    assert not addresses & {p.data_ptr() for p in (*student.parameters(), *student.buffers())}
    assert same(before, weights(teacher))


def test_the_configuration_says_what_was_built():
    student = from_width(spread(llama()), 8)
    config = student.config
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (8, 2, 1)
    assert (config.head_dim, config.intermediate_size, config.num_hidden_layers) == (4, 12, 4)
    config = from_width(spread(llama()), heads=2, intermediate=5).config
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (16, 2, 5)
    config = from_width(spread(t5()), 4, heads=1, intermediate=3).config
    assert (config.d_model, config.num_heads, config.d_kv, config.d_ff) == (4, 1, 8, 3)
    assert from_width(spread(gpt2()), intermediate=10).config.n_inner == 10


def test_the_whole_width_gives_the_same_answers_and_tied_weights_stay_tied():
    teacher = spread(masked_lm())
    batch = torch.randint(5, 40, (2, 5))
    with torch.no_grad():
        assert torch.equal(teacher(batch).logits, from_width(teacher, 16)(batch).logits)
    student = from_width(teacher, 8)
    assert student.get_input_embeddings().weight is student.get_output_embeddings().weight


def test_narrower_and_shallower():
    teacher = spread(bert(4))
    both, other = from_layers(from_width(teacher, 8), (0, 3)), from_width(from_layers(teacher, (0, 3)), 8)
    assert same(weights(both), weights(other))
    assert (depth(both), both.config.hidden_size) == (2, 8)


def test_mode_and_dtype():
    teacher = bert(2).double().train().requires_grad_(False)
    student = from_width(teacher, 8)
    assert student.training
    assert next(student.parameters()).dtype == torch.float64
    assert all(p.requires_grad for p in student.parameters())


def scaled():
    from transformers import BartConfig, BartModel

    sides = {f"{side}_{name}": count for side in ("encoder", "decoder")
             for name, count in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))}  # fmt: skip
    return BartModel(BartConfig(vocab_size=40, d_model=16, scale_embedding=True, **sides))


def bloom():
    from transformers import BloomConfig, BloomModel

    return BloomModel(BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=2))


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (bert, dict(width=12), "width=12 leaves no whole number of the 2 heads; use a multiple of 8"),
        (llama, dict(width=4), "1 of 4 heads leave no whole number of the 2 key and value heads; use a multiple of 8"),
        (bert, dict(width=24), "width=24 cannot be taken from this 'bert' model, which has 16; choose 1 to 16"),
        (bert, dict(heads=1), r"heads=1 with width=16 .* width 16 and .* have 8: .*from_width\(teacher, 8\)"),
        (bert, dict(intermediate=25), "intermediate=25 cannot be taken from this 'bert' model, which has 24"),
        (gpt2, dict(intermediate=65), "intermediate=65 cannot be taken from this 'gpt2' model, which has 64"),
        (llama, dict(heads=0), "heads=0 cannot be taken"),
        (bert, {}, r"from_width needs a size to reduce; e.g. from_width\(teacher, 8\)"),
        (scaled, dict(width=8), "multiplies its embeddings by √16"),
        (bloom, dict(width=8), "weights of a 'bloom' model .* was not checked .*bart, bert"),
        (CNN, dict(width=3), "CNN has no transformers configuration"),
    ],
)
def test_what_does_not_fit(make, settings, message):
    with pytest.raises(DistillError, match=message):
        from_width(make(), **settings)


def test_units_that_no_whole_share_is_left_of():
    teacher = bert()
    teacher.config.intermediate_size = 25
    with pytest.raises(DistillError, match="no whole number of the 25 feed-forward units; .*intermediate=12"):
        from_width(teacher, 8)
