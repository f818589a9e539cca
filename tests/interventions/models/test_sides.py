"""Whose tokens those at a place are: prompt, mask and width of a call are applied where they belong alone."""

import pytest
import torch
from torch import nn

from interventions import Add, InterventionError, Location, Zero, interchange, intervene, mean_of, record, run, sweep
from interventions.models.architectures import architecture
from interventions.models.padding import real_of
from tests.interventions.tiny_models import VOCABULARY, WIDTH, make

PATCHES = 5  # of an image, with [CLS]
TOWER = {
    "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 40, "eos_token_id": 29, "bos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
PUSH = Add(torch.linspace(-3, 3, WIDTH))


def spread(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    return model.eval()


def clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    return spread(CLIPModel(CLIPConfig(text_config=TEXT, vision_config=TOWER, projection_dim=8)))


def git() -> nn.Module:
    from transformers import GitConfig, GitForCausalLM

    return spread(GitForCausalLM(GitConfig(**{**TEXT, "eos_token_id": None}, vision_config=TOWER)))


def blip_2(language: str = "opt") -> nn.Module:
    from transformers import Blip2Config, Blip2ForConditionalGeneration, OPTConfig, T5Config

    text = (
        OPTConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
                  max_position_embeddings=40, word_embed_proj_dim=WIDTH, eos_token_id=None, pad_token_id=0)
        if language == "opt"
        else T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, num_layers=2, num_heads=2, d_ff=32,
                      decoder_start_token_id=0, pad_token_id=0, eos_token_id=None)
    )  # fmt: skip
    q_former = {**TEXT, "encoder_hidden_size": WIDTH, "cross_attention_frequency": 1}
    config = Blip2Config(vision_config=TOWER, qformer_config=q_former, text_config=text, num_query_tokens=4,
                         image_token_index=28)  # fmt: skip
    return spread(Blip2ForConditionalGeneration(config))


def wav2vec2() -> nn.Module:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    return spread(
        Wav2Vec2ForCTC(
            Wav2Vec2Config(vocab_size=12, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
                           intermediate_size=32, conv_dim=(8, 8), conv_kernel=(10, 3), conv_stride=(5, 2),
                           num_feat_extract_layers=2, feat_extract_norm="layer", num_conv_pos_embeddings=4,
                           num_conv_pos_embedding_groups=2)
        )
    )  # fmt: skip


def both(length: int, padded: int = 0) -> dict:
    ids = torch.randint(2, 28, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, length - padded :] = 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 8, 8, generator=draw())}


def draw() -> torch.Generator:
    return torch.Generator().manual_seed(2)


def written(model: nn.Module, inputs: dict, at: Location, positions: object) -> list[list[int]]:
    with intervene(model, {at: Zero()}, positions=positions), record(model, at) as activations:
        model(**inputs)
    return [(row.abs().amax(-1) == 0).nonzero().flatten().tolist() for row in activations[at]]


@torch.no_grad()
@pytest.mark.parametrize("length", [3, PATCHES, 9])
@pytest.mark.parametrize("positions", [-1, 0, 4, slice(-2, None), [1, 3], torch.eye(2, PATCHES).bool()], ids=str)
def test_a_tower_counts_its_own_tokens(length, positions):
    """Whatever is written of the text, and padded in it: shorter than the image, as long, longer."""
    model, at = clip(), Location(0, stack="vision_model")
    alone = written(model.vision_model, {"pixel_values": both(3)["pixel_values"]}, Location(0), positions)
    for padded in (0, 2):
        assert written(model, both(length, padded), at, positions) == alone
    assert written(model, both(length, 2), Location(0, stack="text_model"), -1) == [[length - 3], [length - 1]]


@torch.no_grad()
def test_a_tower_that_runs_by_itself_needs_no_call():
    model = clip()
    at = Location(0, stack="vision_model")
    with intervene(model, {at: Zero()}, positions=-1), record(model, at) as activations:
        model.get_image_features(pixel_values=both(3)["pixel_values"])
    assert (activations[at][:, -1] == 0).all()
    assert (activations[at][:, :-1] != 0).any(-1).all()
    text = Location(0, stack="text_model")
    with (
        pytest.raises(InterventionError, match="outside a call of the model"),
        intervene(model, text, op=Zero(), positions=-1),
    ):
        model.get_text_features(input_ids=both(3)["input_ids"])


