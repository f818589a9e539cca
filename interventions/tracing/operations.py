"""The operations inside the forward of a module, under nnsight's names: `torch_relu_0` is its first call of relu."""

import ast
import difflib
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from interventions.errors import InterventionError
from interventions.locations import Location
from interventions.models.modules import modules_of

_PLAIN = re.compile(
    r"(isinstance|hasattr|getattr|setattr|len|range|zip|super|int|float|bool|tuple|str|\w*Error|logger\w*)_\d+"
)
_CHOOSER = re.compile(r".*get_interface_\d+")


@dataclass(frozen=True)
class Operations:
    """The operations of one forward, in the order of its source text.

    Attributes:
        names: their names.
        lines: {name: the line of the text that it is on}.
    """

    names: tuple[str, ...]
    lines: dict[str, int]

    @property
    def attention(self) -> tuple[str, tuple[str, ...]] | None:
        """The call that chooses the attention function of transformers, and the calls of that; None without one."""
        chooser = next(filter(_CHOOSER.fullmatch, self.names), None)
        if chooser is None:
            return None
        chosen = [name for name in self.names if self.lines[name] == self.lines[chooser] and name != chooser]
        stem = next((name.rpartition("_")[0] for name in chosen), "attention_interface")
        return chooser, tuple(n for n in self.names if n.rpartition("_")[0] == stem and n not in chosen)


def operations_of(module: nn.Module) -> Operations | None:
    """Return the operations in the forward of a module, which stays untouched; None if it is not written in Python."""
    found = _forward_of(module)
    return None if found is None else Operations(found.names, found.lines)


def _forward_of(module: nn.Module) -> Any:
    """Return the forward of a module as nnsight compiles it; None if there is no source text."""
    from nnsight.intervention.source import STATE, SourceNotAvailable, compiled, decorator_chain, module_body

    state = vars(module).get(STATE)
    forward = module_body(module) if state is None else state.original
    try:
        return compiled(decorator_chain(forward)[0])
    except (SourceNotAvailable, SyntaxError):
        return None


def operations_listed(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[str]:
    """Yield lines that list the operations of each module, without torch's own modules."""
    shown: set[type] = set()
    for path, module in modules:
        if type(module).__module__.startswith("torch.") or type(module) in shown:
            continue
        found = operations_of(module)
        names = [name for name in found.names if not _PLAIN.fullmatch(name)] if found is not None else []
        if names:
            shown.add(type(module))
            yield f"  {path or '(the model)'}  {type(module).__name__}"
            yield from textwrap.wrap(", ".join(names), 112, initial_indent=" " * 4, subsequent_indent=" " * 4)


def runs_once(outer: nn.Module, path: str) -> bool:
    """Return whether a part is called once for each call of `outer`: on one line, and in no loop of the source."""
    module = outer
    for name in path.split("."):
        if not _calls_once(module, name):
            return False
        module = module.get_submodule(name)
    return True


def _calls_once(module: nn.Module, name: str) -> bool:
    """Return whether the forward of a module calls its child `name` on exactly one line, outside of loops."""
    forward = _forward_of(module)
    if forward is None:
        return False
    tree = ast.parse(forward.source)
    loops = [each for each in ast.walk(tree) if isinstance(each, _LOOPS)]
    named = [each for each in ast.walk(tree) if _is_own(each, name)]
    called = [each for each in ast.walk(tree) if isinstance(each, ast.Call) and _is_own(each.func, name)]
    looped = any(named[0] in ast.walk(each) for each in loops) if named else False
    return len(named) == len(called) == 1 and not looped


_LOOPS = (ast.For, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda)


def _is_own(node: ast.AST, name: str) -> bool:
    """Return whether a node is `self.name`."""
    own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return own and isinstance(node, ast.Attribute) and node.attr == name


def check_operation(location: Location, module: nn.Module, path: str, name: str) -> None:
    """Raise InterventionError if the forward of a module has no operation of that name."""
    found = operations_of(module)
    where = f"the forward of {path or 'the model'} ({type(module).__name__})"
    if found is None:
        raise InterventionError(f"{location}: {where} is no Python that can be opened; name the module: io='output'.")
    if name not in found.names:
        near = difflib.get_close_matches(name, found.names, n=3, cutoff=0.0)
        hint = f"did you mean {', '.join(map(repr, near))}? " if near else ""
        raise InterventionError(
            f"{location}: {where} has no operation {name!r}; {hint}describe(model) lists its {len(found.names)}."
        )


def opened_modules(model: Any) -> Iterator[nn.Module]:
    """Yield the modules whose forward nnsight has rewritten to show its operations."""
    from nnsight.intervention.source import STATE

    for module in modules_of(model._module):
        state = vars(module).get(STATE)
        if state is not None and state.sourced:
            yield module


def close(module: nn.Module) -> None:
    """Restore the original forward of a module."""
    from nnsight.intervention.source import STATE

    state = vars(module)[STATE]
    state.body, state.compiled, state.sourced = state.original, None, False
