import pytest
import torch

from distill import DistillError, from_layers
from distill.interchange.mapping import depth
from distill.models.inputs import inputs_of
from distill.students.from_layers import _of_layers
from distill.students.from_layers import spread as spread_layers
from interventions import Location, run
from tests.distill.tiny_models import (
    VOCABULARY,
    batch_of,
    bert,
    gpt2,
    gpt2_lm,
    llama,
    masked_lm,
    mlp,
    same,
    spread,
    t5,
    vit,
    weights,
)

MODELS = [bert, masked_lm, vit, gpt2, gpt2_lm, llama, t5]
STACKS = {
    bert: "bert.encoder.layer",
    masked_lm: "bert.encoder.layer",
    vit: "vit.layers",
    gpt2: "transformer.h",
    gpt2_lm: "transformer.h",
    llama: "model.layers",
    t5: "decoder.block",
}


def logits(model, batch):
    with torch.no_grad():
        return model(**inputs_of(model, batch)).logits


@pytest.mark.parametrize(
    ("count", "of", "expected"),
    [
        (6, 12, (0, 2, 4, 7, 9, 11)),  # DistilBERT
        (3, 12, (0, 6, 11)),
        (1, 12, (0,)),
        (12, 12, tuple(range(12))),
        (2, 6, (0, 5)),
        (3, 6, (0, 2, 5)),
    ],
)
def test_layers_are_spread_from_the_first_to_the_last(count, of, expected):
    assert spread_layers(count, of) == expected


@pytest.mark.parametrize("make", MODELS)
def test_as_many_layers_give_the_same_answers(make):
    teacher = spread(make(4))
    student = from_layers(teacher, 4)
    assert torch.equal(logits(teacher, batch_of(make)), logits(student, batch_of(make)))


@pytest.mark.parametrize("make", MODELS)
def test_the_weights_are_those_of_the_chosen_layers_and_none_is_shared(make):
    teacher = spread(make(4))
    before = weights(teacher)
    state = torch.random.get_rng_state()
    student = from_layers(teacher, (1, -1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert type(student) is type(teacher)
    assert depth(student) == 2
    stack, found = STACKS[make], student.state_dict()
    for name, value in found.items():
        source = name
        for new, old in ((0, 1), (1, 3)):
            source = source.replace(f"{stack}.{new}.", f"{stack}.old{old}.")
        source = source.replace(".old", ".")
        if "relative_attention_bias" in name:  # T5's first block has it for all
            source = name
        assert torch.equal(value, before[source]), name
    addresses = {p.data_ptr() for p in (*teacher.parameters(), *teacher.buffers())}
    assert not addresses & {p.data_ptr() for p in (*student.parameters(), *student.buffers())}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert same(before, weights(teacher))
    assert depth(teacher) == 4
    assert logits(student, batch_of(make)).isfinite().all()


@pytest.mark.parametrize("make", [gpt2_lm, t5])
def test_tied_weights_stay_tied(make):
    student = from_layers(make(3), 2)
    assert student.get_input_embeddings().weight is student.get_output_embeddings().weight


def test_the_encoder_of_an_encoder_decoder_is_whole():
    student = from_layers(t5(4), 2)
    assert len(student.encoder.block) == 3
    assert len(student.decoder.block) == 2


@pytest.mark.parametrize("make", [bert, gpt2_lm, t5])
def test_the_student_is_saved_and_loaded(make, tmp_path):
    student = spread(from_layers(make(3), 2), 4)
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(student, batch_of(make)), logits(again, batch_of(make)))


def test_mode_dtype_and_gradients():
    teacher = bert(3).double().train().requires_grad_(False)
    student = from_layers(teacher, 2)
    assert student.training
    assert next(student.parameters()).dtype == torch.float64
    assert all(p.requires_grad for p in student.parameters())
    assert not from_layers(teacher.eval(), 2).training


def test_attention_implementation_is_kept():
    teacher = bert(3)
    teacher.set_attn_implementation("eager")
    assert from_layers(teacher, 2).config._attn_implementation == "eager"
    assert teacher.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (0, "a student of 0 layers cannot be made from a teacher of 4; choose 1 to 4"),
        (5, "a student of 5 layers cannot be made"),
        ((0, 4), r"layers=\[0, 4\] cannot be taken from a teacher of 4 layers \(0 to 3\)"),
        ((), r"layers=\[\] cannot be taken"),
    ],
)
def test_layers_that_do_not_exist(layers, message):
    with pytest.raises(DistillError, match=message):
        from_layers(bert(4), layers)


@pytest.mark.parametrize("make", MODELS)
def test_the_first_layers_compute_what_they_did(make):
    teacher = spread(make(4))
    student = from_layers(teacher, range(3))
    inputs, last = inputs_of(teacher, batch_of(make)), Location(2)
    with torch.no_grad():
        states = [run(model, inputs, last).activations[last] for model in (teacher, student)]
    assert torch.equal(*states)


