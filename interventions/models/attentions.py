"""Find the attention of a block, how it is computed, and its output projection: by structure and code."""

import dis
import re
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import Any, cast

from torch import nn

from interventions.models.layers import (
    Missing,
    ancestor,
    count,
    is_inside,
    is_linear,
    is_norm,
    is_scale,
    linears,
    width_in,
)

_HEADS = (
    "num_heads",
    "num_attention_heads",
    "n_heads",
    "n_head",
    "num_head",
    "heads",
    "nhead",
    "num_attn_heads",
    "encoder_attention_heads",
    "conf_num_attention_heads",
)
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads", "n_kv_heads")
_HEAD_DIM = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size", "dim_head", "d_head", "dim_per_head")
_OUT = re.compile(
    r"w?o|dense|proj|projection|output|final_linear|transform|.*out.*|(c|o)_proj|o_lin|.*_o|lin_o|post(_proj)?", re.I
)
_IN = re.compile(
    r"w?(q|k|v|qkv)|.*(query|key|value|qkv|q_|k_|v_|_q|_k|_v|c_attn|in_proj|pos(?!t)|gate|rel|bias|dt).*", re.I
)
_STATES = (  # the parts of an attention that make its queries, keys and values
    re.compile(r"(w?q|query)(_?(proj|lin|layer|head))?|qkv.*|query_?key.*|c_attn", re.I),
    re.compile(r"(w?k|key)(_?(proj|lin|layer|head))?|qkv.*|query_?key.*|c_attn", re.I),
    re.compile(r"(w?v|value)(_?(proj|lin|layer|head))?|qkv.*|query_?key_?value.*|c_attn", re.I),
)
CROSS = re.compile(r"cross|enc_?dec|encoder_attn|src_attn|multi_?head_attention_2", re.I)


@dataclass(frozen=True, eq=False)
class Attention:
    """The attention of a block.

    Attributes:
        module: the module that computes it.
        path: the path of the module inside the block.
        kind: how it is computed: "interface" (by the attention functions of transformers), "sdpa" (by a call of
            scaled_dot_product_attention), "torch" (by torch's multi-head attention, the output projection included) or
            "own" (by products and a softmax written out, or otherwise).
        projection: the output projection; None if it is no module.
    """

    module: nn.Module
    path: str
    kind: str
    projection: nn.Module | None

    @property
    def heads(self) -> int | None:
        """The number of query heads; None where the module states none."""
        return heads_of(self.module)

    @property
    def key_heads(self) -> int | None:
        """The number of key and value heads; None where the module states none."""
        groups = getattr(self.module, "num_key_value_groups", None)
        if isinstance(groups, int) and groups and self.heads:
            return self.heads // groups
        return count(self.module, _KEY_HEADS) or self.heads

    @property
    def head_dim(self) -> int | None:
        """The width of a head, as the module states it or the projection implies."""
        width = width_in(self.projection) if self.projection is not None else None
        return width // self.heads if width and self.heads else count(self.module, _HEAD_DIM)

    @property
    def match_dim(self) -> int | None:
        """The width of queries and keys, which may differ from that of the values."""
        return count(self.module, ("qk_head_dim",)) or self.head_dim


def attention_of(block: nn.Module) -> Attention:
    """Return the self-attention of a block: the first module that computes attention and is no cross-attention.

    Raises:
        Missing: it has none.
    """
    found = _attentions(block)
    if not found:
        mixers = [type(child).__name__ for name, child in block.named_children() if not is_norm(child)]
        raise Missing(f"no attention was found in {type(block).__name__} ({', '.join(mixers) or 'no parts'})")
    path, module = next((each for each in found if not CROSS.search(each[0])), found[0])
    return Attention(module, path, kind_of(module) or "own", _projection(block, path))


def attention_at(module: nn.Module) -> Attention:
    """Return `module` as an attention.

    Raises:
        Missing: its code computes no attention.
    """
    kind = kind_of(module)
    if kind is None:
        inside = [path for path, _ in _attentions(module) if path]
        elsewhere = f"; its part {inside[0]!r} does" if inside else ""
        raise Missing(f"{type(module).__name__} computes no attention itself{elsewhere}")
    return Attention(module, "", kind, _projection(module, ""))


def kind_of(module: nn.Module) -> str | None:
    """Return how a module computes attention, as `Attention.kind`; None if it computes none itself."""
    if isinstance(module, nn.MultiheadAttention):
        return "torch"
    return _kind(cast(Hashable, type(module))) or ("own" if _has_parts(module) else None)