@torch.no_grad()
def test_a_sweep_covers_the_tokens_of_each_tower():
    model, inputs = clip(), both(3, padded=1)
    rows = [Location(0, stack="vision_model"), Location(0, stack="text_model")]
    grid = sweep(model, inputs, None, rows, op=PUSH, metric=lambda out: out.logits_per_image.diagonal())
    assert grid.positions == tuple(range(PATCHES))
    missing = grid.values.isnan()
    assert not missing[0].any()
    assert missing[1].tolist() == [False, False, False, True, True]


@torch.no_grad()
def test_means_and_sources_count_the_tokens_of_a_tower():
    model, inputs, at = clip(), both(PATCHES, padded=2), Location(0, stack="vision_model")
    states = run(model, inputs, at).activations[at]
    assert torch.allclose(mean_of(model, at, [inputs])[at].value, states.flatten(0, 1).mean(0), atol=1e-6)
    assert torch.allclose(mean_of(model, at, [inputs], positions=-1)[at].value, states[:, -1].mean(0), atol=1e-6)
    other = {**both(9, padded=4), "pixel_values": inputs["pixel_values"].flip(0)}
    with intervene(model, at, source=other, positions=0, source_positions=-1), record(model, at) as activations:
        model(**inputs)
    assert torch.equal(activations[at][:, 0], states.flip(0)[:, -1])


def answers(model: nn.Module, inputs: dict, at: Location, cached: bool, **chosen: object) -> torch.Tensor | str:
    try:
        with intervene(model, at, op=PUSH, **chosen):
            found = model.generate(
                **inputs, max_new_tokens=3, do_sample=False, use_cache=cached, output_logits=True, eos_token_id=None,
                return_dict_in_generate=True,
            )  # fmt: skip
    except InterventionError as error:
        return str(error)
    return torch.stack(found.logits)


@torch.no_grad()
@pytest.mark.parametrize("steps", [None, 0, 1, [0, 2]], ids=str)
def test_an_image_before_the_text_is_of_the_prompt(steps):
    """GIT puts its patches before the tokens of the text: steps count from their end, with a cache and without."""
    model, inputs = git(), both(4)
    language, tower = (stack.name for stack in reversed(architecture(model).stacks))
    for positions in (None, -1, 0, slice(-2, None)):
        for stack in (language, tower):
            if steps == 1 and (stack == tower or positions == 0):
                continue  # of the prompt: nothing is written
            found = [
                answers(model, inputs, Location(1, stack=stack), cached, steps=steps, positions=positions)
                for cached in (True, False)
            ]
            assert torch.allclose(*found, atol=1e-4)
    tower_alone = answers(model, inputs, Location(1, stack=tower), True, steps=1)
    assert "no call read the tokens of steps=1" in tower_alone
    last = answers(model, inputs, Location(1, stack=language), True, steps=0, positions=-1)
    numbered = answers(model, inputs, Location(1, stack=language), True, steps=0, positions=PATCHES + 3)
    assert torch.equal(last, numbered)