def bart(layers: int = 3) -> torch.nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    return BartForConditionalGeneration(
        BartConfig(vocab_size=VOCABULARY, d_model=16, encoder_layers=4, decoder_layers=layers, pad_token_id=0,
                   encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
                   decoder_start_token_id=0, eos_token_id=2, bos_token_id=1, forced_eos_token_id=None, dropout=0.0)
    )  # fmt: skip


def sides(model):
    find = model.get_encoder(), model.get_decoder()
    return tuple(len(getattr(side, "block", None) or side.layers) for side in find)


@pytest.mark.parametrize(("make", "whole"), [(t5, (3, 4)), (bart, (4, 3))])
def test_either_side_of_an_encoder_decoder(make, whole):
    teacher = spread(make())
    assert sides(teacher) == whole
    assert sides(from_layers(teacher, 2)) == (whole[0], 2)
    assert sides(from_layers(teacher, (0, 2), stack="encoder")) == (2, whole[1])
    both = from_layers(from_layers(teacher, 1), 2, stack="encoder")
    assert sides(both) == (2, 1)
    assert logits(both, batch_of(make)).isfinite().all()
    batch, last = inputs_of(teacher, batch_of(make)), Location(1, stack="encoder")
    first = from_layers(teacher, range(2), stack="encoder")
    with torch.no_grad():
        assert torch.equal(*(run(model, batch, last).activations[last] for model in (teacher, first)))
    other = from_layers(teacher, (0, 2), stack="encoder")
    assert not torch.equal(logits(other, batch), logits(first, batch))
    with pytest.raises(DistillError, match="stack 'middle' does not exist"):
        from_layers(teacher, 2, stack="middle")


def qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, head_dim=8,
                    num_key_value_heads=1, intermediate_size=24, sliding_window=2, use_sliding_window=True,
                    layer_types=["full_attention", "sliding_attention", "full_attention", "sliding_attention"])
    )  # fmt: skip


def gpt_neo():
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    return GPTNeoForCausalLM(
        GPTNeoConfig(vocab_size=VOCABULARY, hidden_size=16, num_layers=4, num_heads=2, intermediate_size=24,
                     max_position_embeddings=24, window_size=2, attention_types=[[["global", "local"], 2]])
    )  # fmt: skip


def longformer():
    from transformers import LongformerConfig, LongformerForSequenceClassification

    return LongformerForSequenceClassification(
        LongformerConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
                         intermediate_size=24, attention_window=[4, 4, 8, 8], max_position_embeddings=40)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "name", "expected"),
    [
        (qwen3, "layer_types", ["sliding_attention"] * 2),
        (gpt_neo, "attention_layers", ["local", "local"]),
        (longformer, "attention_window", [4, 8]),
    ],
)
def test_what_the_configuration_says_of_each_layer_goes_with_it(make, name, expected, tmp_path):
    teacher = spread(make())
    student = from_layers(teacher, (1, 3))
    assert getattr(student.config, name) == expected
    assert len(getattr(teacher.config, name)) == 4
    batch = batch_of(bert)
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(student, batch), logits(again, batch))
    assert not torch.equal(logits(student, batch), logits(from_layers(teacher, (0, 2)), batch))


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("layer_types", ["a", "b", "c"], ["a", "c"]),
        ("full_attn_idxs", [1, 2], [1]),
        ("full_attn_idxs", [1], []),
        ("no_rope_layers", [1, 1, 0], [1, 0]),  # flags, not numbers of layers
        ("intermediate_size", [8, 16, 24], [8, 24]),
        ("mlp_only_layers", [], None),
        ("eos_token_id", [4, 5, 6], None),
        ("architectures", ["A", "B", "C"], None),
        ("out_channels", [0, 1, 2], None),
    ],
)
def test_settings_of_layers(name, values, expected):
    assert _of_layers(name, values, 3, (0, 2)) == expected


def clip():
    from transformers import CLIPConfig, CLIPModel

    sizes = dict(hidden_size=16, num_attention_heads=2, intermediate_size=24, projection_dim=8)
    return CLIPModel(
        CLIPConfig(text_config=dict(vocab_size=VOCABULARY, num_hidden_layers=2, max_position_embeddings=24, **sizes),
                   vision_config=dict(num_hidden_layers=4, image_size=8, patch_size=4, **sizes), projection_dim=8)
    )  # fmt: skip