@cache
def _kind(cls: Any) -> str | None:
    """Return how the methods of a class compute attention, by the names in their code."""
    names = set(_names_in(cls))
    if "get_interface" in names:
        return "interface"
    if "scaled_dot_product_attention" in names:
        return "sdpa"
    if "multi_head_attention_forward" in names:
        return "torch"
    if "eager_attention_forward" in names:
        return "own"
    attends = re.search("att", cls.__name__, re.I) and names & {"softmax", "Softmax", "stable_softmax"}
    return "own" if attends and names & {"matmul", "bmm", "einsum", "baddbmm"} | _uses_at(cls) else None


def _has_parts(module: nn.Module) -> bool:
    """Return whether a module has the parts of an attention, but no softmax over keys: hashed, deformable."""
    if not re.search("att", type(module).__name__, re.I) or count(module, _HEADS) is None:
        return False
    children = dict(module.named_children())
    if all(any(map(pattern.fullmatch, children)) for pattern in _STATES):
        return True
    counted = any(isinstance(getattr(module, name, None), int) for name in _HEADS)
    return counted and any(is_linear(child) and _is_out(name) for name, child in children.items())


def _uses_at(cls: type) -> set[str]:
    return {"matmul"} if any(_has_at(code) for code in _codes(cls)) else set()


def _has_at(code: CodeType) -> bool:
    return any(step.opname == "BINARY_OP" and step.argrepr in ("@", "@=") for step in dis.get_instructions(code))


def _names_in(cls: type) -> Iterator[str]:
    for code in _codes(cls):
        yield from code.co_names


def _codes(cls: type) -> Iterator[CodeType]:
    """Yield the code of the methods of a class, without those of torch itself, and of the functions nested in it."""
    for base in cls.__mro__:
        if base.__module__.startswith("torch.") or base is object:
            continue
        for value in vars(base).values():
            while hasattr(value, "__wrapped__"):
                value = value.__wrapped__
            code = getattr(value, "__code__", None)
            if isinstance(code, CodeType):
                yield from _nested(code)


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def has_attention(module: nn.Module) -> bool:
    """Return whether a module or a part of it computes attention."""
    return any(kind_of(part) for part in module.modules())


def only_attends(module: nn.Module) -> bool:
    """Return whether a module is only an attention: the other weights in it are those of norms or scales."""
    areas = attention_areas(module)
    holders = (
        (path, part) for path, part in module.named_modules() if any(True for _ in part.parameters(recurse=False))
    )
    return bool(areas) and all(is_inside(path, areas) or is_norm(part) or is_scale(part) for path, part in holders)


def heads_of(module: nn.Module) -> int | None:
    """Return how many query heads an attention module states; None if it states none."""
    return count(module, _HEADS)


def stated_heads(modules: Iterable[nn.Module]) -> tuple[object, ...]:
    """Return all numbers of heads that modules state themselves, whatever they mean: others show a change."""
    return tuple(vars(module).get(name) for module in modules for name in (*_HEADS, *_KEY_HEADS))


def _attentions(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the innermost modules of a block that compute attention, in order, with their paths."""
    found = [(path, module) for path, module in block.named_modules() if kind_of(module)]
    # A wrapper is left out where a module inside it computes the attention.
    return [
        (path, module)
        for path, module in found
        if not any(other != path and is_inside(other, [path]) for other, _ in found)
    ]


def _projection(block: nn.Module, path: str) -> nn.Module | None:
    """Return the output projection of the attention at `path`: a part of it, or a module after it around it."""
    own = block.get_submodule(path)
    if isinstance(own, nn.MultiheadAttention):
        return None
    last = [(name, module) for name, module in linears(own) if name and _is_out(name)]
    if last:
        return last[-1][1]
    while path:
        path, _, name = path.rpartition(".")
        children = list(block.get_submodule(path).named_children())
        later = children[[child for child, _ in children].index(name) + 1 :]
        for child_name, child in later:
            for inner, module in linears(child, child_name):
                if _is_out(inner):
                    return module
        if path == "":
            break
    return None


def _is_out(path: str) -> bool:
    """Return whether a path is named as an output projection."""
    parts = [part for part in path.split(".") if not part.isdigit() and part != "base_layer"]
    name = parts[-2] if parts[-1] == "linear" and len(parts) > 1 else parts[-1]
    return bool(_OUT.fullmatch(name)) and not _IN.fullmatch(name)


def attention_areas(block: nn.Module) -> list[str]:
    """Return the paths below which a block has its attentions and their projections."""
    paths = {module: path for path, module in block.named_modules()}
    areas = []
    for path, _ in _attentions(block):
        projection = _projection(block, path)
        areas.append(path)
        if projection is not None:
            common = ancestor([path, paths[projection]], leaf=True)
            areas.append(common or paths[projection])
    return areas
