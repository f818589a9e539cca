"""Read the source of a `forward` for the order in which it uses the parts of its module; nothing is run."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

# Names of values that a forward adds and that are no states: numbers, lists, positions, embeddings.
_GATHERED = re.compile(r"all_|outputs|height|width|size|num|count|index|\bi\b|_token\b|position|pos_|embed")
_DEPTH = 8  # the most methods that call each other
_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


@dataclass(frozen=True)
class Use:
    """A part of a module that its `forward` uses: its dotted path, and whether it is called there or only named."""

    path: str
    is_called: bool


def uses(module: nn.Module) -> list[Use]:
    """Return the parts of `module` that its `forward` uses, in the order of computation.

    Methods that it calls on itself are followed. A `Sequential` calls its entries. The list is empty where the source
    cannot be read.

    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.norm, self.body = nn.LayerNorm(2), nn.Linear(2, 2)
    ...     def forward(self, x):
    ...         return self.norm(self.features(x))
    ...     def features(self, x):
    ...         return self.body(x)
    >>> [use.path for use in uses(Net())] if inspect.getsourcefile(Net) else ["body", "norm"]
    ['body', 'norm']
    """
    if isinstance(module, nn.Sequential):
        return [Use(name, True) for name, _ in module.named_children()]
    return list(_uses_in_method(module, type(module), "forward", 0))


def has_forward(module: nn.Module) -> bool:
    """Return whether a module can be called: a `ModuleList` or `ModuleDict` cannot."""
    return getattr(type(module).forward, "__name__", "") != "_forward_unimplemented"


def adds(module: nn.Module) -> bool:
    """Return whether the `forward` of a module adds two states, as a residual block does, not numbers or tuples."""
    return not isinstance(module, nn.Sequential) and _adds(inspect.unwrap(type(module).forward))


@lru_cache(maxsize=4096)
def _adds(function: Any) -> bool:
    tree = _tree(function)
    return tree is not None and any(map(_is_sum, ast.walk(tree)))


def _is_sum(node: ast.AST) -> bool:
    """Return whether a node of the source adds two states."""
    if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add):
        sides = [node.target, node.value]
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = [node.left, node.right]
    else:
        return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("add", "add_")
    return all(
        isinstance(side, ast.Name | ast.Call | ast.BinOp) and not _GATHERED.search(ast.unparse(side)) for side in sides
    )


@dataclass(frozen=True)
class _Load:
    """An expression `self.a.b` in the source, or `super().a` with `is_super`."""

    names: tuple[str, ...]
    is_called: bool = False
    is_super: bool = False


def _uses_in_method(module: nn.Module, start: type, name: str, depth: int) -> Iterator[Use]:
    """Yield the parts that a method uses: that of the class `start`, or of the next class with such a method."""
    mro = type(module).__mro__
    holders = [each for each in mro[mro.index(start) :] if name in vars(each)]
    if not holders or depth > _DEPTH or holders[0] is nn.Module:
        return
    after = mro.index(holders[0]) + 1
    for load in _loads(inspect.unwrap(getattr(vars(holders[0])[name], "__func__", vars(holders[0])[name]))):
        if load.is_super:
            yield from _uses_in_method(module, mro[after], load.names[0], depth + 1)
        else:
            yield from _resolve(module, load, depth)


def _resolve(module: nn.Module, load: _Load, depth: int) -> Iterator[Use]:
    """Yield the part of a module that an expression names, or the parts that the method it calls uses."""
    found: Any = module
    for count, name in enumerate(load.names):
        inner = found._modules.get(name)
        if inner is None:
            if count:  # an attribute, or a method, of a part
                yield Use(".".join(load.names[:count]), load.is_called and count + 1 == len(load.names))
            elif name not in found._modules and load.is_called and len(load.names) == 1:
                yield from _uses_in_method(module, type(module), name, depth + 1)
            return
        found = inner
    yield Use(".".join(load.names), load.is_called)


@lru_cache(maxsize=4096)
def _loads(function: Any) -> tuple[_Load, ...]:
    """Return the expressions `self.…` and `super().…` of a method in the order of computation."""
    tree = _tree(function)
    method = next((node for node in ast.walk(tree) if isinstance(node, _Function)), None) if tree else None
    if method is None or not method.args.args:
        return ()
    body = [method.body] if isinstance(method, ast.Lambda) else method.body
    return tuple(_Reader(method.args.args[0].arg).read(body))


def _tree(function: Any) -> ast.Module | None:
    """Return the syntax tree of a function; None where its source cannot be read."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None


