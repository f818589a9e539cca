"""Locations: names of places in a model, without reference to a particular one."""

import difflib
import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from operator import index
from typing import Any
from urllib.parse import quote, unquote

from torch import Tensor

from interventions.arguments import Hashed, checked, is_whole, listed
from interventions.errors import InterventionError
from interventions.names import shown
from interventions.renames import renamed

HEAD_SITES = ("query", "key", "value", "attention_scores", "attention_pattern", "attention_heads")
BLOCK_SITES = (
    "block_input",
    "attention_input",
    *HEAD_SITES,
    "attention_output",
    "mlp_input",
    "mlp_activation",
    "mlp_output",
    "block_output",
)
MODEL_SITES = ("embedding", "final_norm", "logits")
SITES = (MODEL_SITES[0], *BLOCK_SITES, *MODEL_SITES[1:])
STATES = ("hidden_state", "cell_state")
SIDES = ("output", "input")
IOS = (*SIDES, *STATES, *HEAD_SITES)

_UNITS = r"\[(?P<module_units>(?:heads|dims)=[^\[\]]*)\]"
_TEXT = re.compile(
    r"(?:(?P<stack>[^/:\[\]]+)/)?(?P<site>[a-z_]+)(?:\.(?P<layer>-?\d+))?"
    rf"(?:#(?P<operation>[\w.]+)(?:@(?P<side>{'|'.join(SIDES)}))?)?(?:\[(?P<units>[^\[\]]*)\])?"
    rf"|module:(?P<module>.+?)(?:#(?P<module_operation>[\w.]+))?(?:@(?P<io>{'|'.join(IOS)}))?(?:{_UNITS})?"
)

_MANY = {"heads": 12, "dims": 64}

Dims = range | tuple[int, ...]


