"""Find the module of a block that computes a site, and on which side of it the activation is."""

from torch import nn

from interventions.locations import HEAD_SITES
from interventions.models.attentions import Attention, attention_of
from interventions.models.feed_forwards import feed_forward_of
from interventions.models.layers import Missing


def inside(block: nn.Module, site: str) -> tuple[nn.Module, str, Attention | None]:
    """Return the module of a block that computes a site, its side, and its attention where the site has heads.

    The side is "input" or "output" of the module, or the site itself where it lies inside an attention.

    Raises:
        Missing: the block has no such site.
    """
    if site in ("block_output", "block_input", "embedding"):
        return block, "output" if site == "block_output" else "input", None
    if site in HEAD_SITES:
        return heads_at(attention_of(block), site)
    if site.startswith("attention_"):
        attention = attention_of(block)
        if site == "attention_input":
            return attention.module, "input", None
        if attention.kind == "torch":
            return attention.module, "output", None
        if attention.projection is None:
            raise Missing(f"no output projection was found in or after {type(attention.module).__name__}")
        return attention.projection, "output", None
    part = feed_forward_of(block)
    if site == "mlp_input":
        return part.input, "input", None
    if site == "mlp_output":
        return part.output, "output", None
    if part.down is None:
        raise Missing(f"{type(part.output).__name__} is a mixture of experts, whose activations go by the path of each")
    return part.down, "input", None


def heads_at(attention: Attention, site: str) -> tuple[nn.Module, str, Attention]:
    """Return module, side and attention of a site with heads, as `inside` does.

    Raises:
        Missing: the attention computes it where hooks do not reach.
    """
    kind, name = attention.kind, type(attention.module).__name__
    if kind == "torch":
        raise Missing(f"{name} is torch's own, which computes {site} inside one call")
    if kind == "own" and site in ("query", "key", "value"):
        raise Missing(f"{name} computes attention by products of its own; name the projection of the {site} by path")
    if kind == "own" and site == "attention_heads":
        if attention.projection is None or attention.heads is None:
            what = "output projection" if attention.projection is None else "number of heads"
            raise Missing(f"{name} computes attention by products of its own and has no {what} that was found")
        return attention.projection, "input", attention
    return attention.module, site, attention