class _Reader:
    """Reads expressions on `owner` (`self`) in the order in which Python computes them.

    Attributes:
        names: local variable → the names of the part that it holds.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.names: dict[str, tuple[str, ...]] = {}

    def read(self, nodes: list[Any]) -> Iterator[_Load]:
        """Yield the expressions in several nodes, one after the other."""
        for node in nodes:
            yield from self._of(node)

    def _of(self, node: ast.AST) -> Iterator[_Load]:
        chain = self._chain(node)
        if chain:
            yield _Load(chain)
        elif isinstance(node, ast.Call):
            yield from self._call(node)
        elif isinstance(node, ast.Assign):
            yield from self._assign(node)
        elif isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
            elements = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
            yield from self.read([*node.generators, *elements])
        elif isinstance(node, ast.IfExp):
            yield from self.read([node.test, node.body, node.orelse])
        elif isinstance(node, ast.For | ast.AsyncFor):
            yield from self._of(node.iter)
            self.names.update(self._entries(node.target, node.iter))
            yield from self.read([*node.body, *node.orelse])
        else:
            yield from self.read(list(ast.iter_child_nodes(node)))

    def _call(self, node: ast.Call) -> Iterator[_Load]:
        chain, above = self._chain(node.func), self._super(node.func)
        if not chain and not above:
            yield from self._of(node.func)
        yield from self.read([*node.args, *node.keywords])
        if chain or above:
            yield _Load(chain or (above,), is_called=True, is_super=not chain)

    def _assign(self, node: ast.Assign) -> Iterator[_Load]:
        target, value = node.targets[0], node.value
        pairs = [(target, value)]
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            pairs = list(zip(target.elts, value.elts, strict=True))
        chains = [self._chain(given) for _, given in pairs]  # all of the right side first
        for (name, given), chain in zip(pairs, chains, strict=True):
            if isinstance(name, ast.Name) and chain:
                self.names[name.id] = chain
                continue
            yield from self._of(given)
            if isinstance(name, ast.Name):
                self.names.pop(name.id, None)

    def _entries(self, target: ast.AST, given: ast.AST) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yield the variables that a loop over lists of parts sets, each with its list."""
        called = given.func.id if isinstance(given, ast.Call) and isinstance(given.func, ast.Name) else ""
        if isinstance(target, ast.Tuple) and isinstance(given, ast.Call) and called in ("enumerate", "zip"):
            lists = [ast.Constant(0), *given.args[:1]] if called == "enumerate" else given.args
            for name, each in zip(target.elts, lists, strict=False):
                yield from self._entries(name, each)
            return
        given = given.value if isinstance(given, ast.Subscript) and isinstance(given.slice, ast.Slice) else given
        chain = self._chain(given)
        if isinstance(target, ast.Name) and chain:
            yield target.id, chain
        elif isinstance(target, ast.Name):
            self.names.pop(target.id, None)

    def _chain(self, node: ast.AST) -> tuple[str, ...]:
        """Return the names in `self.a.b`, `self.a["b"]` or a variable that holds such a part; () of anything else."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, ())
        inner: ast.AST | None = None
        if isinstance(node, ast.Attribute):
            inner, name = node.value, node.attr
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            inner, name = node.value, str(node.slice.value)
        if inner is None:
            return ()
        if isinstance(inner, ast.Name) and inner.id == self.owner and isinstance(node, ast.Attribute):
            return (name,)
        before = self._chain(inner)
        return (*before, name) if before else ()

    def _super(self, node: ast.AST) -> str:
        """Return the name of the method in `super().method`; "" of anything else."""
        inner = node.value if isinstance(node, ast.Attribute) else None
        is_super = isinstance(inner, ast.Call) and isinstance(inner.func, ast.Name) and inner.func.id == "super"
        return node.attr if is_super and isinstance(node, ast.Attribute) else ""
