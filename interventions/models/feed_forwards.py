"""Find the feed-forward part of a block and its projections, by the structure of the block."""

import re
from dataclasses import dataclass

from torch import nn

from interventions.models.attentions import attention_areas
from interventions.models.forward_order import has_forward
from interventions.models.layers import Missing, ancestor, is_inside, linears, width_in, width_out

_NO_MLP = re.compile(r"mixer|mamba|ssm|conv|recurrent|rglru|time|delta|rwkv|lstm|hyena|pool", re.I)
_MLP = re.compile(
    r"mlp|ffn?\d?$|^ffn?_|ffw|feed_?forward|intermediate|^output$|fc_?\d|linear_?\d|lin\d|dense_?\d|densere|moe|expert|^wi|^wo"
    r"|^w[123]$|4h|ff_?layer|fully|channel_mix|_proj$|positionwise|boom",
    re.I,
)


@dataclass(frozen=True, eq=False)
class FeedForward:
    """The feed-forward part of a block.

    Attributes:
        input: the module that reads the input of the part.
        output: the module that returns its output.
        down: the last projection; None for a mixture of experts, which has several.
    """

    input: nn.Module
    output: nn.Module
    down: nn.Module | None


def feed_forward_of(block: nn.Module) -> FeedForward:
    """Return the feed-forward part of a block.

    Raises:
        Missing: it has none, or several.
    """
    areas = attention_areas(block)
    outside = {path: module for path, module in block.named_modules() if path and not is_inside(path, areas)}
    experts = [path for path, module in outside.items() if path.split(".")[-1] == "experts" and list(module.modules())]
    if experts:
        path = experts[0].rpartition(".")[0]
        if not path:
            raise Missing(f"the experts of {type(block).__name__} lie in no module of their own")
        return FeedForward(outside[path], outside[path], None)
    linear = {path: module for path, module in linears(block) if path in outside and _looks_feed_forward(block, path)}
    if not linear:
        raise Missing(f"no feed-forward part was found in {type(block).__name__}")
    downs = _downs(linear)
    if len(downs) != 1:
        raise Missing(
            f"{type(block).__name__} has {len(downs) or 'no'} projections that could end its feed-forward part"
            + (f" ({', '.join(downs)}); name one by its path" if downs else "")
        )
    down = downs[0]
    ups = [path for path in linear if path != down]
    common = ancestor([*ups, down])
    if common and has_forward(outside[common]) and not any(is_inside(area, [common]) for area in areas):
        return FeedForward(outside[common], linear[down], linear[down])
    if len(ups) != 1:
        raise Missing(f"the feed-forward part of {type(block).__name__} lies in no module of its own")
    return FeedForward(linear[ups[0]], linear[down], linear[down])


def has_feed_forward(block: nn.Module) -> bool:
    """Return whether a feed-forward part of a block is found."""
    try:
        feed_forward_of(block)
    except Missing:
        return False
    return True


def _looks_feed_forward(block: nn.Module, path: str) -> bool:
    """Return whether the names and classes on a path are those of a feed-forward part."""
    names, module, classes = path.split("."), block, []
    for name in names[:-1]:
        module = module.get_submodule(name)
        classes.append(type(module).__name__)
    words = [*names, *classes]
    return not any(map(_NO_MLP.search, words)) and any(map(_MLP.search, words))


def _downs(linear: dict[str, nn.Module]) -> list[str]:
    """Return the paths of the projections that may be the last one: as wide as the input of the first, and no gate."""
    paths = list(linear)
    width = width_in(linear[paths[0]])
    if len(paths) < 2:
        return []
    back = [path for path in paths[1:] if width_out(linear[path]) == width and not re.search("gate|up_", path)]
    wide = [path for path in back if width_in(linear[path]) != width]
    return wide or back[-1:]
