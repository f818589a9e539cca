"""What the tests of the promises share: one model for each kind of attention, every site of a block, and all traces."""

import math

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_utils import AttentionInterface

from interventions import Location
from interventions.hooks.replacements import _replacements
from interventions.hooks.scopes import _open
from interventions.locations import BLOCK_SITES, HEAD_SITES
from tests.interventions.tiny_models import VOCABULARY, WIDTH, make, trace

PATTERNS = ("attention_scores", "attention_pattern")
WRITTEN_OUT = ("attention_scores", "attention_pattern", "attention_heads")  # where an attention has products of its own


class SelfAttention(nn.Module):
    """Calls `scaled_dot_product_attention` itself, or computes products of its own."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.num_heads = 2
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def heads(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [each(x).unflatten(-1, (2, -1)).transpose(1, 2) for each in (self.q_proj, self.k_proj, self.v_proj)]


class Fused(SelfAttention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = functional.scaled_dot_product_attention(*self.heads(x))
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class Products(SelfAttention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.heads(x)
        pattern = functional.softmax(torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(8), -1)
        return self.o_proj(torch.matmul(pattern, value).transpose(1, 2).flatten(-2))


FusedAttention = type("FusedAttention", (Fused,), {})
ProductAttention = type("ProductAttention", (Products,), {})


class Block(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.attention = FusedAttention(True) if fused else ProductAttention(False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class Net(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block(fused) for _ in range(3))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def net(fused: bool) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(fused).eval()


KINDS = {"interface": lambda: make("llama"), "sdpa": lambda: net(True), "own": lambda: net(False)}


def sites_of(kind: str) -> list[str]:
    """The sites of a block of `KINDS[kind]`."""
    return [site for site in BLOCK_SITES if kind != "own" or site not in HEAD_SITES or site in WRITTEN_OUT]


def at(site: str, layer: int = 1, **fields: object) -> Location:
    return Location(layer, site, **fields)


def traces(model: nn.Module) -> list:
    """Everything that an intervention might leave behind: on the model, in torch, in transformers, and of ours."""
    config = getattr(model, "config", None)
    return [
        trace(model),
        [vars(module).get("generate") for module in model.modules()],
        getattr(config, "_attn_implementation", None),
        vars(AttentionInterface)["get_interface"],
        torch._C._len_torch_function_stack(),
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        _open.get(),
        dict(_replacements),
    ]