@renamed(source="operation")
@dataclass(frozen=True)
class Location(Hashed):
    """A place in a model, and which part of the activation there: a site of a block, or any module by its path.

    A location refers to no particular model; `describe(model)` lists the places of one.

    Args:
        layer: number of the block, from 0; −1 is the last. In models of stages (Swin, ConvNeXt, ResNet of transformers)
            blocks are counted across the stages. None for `embedding`, `final_norm`, `logits` and with `module=`.
        site: one of `interventions.SITES`; `[batch, position, dim]` unless another shape is stated:

            - `block_input`, `block_output`: what block `layer` receives and returns. Of several tensors it is the
              first, so not the whole state where a block passes on two streams, as in Reformer and mamba_ssm.
            - `attention_input`: what its (self-)attention receives, for query, key and value alike where all three are
              computed from one tensor.
            - `attention_output`: what the output projection of the attention returns, before dropout, normalisation
              and the residual sum.
            - `query`, `key`, `value`: `[batch, position, head, head_dim]` as they enter the attention, so after rotary
              embedding and normalisation; fewer heads in key and value with grouped-query attention.
            - `attention_scores`, `attention_pattern`: `[batch, head, query, key]` before and after the softmax, with
              the mask applied: masked scores are the lowest number of the dtype, and stay so whatever is written.
            - `attention_heads`: the output of each head before the output projection,
              `[batch, position, head, head_dim]`.
            - `mlp_input`, `mlp_activation`, `mlp_output`: what the feed-forward part receives, what its last projection
              receives, and what that returns, before dropout, normalisation and the residual sum.
            - `embedding`: what the first block receives, `hidden_states[0]` of transformers; `logits`: the answer of
              the model; `final_norm`: the output of the normalisation that runs after the last block, wherever it is
              registered, refused if there is none or another module with weights runs before it.
        heads: which heads, at the sites that have heads: an int, a range, a slice or a list.
        dims: which entries of the last axis (the channel axis of feature maps; of each head at sites with heads): an
            int, a range, a slice or a list, in this order. None is all of them.
        subspace: which directions of those entries: a module of `interventions.subspaces`. It is compared by identity
            and has no text form.
        stack: which list of blocks, in a model with several, e.g. `"encoder"`. An encoder–decoder model without it
            means the decoder.
        module: the dotted path of any submodule, e.g. `"layer2.0.conv1"`, instead of `layer` and `site`.
        io: with `module`, its `"output"` or its first `"input"`. A recurrent module also has its final `"hidden_state"`
            and `"cell_state"`, where position i is layer · direction i; an attention module also has the sites with
            heads, e.g. `"attention_pattern"` of a cross-attention.
        operation: a call or assignment inside the `forward` of block `layer` or of `module`, in a model of nnsight: its
            name and number, e.g. `"torch_relu_0"`, as `describe(NNsight(model))` lists them. `io` is then its output or
            its first `"input"`. A dotted path leads into a part of the block or module, and from a call into the
            function that it calls: `"attn.attention_interface_1.attn_output_transpose_0"`. Without layer and module it
            is in the forward of the model itself. If its tensor has four axes inside an attention, the axis as long as
            the number of heads is that of the heads; with as many tokens as heads, it is the first of the two.

    Raises:
        InterventionError: fields that exclude each other, an unknown site, or dims that repeat or are negative.

    >>> str(Location(3, dims=range(0, 64)))
    'block_output.3[dims=0:64]'
    >>> Location.parse("attention_heads.3[heads=2,5]")
    Location(3, 'attention_heads', heads=(2, 5))
    >>> Location.parse("module:conv2@input")
    Location(module='conv2', io='input')
    >>> str(Location(3, operation="attn.split_0"))
    'block_output.3#attn.split_0'
    """

    layer: int | None = None
    site: str = "block_output"
    heads: Dims | None = None
    dims: Dims | None = None
    subspace: Any = None
    stack: str | None = None
    module: str | None = None
    io: str = "output"
    operation: str | None = None

    def __init__(
        self,
        layer: int | None = None,
        site: str = "block_output",
        *,
        heads: Iterable[int] | Tensor | slice | int | None = None,
        dims: Iterable[int] | Tensor | slice | int | None = None,
        subspace: Any = None,
        stack: str | None = None,
        module: str | None = None,
        io: str = "output",
        operation: str | None = None,
    ) -> None:
        vars(self).update(
            layer=None if layer is None else _parse_layer(layer),
            site=site,
            heads=None if heads is None else _parse_numbers(heads, "heads"),
            dims=None if dims is None else _parse_numbers(dims, "dims"),
            subspace=subspace,
            stack=stack,
            module=module,
            io=io,
            operation=operation,
        )
        _check_module(self) if module is not None else _check_site(self)
        _check_operation(self)
        _check_parts(self)

    __hash__ = Hashed.__hash__

    @property
    def whole(self) -> "Location":
        """The same place with all of its heads and dims, and without a subspace."""
        if self.heads is None and self.dims is None and self.subspace is None:
            return self
        return replace(self, heads=None, dims=None, subspace=None)

    @property
    def has_heads(self) -> bool:
        """True where the activation is divided into heads; true for every operation, as only its run shows it."""
        return self.operation is not None or (self.site if self.module is None else self.io) in HEAD_SITES

    def __str__(self) -> str:
        parts = {name: getattr(self, name) for name in ("heads", "dims")}
        chosen = [f"{name}={_format_numbers(part)}" for name, part in parts.items() if part is not None]
        units = f"[{';'.join(chosen)}]" if chosen else ""
        units += f"({type(self.subspace).__name__})" if self.subspace is not None else ""
        operation = "" if self.operation is None else f"#{self.operation}"
        if self.module is not None:
            explicit = self.io != "output" or re.search(rf"@({'|'.join(IOS)})$|\]$", self.module)
            return f"module:{_quote(self.module)}{operation}{'@' + self.io if explicit else ''}{units}"
        stack = "" if self.stack is None else f"{_quote(self.stack, '/:[]@')}/"
        side = f"@{self.io}" if self.io != "output" else ""
        if _in_model(self):
            return f"model{operation}{side}{units}"
        return f"{stack}{self.site}{'' if self.layer is None else f'.{self.layer}'}{operation}{side}{units}"

    def __repr__(self) -> str:
        if self.module is not None:
            parts = [f"module={self.module!r}"]
        else:
            parts = [] if self.layer is None else [str(self.layer)]
            if self.site != "block_output":
                parts.append(repr(self.site) if parts else f"site={self.site!r}")
        parts += [] if self.operation is None else [f"operation={self.operation!r}"]
        parts += [f"io={self.io!r}"] if self.io != "output" else []
        for name in ("heads", "dims"):
            chosen = getattr(self, name)
            parts += [] if chosen is None else [f"{name}={chosen[0] if len(chosen) == 1 else chosen!r}"]
        parts += [] if self.subspace is None else [f"subspace={self.subspace!r}"]
        parts += [] if self.stack is None else [f"stack={self.stack!r}"]
        return f"Location({', '.join(parts)})"

    @classmethod
    @checked
    def parse(cls, text: str) -> "Location":
        """Return the location whose `str` is `text`.

        Raises:
            InterventionError: `text` is not of that form.

        >>> Location.parse("encoder/query.3[heads=1;dims=0,5,6]")
        Location(3, 'query', heads=1, dims=(0, 5, 6), stack='encoder')
        """
        match = _TEXT.fullmatch(text.strip())
        if match is None:
            raise InterventionError(
                f"{text!r} is not a location: write block_output.3, block_output.3[dims=0:64], "
                "attention_heads.3[heads=2,5], embedding, encoder/block_input.0 or module:conv2@input."
            )
        units = _parse_units(match["units"] or match["module_units"], text)
        if match["module"]:
            return cls(
                module=unquote(match["module"]),
                io=match["io"] or "output",
                operation=match["module_operation"],
                **units,
            )
        layer = None if match["layer"] is None else int(match["layer"])
        side, operation = match["side"] or "output", match["operation"]
        if match["site"] == "model" and operation is not None:
            return cls(io=side, operation=operation, **units)
        stack = None if match["stack"] is None else unquote(match["stack"])
        return cls(layer, match["site"], stack=stack, io=side, operation=operation, **units)