def test_one_of_several_stacks():
    teacher = clip()
    student = from_layers(teacher, (1, 3), stack="vision_model")
    assert (len(student.vision_model.encoder.layers), len(student.text_model.encoder.layers)) == (2, 2)
    expected = teacher.vision_model.encoder.layers[3].mlp.fc1.weight
    assert torch.equal(student.vision_model.encoder.layers[1].mlp.fc1.weight, expected)
    with pytest.raises(DistillError, match="layers cannot be counted: .*ambiguous"):
        from_layers(teacher, 2)


def swin():
    from transformers import SwinConfig, SwinModel

    return SwinModel(
        SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2)
    )


def jamba():
    from transformers import JambaConfig, JambaForCausalLM

    return JambaForCausalLM(
        JambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
                    num_key_value_heads=1, intermediate_size=24, attn_layer_period=2, attn_layer_offset=1,
                    num_experts=2, expert_layer_period=2, expert_layer_offset=1, mamba_d_state=4, mamba_dt_rank=2,
                    use_mamba_kernels=False, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "layers", "message"),
    [
        (swin, (1,), "SwinModel.* build the student yourself"),
        (jamba, (1, 3), "layer 1 of JambaForCausalLM cannot be layer 0 .* class would differ"),
    ],
)
def test_layers_that_cannot_be_taken_out(make, layers, message):
    with pytest.raises(DistillError, match=message):
        from_layers(make(), layers)


def test_layers_of_a_hybrid_that_can():
    teacher = spread(jamba())
    student = from_layers(teacher, (0, 3))
    assert [type(a) for a in student.model.layers] == [type(teacher.model.layers[i]) for i in (0, 3)]
    assert logits(student, batch_of(bert)).isfinite().all()


class Block(torch.nn.Module):
    def __init__(self, width, out=None):
        super().__init__()
        self.linear = torch.nn.Linear(width, out or width)

    def forward(self, x):
        return self.linear(x).tanh()


class Plain(torch.nn.Module):
    """Counts its blocks in its forward, as many do."""

    def __init__(self, blocks=4, width=6):
        super().__init__()
        self.num_layers, self.width = blocks, blocks  # one of them is no count
        self.layers = torch.nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = torch.nn.Linear(width, 3)

    def forward(self, inputs):
        for i in range(self.num_layers):
            inputs = self.layers[i](inputs)
        return self.head(inputs)


class InARow(torch.nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks, self.head = torch.nn.Sequential(*blocks), torch.nn.Linear(6, 3)

    def forward(self, inputs):
        return self.head(self.blocks(inputs))


def in_a_row():
    return InARow(*(Block(6) for _ in range(4)))


@pytest.mark.parametrize("make", [Plain, in_a_row])
@pytest.mark.parametrize("layers", [2, range(3), (1, 1, -1)])
def test_modules_without_a_configuration_are_copied(make, layers):
    teacher, inputs = make().eval(), torch.randn(5, 6)
    before = weights(teacher)
    student = from_layers(teacher, layers)
    chosen = {2: (0, 3), range(3): (0, 1, 2)}.get(layers, (1, 1, 3))
    blocks = teacher.layers if make is Plain else teacher.blocks
    expected = inputs
    with torch.no_grad():
        for layer in chosen:
            expected = blocks[layer](expected)
        assert torch.equal(student(inputs), teacher.head(expected))
    assert type(student) is type(teacher)
    assert not student.training
    addresses = [p.data_ptr() for model in (teacher, student) for p in model.parameters()]
    assert len(addresses) == len(set(addresses)) == 8 + 2 + 2 * len(chosen) + 2
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert same(before, weights(teacher))
    assert len(blocks) == 4
    if make is Plain:
        assert (student.num_layers, student.width, teacher.num_layers) == (len(chosen), 4, 4)


def test_blocks_of_several_shapes_are_tried_out():
    teacher = InARow(Block(4, 6), Block(6), Block(6)).train()
    with pytest.raises(DistillError, match=r"blocks 'blocks' of InARow differ in shape.*inputs=…"):
        from_layers(teacher, (0, 2))
    student = from_layers(teacher, (0, 2), inputs=torch.randn(2, 4))
    assert student(torch.randn(2, 4)).shape == (2, 3)
    assert student.training
    with pytest.raises(DistillError, match=r"a InARow of its layers \[1, 2\] does not run on these inputs"):
        from_layers(teacher, (1, 2), inputs=torch.randn(2, 4))


def test_modules_that_cannot_be_cut():
    class Beside(Plain):
        def __init__(self):
            super().__init__()
            self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(6) for _ in range(4))

    with pytest.raises(DistillError, match="Beside has 'norms' beside its blocks 'layers'"):
        from_layers(Beside(), 2)
    shared = Block(6)
    with pytest.raises(DistillError, match="blocks of InARow do not lie in one list"):
        from_layers(InARow(Block(6), shared, shared), 2)
    with pytest.raises(DistillError, match="layers cannot be counted"):
        from_layers(mlp(), 2)
