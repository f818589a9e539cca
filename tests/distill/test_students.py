import pytest
import torch

from distill import DistillError, from_layers
from distill.inputs import inputs_of
from distill.mapping import depth
from distill.students import spread as spread_layers
from tests.distill.models import (
    VOCABULARY,
    bert,
    gpt2,
    gpt2_lm,
    images,
    llama,
    masked_lm,
    mlp,
    same,
    spread,
    t5,
    text,
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


def batch_of(make):
    if make is vit:
        return images(3).batch(range(3))
    draw = torch.Generator().manual_seed(0)
    return {**text(3).batch(range(3)), "decoder_input_ids": torch.randint(5, VOCABULARY, (3, 4), generator=draw)}


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


def test_a_plain_module_is_built_by_hand():
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(2, 2)) for _ in range(3))

    with pytest.raises(DistillError, match="Plain has no transformers configuration .*build the student yourself"):
        from_layers(Plain(), 2)
    with pytest.raises(DistillError, match="layers cannot be counted"):
        from_layers(mlp(), 2)