def _quote(path: str, more: str = "") -> str:
    """Return a path with the characters that `parse` would misread (#, %, control, outer spaces) written as in URLs."""
    return re.sub(
        rf"[%#\x00-\x1f\x7f-\x9f\u2028\u2029{re.escape(more)}]|^\s+|\s+$", lambda found: quote(found[0], safe=""), path
    )


def as_location(place: Location | str) -> Location:
    """Return `place` itself, or the location that a text names.

    Raises:
        InterventionError: `place` is something else, or a text that names no location.

    >>> as_location("block_output.3")
    Location(3)
    """
    if isinstance(place, Location):
        return place
    if isinstance(place, str):
        return Location.parse(place)
    raise InterventionError(
        f"a location is needed, and {type(place).__name__} {shown(place)} was given; write Location(3) or "
        "'block_output.3', and [Location(i) for i in range(3)] for several."
    )


def _check_site(location: Location) -> None:
    if location.stack is not None and (not isinstance(location.stack, str) or not location.stack):
        raise InterventionError(f"stack={shown(location.stack)} is no name of a stack; write e.g. stack='encoder'.")
    if not isinstance(location.site, str) or location.site not in SITES:
        near = difflib.get_close_matches(str(location.site), SITES, n=1, cutoff=0.0)[0]
        raise InterventionError(
            f"site {location.site!r} does not exist: the sites are {', '.join(SITES)}; did you mean {near!r}? "
            "Any other place goes by path: Location(module='…')."
        )
    if location.io != "output" and location.operation is None:
        site = location.io if location.io in HEAD_SITES else f"block_{location.io}"
        raise InterventionError(f"io={location.io!r} goes with module=; for a block use site={site!r}.")
    if location.site in MODEL_SITES and location.layer is not None:
        raise InterventionError(
            f"site {location.site!r} has no layer, and layer={location.layer} was given; "
            f"write Location(site={location.site!r})."
        )
    if location.site == "logits" and location.stack is not None:
        raise InterventionError(
            f"logits are the answer of the whole model, and stack={location.stack!r} was given; write "
            "Location(site='logits')."
        )
    if location.site in BLOCK_SITES and location.layer is None and not _in_model(location):
        example = "Location(3)" if location.site == "block_output" else f"Location(3, {location.site!r})"
        raise InterventionError(
            f"Location(site={location.site!r}) names no layer; write {example} for that of block 3, "
            "or Location(module='path.of.a.module')."
        )


def _check_module(location: Location) -> None:
    if not isinstance(location.module, str) or not location.module:
        raise InterventionError(f"module={location.module!r} is not a module path; see model.named_modules().")
    if location.layer is not None or location.stack is not None or location.site != "block_output":
        raise InterventionError(
            f"module={location.module!r} names the whole path and goes without layer, site and stack; "
            f"write Location(module={location.module!r}) or Location({location.layer or 0})."
        )
    if location.io not in IOS:
        near = difflib.get_close_matches(str(location.io), IOS, n=1, cutoff=0.0)[0]
        raise InterventionError(
            f"io={location.io!r} does not exist: a module has {', '.join(IOS)}; did you mean io={near!r}?"
        )