@torch.no_grad()
@pytest.mark.parametrize("language", ["opt", "t5"])
def test_a_language_model_that_generates_past_the_model(language):
    """BLIP-2 calls `generate` of a part of itself; its steps and its prompt are those of that."""
    model = blip_2(language)
    ids = torch.cat([torch.full((2, 4), 28), both(4)["input_ids"]], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": both(4)["pixel_values"]}
    inputs["attention_mask"][0, :1] = 0
    at = Location(1, stack=architecture(model).stacks[-1].name)
    for chosen in ({"steps": 0}, {"steps": 1}, {"positions": -1}, {"positions": -1, "steps": [0, 2]}):
        found = [answers(model, inputs, at, cached, **chosen) for cached in (True, False)]
        assert torch.allclose(*found, atol=1e-4)
    different = [answers(model, inputs, at, True, steps=steps) for steps in (None, 0, 1, 2)]
    assert len({tuple(each.flatten().tolist()) for each in different}) == 4
    queries = Location(0, stack=next(s.name for s in architecture(model).stacks if "qformer" in s.path))
    decoder = {"decoder_input_ids": ids[:, -2:]} if language == "t5" else {}
    assert written(model, {**inputs, **decoder}, queries, -1) == [[3], [3]]


@torch.no_grad()
def test_frames_are_counted_as_the_tokens_that_are_made_of_them():
    model, at = wav2vec2(), Location(0, stack="encoder")
    sound = torch.randn(2, 100, generator=draw())
    mask = torch.ones(2, 100, dtype=torch.long)
    mask[0, 60:] = 0
    alone = run(model, {"input_values": sound[:1, :60]}, at).activations[at].shape[1]
    whole = run(model, {"input_values": sound}, at).activations[at].shape[1]
    assert alone < whole
    inputs = {"input_values": sound, "attention_mask": mask}
    assert written(model, inputs, at, -1) == [[alone - 1], [whole - 1]]
    with pytest.raises(InterventionError, match=f"names padding in 1 of 2 examples .* length {alone}"):
        written(model, inputs, at, whole - 1)


@torch.no_grad()
def test_labels_longer_than_the_source_are_one_prompt():
    model = make("t5")
    inputs = {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.ones(2, 6, dtype=torch.long)}
    assert written(model, inputs, Location(1), -1) == [[5], [5]]


def test_which_argument_masks_which_part():
    found = architecture(blip_2("t5"))
    masks = {stack.path: found.place(Location(0, stack=stack.name)).mask for stack in found.stacks}
    assert masks == {
        "vision_model.encoder.layers": "",
        "qformer.encoder.layer": "",
        "language_model.encoder.block": "attention_mask",
        "language_model.decoder.block": "decoder_attention_mask",
    }
    found = architecture(blip_2("opt"))
    assert found.place(Location(0, stack=found.stacks[-1].name)).mask == "attention_mask"
    assert architecture(make("t5")).place(Location(module="lm_head")).mask == "decoder_attention_mask"


def test_a_mask_of_another_width_is_neither_cut_nor_filled():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert real_of(mask, 2, 5) is None
    assert real_of(mask, 2, 2) is None
    assert real_of(mask, 2, 5, beside=True).all()
    assert real_of(torch.ones(2, 3), 2, 5).all()
    model, at = make("bert"), Location(1)
    ids = torch.randint(1, VOCABULARY, (2, 5))
    with pytest.raises(InterventionError, match="positions is a mask of shape"):
        written(model, {"input_ids": ids}, at, torch.ones(2, 6).bool())
    with pytest.raises(InterventionError, match="positions is a mask of shape"):
        written(model, {"input_ids": ids}, at, torch.ones(2, 4).bool())


class Masked(nn.Module):
    """A model of one's own, whose padding is said under another name than transformers has."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))

    def forward(self, ids: torch.Tensor, **padding: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x


REAL = torch.tensor([[True, True, False], [True, True, True]])
SAID = {
    "mask": REAL.long(),
    "src_key_padding_mask": ~REAL,
    "pad_mask": (~REAL).float(),
    "padding": ~REAL,
    "lengths": REAL.sum(1),
    "seq_len": REAL.sum(1),
}


@pytest.mark.parametrize("name", SAID)
def test_padding_under_another_name_is_not_taken_for_tokens(name):
    model, ids, at = Masked().eval(), torch.randint(9, (2, 3)), Location(0)
    inputs = {"ids": ids, name: SAID[name]}
    written = {at: Zero()}
    for counted in (-1, slice(-2, None), [0], [[0], [1]]):
        with pytest.raises(
            InterventionError, match=rf"the model was given {name}, .* no attention_mask; .*register_blocks\("
        ):
            interchange(model, inputs, None, written, positions=counted)
    with pytest.raises(InterventionError, match=f"given {name}"):
        sweep(model, inputs, inputs, [at], metric=lambda out: out.sum((1, 2)), positions="each")
    last = torch.tensor([[False, True, False], [False, False, True]])
    found = interchange(model, inputs, None, written, positions=last, record=[at]).activations[at]
    assert torch.equal(found.eq(0).all(2) | ~last, torch.ones_like(last))
    alike = torch.ones(2, 3).long() if "mask" in name else torch.full((2,), 3)
    interchange(model, {"ids": ids, name: alike}, None, written, positions=-1)  # nothing is padding
    interchange(model, {"ids": ids, "bool_masked_pos": REAL}, None, written, positions=-1)  # what is to be predicted


def test_the_mask_of_a_model_is_registered():
    from interventions.models.overrides import EXCEPTIONS, register_blocks

    register_blocks("Masked", masks={"": "mask"})
    try:
        inputs, at = {"ids": torch.randint(1, 9, (2, 3)), "mask": REAL.long()}, Location(0)
        found = interchange(Masked().eval(), inputs, None, {at: Zero()}, positions=-1, record=[at]).activations[at]
        plain = run(Masked().eval(), inputs, [at]).activations[at]
    finally:
        EXCEPTIONS.pop("Masked")
    assert found[0, 1].eq(0).all()
    assert found[1, 2].eq(0).all()
    assert plain.shape == found.shape
