"""Source texts: the files of this package that another machine needs, and the functions that can be sent as text."""

import ast
import inspect
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

PACKAGES = frozenset({"interventions", "distill"})
# jaxtyping is used in annotations alone, which have no effect at run time.
STANDING_IN = {
    "jaxtyping": """
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {"__class_getitem__": classmethod(lambda cls, item: object)})
"""
}


@cache
def sources(names: frozenset[str]) -> dict[str, str]:
    """Return {module: source text} of modules of this package and all that they import from it."""
    for package in PACKAGES & sys.modules.keys():
        _public_modules(package)  # imports them: what they import is looked for among the imported modules
    found = dict(STANDING_IN)
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        if name in PACKAGES:
            found[name], needed = _public(name)
        else:
            found[name] = Path(_file(name)).read_text(encoding="utf-8")
            needed = list(_imported(found[name]))
        waiting += needed
    return found


def _public(package: str) -> tuple[str, list[str]]:
    """Return a text that imports the public names of a package on first use, and the modules that define them."""
    modules = _public_modules(package)
    text = f"""
_modules = {modules!r}

def __getattr__(name):
    if name not in _modules:
        raise AttributeError(name)
    return getattr(__import__(_modules[name], fromlist=[name]), name)
"""
    return text, list(dict.fromkeys(modules.values()))


def _public_modules(package: str) -> dict[str, str]:
    """Return the modules of the package that define its public names, by these names."""
    whole = sys.modules[package]
    found = {name: getattr(getattr(whole, name), "__module__", "") for name in whole.__all__}
    return {name: module for name, module in found.items() if module.startswith(f"{package}.")}


def _imported(text: str) -> Iterator[str]:
    """Yield the modules of this package that a text imports."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        # Modules that are not imported here, such as a plotting file, are not needed there.
        yield from (name for name in names if name.split(".")[0] in PACKAGES and "." in name and name in sys.modules)


def _file(name: str) -> str:
    file = sys.modules[name].__file__
    assert file is not None
    return file


def is_in_packages(obj: Any) -> bool:
    """Return whether a class or function belongs to this package, and can be found in it by its name."""
    return (obj.__module__ or "").split(".")[0] in PACKAGES and "<" not in obj.__qualname__


def is_local(name: str | None) -> bool:
    """Return whether a module is a file of the user, and not part of an installed package."""
    file = getattr(sys.modules.get(name or ""), "__file__", None)
    if file is None or not Path(file).is_absolute() or _is_installed(file):
        return False
    return Path(file).exists()  # some modules of torch have no file


@cache
def _is_installed(file: str) -> bool:
    """Return whether a file belongs to the standard library or to an installed package."""
    return any(Path(file).is_relative_to(folder) for folder in _folders_of_packages())


@cache
def _folders_of_packages() -> tuple[str, ...]:
    """Return the folders of the standard library and of installed packages, which sysconfig takes a while to find."""
    return tuple(sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib"))


def names_in(code: CodeType) -> set[str]:
    """Return the names that a function and the functions nested in it use."""
    inner = (each for each in code.co_consts if isinstance(each, CodeType))
    return set(code.co_names).union(*map(names_in, inner))


def is_its_text(function: FunctionType) -> bool:
    """Return whether the source text of a function, alone at the top of a file, defines the same function.

    It does not for wrappers (whose text is that of the wrapped function), for files that changed since, for methods
    that use `super()` or names with two underscores, for functions that write to variables around them, and for
    functions with attributes.
    """
    code = function.__code__
    if vars(function) or "__class__" in code.co_freevars:
        return False
    if code.co_name == "<lambda>":
        return True  # nnsight finds a lambda by its place in the line
    try:
        text = textwrap.dedent(inspect.getsource(function))
        around = f"def around({', '.join(code.co_freevars)}):\n{textwrap.indent(text, '    ')}"
        found = [each for each in _inner(compile(around, "", "exec")) if each.co_name == code.co_name]
    except (OSError, TypeError, SyntaxError):
        return True  # without a text nnsight itself sends bytecode
    return "nonlocal " not in text and any(_same(each, code) for each in found)


def _inner(code: CodeType) -> Iterator[CodeType]:
    """Yield the code of all functions nested in a function."""
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield each
            yield from _inner(each)


def _same(a: CodeType, b: CodeType) -> bool:
    """Return whether two functions and all functions nested in them have the same code."""
    constants = [[each for each in code.co_consts if not isinstance(each, CodeType)] for code in (a, b)]
    inner = [[each for each in code.co_consts if isinstance(each, CodeType)] for code in (a, b)]
    names = all(getattr(a, name) == getattr(b, name) for name in ("co_code", "co_names", "co_varnames", "co_freevars"))
    alike = len(inner[0]) == len(inner[1]) and repr(constants[0]) == repr(constants[1])
    return names and alike and all(map(_same, *inner))