def _check_operation(location: Location) -> None:
    if location.operation is None:
        return
    if not isinstance(location.operation, str) or not all(part.isidentifier() or part.isdigit() for part in
                                                       location.operation.split(".")):  # fmt: skip
        raise InterventionError(
            f"operation={location.operation!r} is no name of an operation; write e.g. operation='torch_relu_0' or "
            "operation='attn.attention_interface_1', as describe(NNsight(model)) lists them. (The source of an "
            "operator is no part of a location: intervene(model, Location(3), source=inputs).)"
        )
    if location.io not in SIDES:
        raise InterventionError(f"io={location.io!r} is no side of an operation; write io='output' or io='input'.")
    if location.module is None and location.site != "block_output":
        raise InterventionError(
            f"operation={location.operation!r} with site={location.site!r}: an operation lies in the forward of a "
            f"block or of a module; write Location(3, operation={location.operation!r}) or Location(module='…', "
            "operation=…)."
        )


def _in_model(location: Location) -> bool:
    """Return whether a location is an operation in the forward of the model itself."""
    return location.operation is not None and location.layer is None and location.module is None


def _check_parts(location: Location) -> None:
    if location.heads is not None and not location.has_heads:
        where = f"site {location.site!r}" if location.module is None else f"io={location.io!r}"
        raise InterventionError(
            f"heads={_format_numbers(location.heads)} was given and {where} has no heads; the sites with heads are "
            f"{', '.join(HEAD_SITES)}."
        )
    if location.subspace is not None and not (
        hasattr(location.subspace, "coordinates") and hasattr(location.subspace, "replace")
    ):
        raise InterventionError(
            f"subspace={location.subspace!r} has no coordinates(x) and replace(x, coordinates); use one of "
            "interventions.subspaces, e.g. Rotation(16)."
        )


def _parse_layer(layer: int) -> int:
    layer = layer.item() if isinstance(layer, Tensor) and layer.numel() == 1 else layer
    if not is_whole(layer):
        raise InterventionError(
            f"layer={shown(layer)} is not a whole number; write Location(3), or Location(-1) for the last."
        )
    return index(layer)


def _parse_numbers(given: Iterable[int] | Tensor | slice | int, name: str) -> Dims:
    """Return numbers as a range if they rise in even steps, else as a tuple."""
    try:
        if isinstance(given, slice):
            if given.stop is None:
                raise InterventionError(
                    f"{name}={given!r} has no end; a location knows no model: write {name}=range(0, {_MANY[name]})."
                )
            given = range(given.start or 0, given.stop, 1 if given.step is None else given.step)
        given = listed(given) if isinstance(given, Tensor) else given
        entries = tuple(given if isinstance(given, Iterable) else (given,))
        if isinstance(given, Set | Mapping) or not all(map(is_whole, entries)):
            raise TypeError("a set has no order, and True and False would be taken for 1 and 0")
        numbers = tuple(map(index, entries))
    except (TypeError, ValueError) as error:
        if isinstance(error, InterventionError):
            raise
        raise InterventionError(
            f"{name}={shown(given)} are not whole numbers; write {name}=range(0, {_MANY[name]}) or {name}=[1, 5]."
        ) from error
    if not numbers:
        raise InterventionError(f"{name}={given!r} selects nothing; leave {name} out for all of them.")
    if min(numbers) < 0:
        raise InterventionError(
            f"{name}={given!r} holds {min(numbers)}: {name} count from 0, as a location knows no model."
        )
    if len(set(numbers)) < len(numbers):
        raise InterventionError(f"{name}={given!r} names an entry twice; name each once.")
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    even = range(numbers[0], numbers[-1] + 1, step) if step > 0 else range(0)
    return even if tuple(even) == numbers and (step == 1 or len(numbers) > 2) else numbers


def _format_numbers(chosen: Dims) -> str:
    if len(chosen) == 1:
        return str(chosen[0])
    if isinstance(chosen, range):
        return f"{chosen.start}:{chosen.stop}" + (f":{chosen.step}" if chosen.step != 1 else "")
    return ",".join(map(str, chosen))


def _parse_units(units: str | None, text: str) -> dict[str, Any]:
    parsed: dict[str, Any] = {}
    for unit in units.split(";") if units is not None else ():
        name, _, value = (part.strip() for part in unit.partition("="))
        try:
            if name not in ("heads", "dims") or name in parsed:
                raise ValueError
            numbers = [int(part) for part in re.split("[:,]", value)]
            parsed[name] = _parse_numbers(range(*numbers) if ":" in value else numbers, name)
        except (ValueError, TypeError) as error:
            if isinstance(error, InterventionError):
                raise
            raise InterventionError(
                f"[{unit}] in {text!r} is not a selection; write [dims=0:64], [dims=1,5] or [heads=2;dims=0:8]."
            ) from error
    return parsed
