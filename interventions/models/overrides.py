"""The model types whose structure misleads, and where their blocks are; a user may add others."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from interventions.arguments import checked
from interventions.errors import InterventionError
from interventions.models.wrappers import unwrapped
from interventions.names import shown


@dataclass(frozen=True)
class Blocks:
    """An entry of the table: the lists of blocks of one model type.

    Attributes:
        paths: the dotted paths of the lists of blocks, in order, without the prefix of a model with a head.
        why: why the structure misleads.
        in_order: a function from the model and the blocks of a list to the blocks in the order of their calls, where
            some run more than once: layer i is then the i-th call.
        axes: the axes of the activations in the blocks, as an einops pattern of `interventions.models.axes`, where the
            modules do not show their order. Parallel streams are written as heads.
        resumes: whether a run may resume half way; False where a run without a cache computes something else.
        masks: path → the argument of the model that masks the tokens of the part at this path, "" if none does; for
            parts that do not read the text although neither name nor configuration says so. The path "" is the model.
    """

    paths: tuple[str, ...]
    why: str
    in_order: Callable[[nn.Module, tuple[nn.Module, ...]], tuple[nn.Module, ...]] | None = None
    axes: str = ""
    resumes: bool = True
    masks: Mapping[str, str] = field(default_factory=dict)

    def lists_in(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """Return the lists of blocks of `model` with their whole paths; [] where it has none."""
        modules = [(path, module) for path, module in model.named_modules() if path]
        return [found for end in self.paths for found in modules if f".{found[0]}".endswith(f".{end}")]


def _shared_in_groups(model: nn.Module, groups: tuple[nn.Module, ...]) -> tuple[nn.Module, ...]:
    """Return the blocks of ALBERT in the order of its layers: a few groups, each used for several layers in a row."""
    layers = int(getattr(model.config, "num_hidden_layers", len(groups)))
    return tuple(groups[layer * len(groups) // layers] for layer in range(layers))


EXCEPTIONS: dict[str, Blocks] = {
    "albert": Blocks(("albert_layer_groups",), "layers share their blocks", in_order=_shared_in_groups),
    "fsmt": Blocks((), "without a cache it attends to what comes later; time first", axes="t b d", resumes=False),
    "xlnet": Blocks((), "time first", axes="t b d"),
    **dict.fromkeys(("gemma3n", "gemma3n_text"), Blocks((), "four streams (AltUp) come first", axes="h b t d")),
    **dict.fromkeys(
        ("xlm", "flaubert"),
        Blocks(("attentions", "ffns", "layer_norm2"), "no module is a block: a layer's last part is its second norm"),
    ),
    **dict.fromkeys(
        ("deepseek_v4", "glm5_next", "glm5_next_text", "hy_v4"),
        Blocks((), "several streams of each token (hyper-connections)", axes="b t h d"),
    ),
    **dict.fromkeys(
        ("grounding-dino", "mm-grounding-dino"),
        Blocks((), "reads the text beside an image and queries", masks={"encoder.layers": "", "decoder.layers": ""}),
    ),
    **dict.fromkeys(
        ("seamless_m4t", "seamless_m4t_v2"),
        Blocks((), "one mask for whichever is given, speech or text", masks={"speech_encoder": "attention_mask"}),
    ),
    "clvp": Blocks((), "sounds beside the text", masks={"conditioning_encoder.mel_attn_blocks": ""}),
    "lxmert": Blocks((), "regions of an image beside the text", masks={"r_layers": "visual_attention_mask"}),
    "idefics2_perceiver": Blocks((), "its mask is that of what its queries look at", masks={"layers": ""}),
    "udop": Blocks(("encoder.block", "decoder.block"), "position biases lie in a list as blocks do"),
    "mask2former": Blocks(
        ("pixel_level_module.decoder.encoder.layers", "transformer_module.decoder.layers"),
        "the decoder has one layer less than the configuration states",
    ),
    "d_fine": Blocks(("decoder.layers",), "convolutions and parts for training lie in lists as blocks do"),
    "deimv2": Blocks(("decoder.layers",), "convolutions and parts for training lie in lists as blocks do"),
}


@checked
def register_blocks(model_type: str, *paths: Any, why: str = "", masks: Mapping[str, str] | None = None) -> None:
    """State where the blocks of a model type are, for a model whose structure does not show it.

    Args:
        model_type: as in `model.config.model_type`; the class name for models without a configuration.
        paths: the dotted path of each list of blocks, e.g. `"encoder.layers"`.
        why: why the structure misleads, for readers of the table.
        masks: {path: argument} of parts that read something else than the text, with the argument of the model that
            masks them, "" if none does. For the path "", the argument that is 1 where tokens of the model are real, if
            that is not `attention_mask`.

    Raises:
        InterventionError: a path that is no text.

    >>> register_blocks("MyNet", "body", why="its stem is a list as well")
    >>> EXCEPTIONS.pop("MyNet").paths
    ('body',)
    """
    wrong = [path for path in paths if not isinstance(path, str)]
    if wrong:
        raise InterventionError(
            f"register_blocks({model_type!r}, {shown(wrong[0])}): a path must be a text; write "
            f"register_blocks({model_type!r}, 'encoder.layers')."
        )
    EXCEPTIONS[model_type] = Blocks(paths, why, masks=dict(masks or {}))


def exception_for(model: nn.Module) -> Blocks | None:
    """Return the entry for the type of `model`, or of a model that it wraps; None if there is none."""
    for inner in unwrapped(model):
        kind = getattr(getattr(inner, "config", None), "model_type", None)
        entry = EXCEPTIONS.get(kind or type(inner).__name__)
        if entry is not None:
            return entry
    return None
