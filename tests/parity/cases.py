"""What is compared: one intervention, said as a `Location` of ours and as columns of what a module takes or returns.

Both sides build the same tiny model and the same inputs from seeds, and answer with the same named tensors.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from interventions import Location
from tests.interventions.tiny_models import batch, make

SIGMA, SEED = 0.5, 3  # of the noise

# Layer 1 of 3. Heads are 8 wide, those of Llama 4 (4 of queries, 2 of keys and values).
PLACES = {
    "gpt2": {
        "embedding": "transformer.h.0@input",
        "block_input.1": "transformer.h.1@input",
        "block_output.1": "transformer.h.1@output",
        "attention_input.1": "transformer.h.1.ln_1@output",
        "query.1[heads=1]": "transformer.h.1.attn.c_attn@output[dims=8:16]",
        "key.1[heads=0]": "transformer.h.1.attn.c_attn@output[dims=16:24]",
        "value.1[heads=1]": "transformer.h.1.attn.c_attn@output[dims=40:48]",
        "attention_heads.1[heads=1]": "transformer.h.1.attn.c_proj@input[dims=8:16]",
        "attention_output.1": "transformer.h.1.attn.c_proj@output",
        "mlp_input.1": "transformer.h.1.ln_2@output",
        "mlp_activation.1": "transformer.h.1.mlp.c_proj@input",
        "mlp_output.1": "transformer.h.1.mlp.c_proj@output",
        "block_output.1[dims=3:9]": "transformer.h.1@output[dims=3:9]",
        "final_norm": "transformer.ln_f@output",
        "logits": "lm_head@output",
    },
    "llama": {
        "embedding": "model.layers.0@input",
        "block_input.1": "model.layers.1@input",
        "block_output.1": "model.layers.1@output",
        "attention_input.1": "model.layers.1.input_layernorm@output",
        "query.1[heads=3]": "model.layers.1.self_attn.q_proj@output[dims=12:16]",
        "key.1[heads=1]": "model.layers.1.self_attn.k_proj@output[dims=4:8]",
        "value.1[heads=1]": "model.layers.1.self_attn.v_proj@output[dims=4:8]",
        "attention_heads.1[heads=2]": "model.layers.1.self_attn.o_proj@input[dims=8:12]",
        "attention_output.1": "model.layers.1.self_attn.o_proj@output",
        "mlp_input.1": "model.layers.1.post_attention_layernorm@output",
        "mlp_activation.1": "model.layers.1.mlp.down_proj@input",
        "mlp_output.1": "model.layers.1.mlp@output",
        "block_output.1[dims=3:9]": "model.layers.1@output[dims=3:9]",
        "final_norm": "model.norm@output",
        "logits": "lm_head@output",
    },
    "bert": {
        "embedding": "bert.embeddings.dropout@output",
        "block_output.1": "bert.encoder.layer.1@output",
        "attention_input.1": "bert.encoder.layer.1.attention.self@input",
        "query.1[heads=1]": "bert.encoder.layer.1.attention.self.query@output[dims=8:16]",
        "key.1[heads=0]": "bert.encoder.layer.1.attention.self.key@output[dims=0:8]",
        "value.1[heads=1]": "bert.encoder.layer.1.attention.self.value@output[dims=8:16]",
        "attention_heads.1[heads=1]": "bert.encoder.layer.1.attention.output.dense@input[dims=8:16]",
        "attention_output.1": "bert.encoder.layer.1.attention.output.dense@output",
        "mlp_input.1": "bert.encoder.layer.1.intermediate@input",
        "mlp_activation.1": "bert.encoder.layer.1.intermediate.intermediate_act_fn@output",
        "mlp_output.1": "bert.encoder.layer.1.output.dense@output",
        "block_output.1[dims=3:9]": "bert.encoder.layer.1@output[dims=3:9]",
    },
    "t5": {
        "block_output.1": "decoder.block.1@output",
        "block_output.1[dims=3:9]": "decoder.block.1@output[dims=3:9]",
        "encoder/block_output.1": "encoder.block.1@output",
        "value.1[heads=1]": "decoder.block.1.layer.0.SelfAttention.v@output[dims=8:16]",
        "attention_heads.1[heads=1]": "decoder.block.1.layer.0.SelfAttention.o@input[dims=8:16]",
        "encoder/attention_output.1": "encoder.block.1.layer.0.SelfAttention.o@output",
        "mlp_activation.1": "decoder.block.1.layer.2.DenseReluDense.wo@input",
        "encoder/mlp_output.1": "encoder.block.1.layer.1.DenseReluDense.wo@output",
    },
    "vit": {
        "block_output.1": "vit.layers.1@output",
        "key.1[heads=1]": "vit.layers.1.attention.k_proj@output[dims=8:16]",
        "attention_heads.1[heads=0]": "vit.layers.1.attention.o_proj@input[dims=0:8]",
        "attention_output.1": "vit.layers.1.attention.o_proj@output",
        "mlp_activation.1": "vit.layers.1.mlp.fc2@input",
        "mlp_output.1": "vit.layers.1.mlp.fc2@output",
        "block_output.1[dims=3:9]": "vit.layers.1@output[dims=3:9]",
    },
}
# Also written at all positions. Not a whole block output: what follows would be the source's, whatever the layer.
EVERYWHERE = ("block_output.1[", "attention_heads", "attention_output", "mlp_activation")
CHANGED = ("block_output.1", "attention_heads")  # also zeroed, and noised


@dataclass(frozen=True)
class Case:
    """Write `op` at `at`, which is at `place`, at one position or (None) all."""

    model: str
    at: Location
    place: Location
    position: int | None = 2
    op: str = "swap"

    def __str__(self) -> str:
        where = "everywhere" if self.position is None else f"position {self.position}"
        return f"{self.model} {self.at} {self.op} {where}"

    @property
    def entries(self) -> tuple[slice, ...]:
        """What is written, as an index of what the module of `place` takes or returns."""
        positions = slice(None) if self.position is None else slice(self.position, self.position + 1)
        dims = slice(None) if self.place.dims is None else slice(self.place.dims[0], self.place.dims[-1] + 1)
        return slice(None), positions, dims


def cases() -> Iterator[Case]:
    for model, places in PLACES.items():
        for text, path in places.items():
            at, place = Location.parse(text), Location.parse(f"module:{path}")
            yield Case(model, at, place)
            if text.startswith(EVERYWHERE):
                yield Case(model, at, place, None)
            if text.startswith(CHANGED):
                yield Case(model, at, place, op="zero")
                yield Case(model, at, place, op="noise")


CASES = tuple(dict.fromkeys(cases()))


def inputs(model: nn.Module, name: str, seed: int) -> dict[str, Tensor]:
    """Inputs of `make(name)` that gradients reach: embedded tokens, or pixels."""
    given = batch(name, seed)
    if name == "vit":
        return {"pixel_values": given["pixel_values"].requires_grad_()}
    embed = model.get_input_embeddings()
    return {
        key.replace("input_ids", "inputs_embeds"): embed(value).detach().requires_grad_() if "ids" in key else value
        for key, value in given.items()
    }


def question(case: Case) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """The model, the base inputs and the source inputs."""
    model = make(case.model)
    return model, inputs(model, case.model, 1), inputs(model, case.model, 2)


def normal(shape: torch.Size) -> Tensor:
    """The standard normal numbers that the noise is made of."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED))


def loss(logits: Tensor) -> Tensor:
    return logits.square().mean()


def gradients(model: nn.Module, base: dict[str, Tensor], source: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a backward pass left at the inputs and the parameters; zeros where it did not come by."""
    leaves = {f"base {key}": value for key, value in base.items()}
    leaves |= {f"source {key}": value for key, value in source.items()} | dict(model.named_parameters())
    return {
        name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for name, leaf in leaves.items()
        if leaf.is_floating_point()
    }
