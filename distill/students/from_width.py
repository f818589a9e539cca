"""A narrower student from some of a teacher's units.

The student has some dimensions of the residual stream, some heads of every attention, and some units of every
feed-forward part, with the teacher's weights: each weight matrix W of the teacher becomes W[rows, columns], the first
ones or the most important.
"""

import copy
from math import gcd
from typing import Any

import torch
from torch import nn

from distill.errors import DistillError, checked
from distill.models.inputs import is_placed, refuse_valueless, uncompiled
from distill.students.kept_units import KeptUnits, Sizes
from distill.students.ranking import Importance
from interventions import architecture

_HEADS = ("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads", "num_heads")
_KEY_HEADS = ("num_key_value_heads",)
_UNITS = ("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "d_ff", "ffn_dim", "hidden_dim")
_STREAM = ("hidden_size", "word_embed_proj_dim", "embedding_size", "pooler_output_size")
_HEAD_DIM = ("head_dim", "d_kv")
# Architectures whose slices the tests check against their teachers. In others the order of merged parts may differ, or
# what a head computes may depend on the number of heads, as with ALiBi.
KNOWN = frozenset(
    """bart bert camembert deit distilbert electra gpt2 gpt_neox granite llama marian mbart
    ministral mistral modernbert mpnet mt5 opt pegasus phi3 qwen2 qwen3 roberta smollm3 starcoder2 t5 umt5 vit
    xlm-roberta""".split()
)


def plain(model: Any, caller: str) -> Any:
    """Return the model without `torch.compile`, after a check that its weights can be copied part by part.

    Raises:
        DistillError: adapters hold a part of the weights, they are quantized, split over processes or elsewhere, or a
            part was compiled as a module.
    """
    model = uncompiled(model)
    if is_placed(model):
        refuse_valueless(model, caller)
    if (over := architecture(model).split_over) > 1:
        raise DistillError(
            f"{caller} copies the weights of a model, and those of this {type(model).__name__} are split over {over} "
            "processes (tensor-parallel); load it whole: from_pretrained(name), without tp_plan."
        )
    compiled = next((path for path, module in model.named_modules() if "_orig_mod" in module._modules), None)
    if compiled is not None:
        raise DistillError(
            f"{caller} copies the weights of a model, and {compiled} of this {type(model).__name__} went through "
            f"torch.compile(module), which gives them other names; put each original back: model.set_submodule("
            f"{compiled!r}, model.get_submodule({compiled!r})._orig_mod), or compile in place: module.compile()."
        )
    kinds = {type(module).__module__.split(".")[0] for module in model.modules()}
    if hasattr(model, "peft_config") or "peft" in kinds:
        raise DistillError(
            f"{caller} copies the weights of a model, and adapters hold a part of the weights of this "
            f"{type(model).__name__}; merge them first: {caller}(model.merge_and_unload(), …)."
        )
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    odd = next((each for each in model.modules() if _is_quantized(each)), None)
    if getattr(model, "is_quantized", False) or settings or odd is not None:
        name = type(odd if odd is not None else model).__name__
        raise DistillError(
            f"{caller} copies the weights of a model part by part, and those of this {type(model).__name__} are "
            f"quantized ({name}); take them from the model as it was: {caller}(…from_pretrained(name), …)."
        )
    return model


def _is_quantized(module: nn.Module) -> bool:
    kinds = (type(module), *(type(parameter) for parameter in module.parameters(recurse=False)))
    words = ("quantized", "bitsandbytes", "torchao", "quanto", "gptq", "awq")
    return any(word in part for kind in kinds for part in kind.__module__.split(".") for word in words)


@checked
def from_width(
    teacher: nn.Module,
    width: int | None = None,
    *,
    heads: int | None = None,
    intermediate: int | None = None,
    by: Importance | None = None,
) -> nn.Module:
    """Return a student as deep as the teacher but narrower, with the leading or best part of its weights.

    It keeps the first `width` dimensions of the residual stream; the first heads of every attention, each whole, and
    the same share of the key and value heads; and the first units of every feed-forward part; with `by` the most
    important ones of each instead, in the teacher's order. Embeddings, positions and the head of the model keep the
    columns of the dimensions of the stream that remain.

    By importance the dims are the same everywhere, heads and units those of each layer. Heads that share key and value
    heads are kept or left out together, by the sum of their importance. Where all layers of a stack add one bias of
    positions to each head (T5, MPNet), they keep the same heads, by the mean over the layers.

    Args:
        teacher: a transformers model of one of the types in `distill.students.from_width.KNOWN`.
        width: the width of the residual stream. Heads and feed-forward units shrink in the same ratio unless they are
            given; the width of a head stays.
        heads: the number of query heads of each layer. Without a width only for models whose configuration states the
            width of a head (T5, Llama): in others it would change.
        intermediate: the number of feed-forward units of each layer.
        by: the result of `importance(teacher, data)`; None keeps the first units.

    Returns:
        A model of the same class, in the mode of the teacher, on its device; nothing is shared with the teacher. For
        fewer layers too: `from_layers(from_width(teacher, 384), 6)`.

    Raises:
        DistillError: a model without a transformers configuration or of another type, or sizes that do not fit,
            or the importance of another model.

    Muralidharan et al. 2024 (Minitron, arXiv:2407.14679), section 2.
    """
    teacher = plain(teacher, "from_width")
    _check_known(teacher)
    config = _narrow_config(teacher, width, heads, intermediate)
    parameter = next(teacher.parameters())
    with torch.random.fork_rng(devices=[]):
        student = type(teacher)(config).to(parameter.device, parameter.dtype)
    weights = teacher.state_dict()
    kept = KeptUnits(teacher, _sizes(teacher.config), _sizes(config), by)
    with torch.no_grad():
        for name, target in student.state_dict().items():
            target.copy_(kept.part(name, weights[name], target.shape))
    if getattr(teacher, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.train(teacher.training)


def _check_known(teacher: nn.Module) -> None:
    """Raise DistillError for a model whose weights cannot be cut: without a configuration, or of another type."""
    old, name = getattr(teacher, "config", None), type(teacher).__name__
    kind = getattr(old, "model_type", None)
    if old is None or not hasattr(teacher, "save_pretrained"):
        raise DistillError(
            f"{name} has no transformers configuration to build a narrower model from; build the student yourself and "
            "pass it to distill.fit(teacher, student, ...)."
        )
    if kind not in KNOWN:
        raise DistillError(
            f"how the weights of a {kind!r} model are divided into heads and units was not checked (known: "
            f"{', '.join(sorted(KNOWN))}); build the student yourself: {name}(config) with a smaller configuration."
        )


def _narrow_config(teacher: Any, width: int | None, heads: int | None, intermediate: int | None) -> Any:
    """Return the configuration of the student."""
    old: Any = teacher.config
    kind = old.model_type
    if width is None and heads is None and intermediate is None:
        raise DistillError(
            f"from_width needs a size to reduce; e.g. from_width(teacher, {old.hidden_size // 2}), or intermediate=…."
        )
    config, dim = copy.deepcopy(old), _head_dim(old)
    wide, many = old.hidden_size, old.num_attention_heads
    width = wide if width is None else width
    _refuse_larger(kind, "width", width, wide)
    if width < wide and getattr(old, "scale_embedding", False):
        raise DistillError(
            f"this {kind!r} model multiplies its embeddings by √{wide}, and one of width {width} would by √{width}; "
            "keep the width and cut its units: from_width(teacher, intermediate=…), or layers: from_layers(teacher, 6)."
        )
    if heads is None:
        heads = _whole(many * width, wide, f"width={width} leaves no whole number of the {many} heads", _fits(old))
    _refuse_larger(kind, "heads", heads, many)
    stated = any(isinstance(getattr(old, each, None), int) for each in _HEAD_DIM)
    if not stated and heads * dim != width:
        raise DistillError(
            f"heads={heads} with width={width} would give heads of width {width / heads:g} and those of this {kind!r} "
            f"model have {dim}: its configuration states no width of a head; cut the width too: "
            f"from_width(teacher, {heads * dim})."
        )
    for each in _HEADS:
        if isinstance(found := getattr(old, each, None), int):
            if found != many:
                raise DistillError(
                    f"this {kind!r} model has {many} heads in one stack and {found} in the other; build the student "
                    "yourself."
                )
            setattr(config, each, heads)
    for each in _KEY_HEADS:
        if isinstance(found := getattr(old, each, None), int):
            problem = f"{heads} of {many} heads leave no whole number of the {found} key and value heads"
            setattr(config, each, _whole(found * heads, many, problem, _fits(old)))
    for each in _STREAM:
        if getattr(old, each, None) == wide:
            setattr(config, each, width)
    for each in _UNITS:
        if isinstance(found := getattr(old, each, None), int):
            _refuse_larger(kind, "intermediate", found if intermediate is None else intermediate, found)
            problem = f"width={width} leaves no whole number of the {found} feed-forward units"
            way_out = f"give their number, e.g. intermediate={found * width // wide}"
            setattr(config, each, intermediate or _whole(found * width, wide, problem, way_out))
    if getattr(old, "n_inner", 0) is None and intermediate is not None:  # GPT-2's 4 · width
        _refuse_larger(kind, "intermediate", intermediate, 4 * wide)
        config.n_inner = intermediate
    return config


def _refuse_larger(kind: str, what: str, size: int, of: int) -> None:
    if not 1 <= size <= of:
        raise DistillError(f"{what}={size} cannot be taken from this {kind!r} model, which has {of}; choose 1 to {of}.")


def _whole(count: int, by: int, problem: str, way_out: str) -> int:
    if count % by or not count:
        raise DistillError(f"{problem}; {way_out}.")
    return count // by


def _fits(config: Any) -> str:
    """Return a hint at the widths that leave whole heads, and whole key and value heads."""
    many = config.num_attention_heads
    group = many // gcd(many, getattr(config, "num_key_value_heads", None) or many)
    return f"use a multiple of {group * config.hidden_size // many}"


def _head_dim(config: Any) -> int:
    stated = (getattr(config, name, None) for name in _HEAD_DIM)
    return next((dim for dim in stated if isinstance(dim, int)), config.hidden_size // config.num_attention_heads)


def _sizes(config: Any) -> Sizes:
    heads, found = config.num_attention_heads, (getattr(config, name, None) for name in _UNITS)
    return Sizes(
        width=config.hidden_size,
        heads=heads,
        key_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=_head_dim(config),
        neurons=next((each for each in found if isinstance(each, int)), 4 * config.hidden_size),
    )
