"""Where in a model: a `Location` names a place and knows no model."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from operator import index

from interventions.errors import InterventionError

BLOCK_SITES = ("block_input", "block_output")
MODEL_SITES = ("embedding",)
SITES = (*MODEL_SITES, *BLOCK_SITES)

_TEXT = re.compile(
    r"(?:(?P<stack>[^/:\[\]]+)/)?(?P<site>[a-z_]+)(?:\.(?P<layer>-?\d+))?(?:\[(?P<units>[^\[\]]*)\])?"
    r"|module:(?P<module>.+?)(?:@(?P<io>input|output))?(?:\[(?P<module_units>dims=[^\[\]]*)\])?"
)

Dims = range | tuple[int, ...]


@dataclass(frozen=True)
class Location:
    """A place in a model: block `layer` and a site, or any module by its path.

    Args:
        layer: block number counted from 0; −1 is the last block. None for `embedding` and for `module=`.
        site: `block_output` and `block_input` (what block `layer` returns and is given), or `embedding` (what the first
            block is given: `hidden_states[0]` of transformers).
        dims: which entries of the last axis (of the channel axis for feature maps): a range, a slice, an int or a list.
            None is all of them. They are kept in the order given.
        stack: which list of blocks, where a model has more than one, e.g. `"encoder"`. Encoder–decoder models
            default to the decoder.
        module: the dotted path of any submodule, e.g. `"layer2.0.conv1"`, instead of `layer` and `site`.
        io: with `module`: its `"output"` or its first `"input"`.

    Raises:
        InterventionError: fields that do not go together, an unknown site, dims that repeat or are negative.

    >>> str(Location(3, dims=range(0, 64)))
    'block_output.3[dims=0:64]'
    >>> Location.parse("module:conv2@input")
    Location(module='conv2', io='input')
    """

    layer: int | None = None
    site: str = "block_output"
    dims: Dims | None = None
    stack: str | None = None
    module: str | None = None
    io: str = "output"

    def __init__(
        self,
        layer: int | None = None,
        site: str = "block_output",
        *,
        dims: Iterable[int] | slice | int | None = None,
        stack: str | None = None,
        module: str | None = None,
        io: str = "output",
    ) -> None:
        fields = {
            "layer": None if layer is None else _layer(layer),
            "site": site,
            "dims": None if dims is None else _dims(dims),
            "stack": stack,
            "module": module,
            "io": io,
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        _check_module(self) if module is not None else _check_site(self)

    def __str__(self) -> str:
        units = "" if self.dims is None else f"[dims={_dims_text(self.dims)}]"
        if self.module is not None:
            explicit = self.io == "input" or re.search(r"@(input|output)$|\]$", self.module)
            return f"module:{self.module}{'@' + self.io if explicit else ''}{units}"
        stack = "" if self.stack is None else f"{self.stack}/"
        return f"{stack}{self.site}{'' if self.layer is None else f'.{self.layer}'}{units}"

    def __repr__(self) -> str:
        if self.module is not None:
            parts = [f"module={self.module!r}"] + (["io='input'"] if self.io == "input" else [])
        else:
            parts = [] if self.layer is None else [str(self.layer)]
            if self.site != "block_output":
                parts.append(repr(self.site) if parts else f"site={self.site!r}")
        parts += [] if self.dims is None else [f"dims={self.dims!r}"]
        parts += [] if self.stack is None else [f"stack={self.stack!r}"]
        return f"Location({', '.join(parts)})"

    @classmethod
    def parse(cls, text: str) -> "Location":
        """The location that `str` wrote as `text`.

        >>> Location.parse("encoder/block_output.3[dims=0,5,6]")
        Location(3, dims=(0, 5, 6), stack='encoder')
        """
        match = _TEXT.fullmatch(text.strip())
        if match is None:
            raise InterventionError(
                f"{text!r} is not a location: write block_output.3, block_output.3[dims=0:64], embedding, "
                "encoder/block_input.0 or module:conv2@input."
            )
        dims = _parse_dims(match["units"] or match["module_units"], text)
        if match["module"]:
            return cls(module=match["module"], io=match["io"] or "output", dims=dims)
        layer = None if match["layer"] is None else int(match["layer"])
        return cls(layer, match["site"], dims=dims, stack=match["stack"])


def as_location(place: Location | str) -> Location:
    """`place` itself, or the location that a text names."""
    if isinstance(place, Location):
        return place
    if isinstance(place, str):
        return Location.parse(place)
    raise InterventionError(
        f"a location was asked for and {type(place).__name__} {place!r} given; write Location(3) or 'block_output.3'."
    )


def _check_site(location: Location) -> None:
    if location.site not in SITES:
        near = difflib.get_close_matches(str(location.site), SITES, n=1, cutoff=0.0)[0]
        raise InterventionError(
            f"site {location.site!r} does not exist: the sites are {', '.join(SITES)}; did you mean {near!r}? "
            "Any other place goes by path: Location(module='…')."
        )
    if location.io != "output":
        raise InterventionError(f"io={location.io!r} goes with module=; for a block use site='block_{location.io}'.")
    if location.site in MODEL_SITES and location.layer is not None:
        raise InterventionError(
            f"site {location.site!r} has no layer, and layer={location.layer} was given; "
            f"write Location(site={location.site!r})."
        )
    if location.site in BLOCK_SITES and location.layer is None:
        raise InterventionError(
            f"Location(site={location.site!r}) names no layer; write Location(3) for the output of block 3, "
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
    if location.io not in ("input", "output"):
        raise InterventionError(f"io={location.io!r} does not exist: a module has io='input' and io='output'.")


def _layer(layer: int) -> int:
    if isinstance(layer, bool) or not hasattr(layer, "__index__"):
        raise InterventionError(
            f"layer={layer!r} is not a whole number; write Location(3), or Location(-1) for the last."
        )
    return index(layer)


def _dims(dims: Iterable[int] | slice | int) -> Dims:
    """`dims` as a range where they are evenly spaced and rising, else as a tuple."""
    try:
        if isinstance(dims, slice):
            if dims.stop is None:
                raise InterventionError(
                    f"dims={dims!r} has no end; a location knows no width: write dims=range(0, 64)."
                )
            dims = range(dims.start or 0, dims.stop, dims.step or 1)
        given = tuple(dims if isinstance(dims, Iterable) else (dims,))
        if any(isinstance(d, bool) for d in given):
            raise TypeError("a list of bools would be taken for 0 and 1")
        numbers = tuple(map(index, given))
    except TypeError as error:
        raise InterventionError(
            f"dims={dims!r} are not whole numbers; write dims=range(0, 64) or dims=[1, 5]."
        ) from error
    if not numbers:
        raise InterventionError(f"dims={dims!r} selects nothing; leave dims out for all of them.")
    if min(numbers) < 0:
        raise InterventionError(f"dims={dims!r} holds {min(numbers)}: dims count from 0, a location knows no width.")
    if len(set(numbers)) < len(numbers):
        raise InterventionError(f"dims={dims!r} names an entry twice; name each once.")
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    even = range(numbers[0], numbers[-1] + 1, step) if step > 0 else range(0)
    return even if tuple(even) == numbers else numbers


def _dims_text(dims: Dims) -> str:
    if isinstance(dims, range):
        return f"{dims.start}:{dims.stop}" + (f":{dims.step}" if dims.step != 1 else "")
    return ",".join(map(str, dims))


def _parse_dims(units: str | None, text: str) -> Dims | None:
    if units is None:
        return None
    name, _, value = units.partition("=")
    try:
        if name.strip() != "dims":
            raise ValueError
        if ":" in value:
            return _dims(range(*(int(part) for part in value.split(":"))))
        return _dims([int(part) for part in value.split(",")])
    except (ValueError, TypeError) as error:
        if isinstance(error, InterventionError):
            raise
        raise InterventionError(
            f"[{units}] in {text!r} is not a selection; write [dims=0:64] or [dims=1,5]."
        ) from error
