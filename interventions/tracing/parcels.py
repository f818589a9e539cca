"""What travels to the machine where a model is: our own code as source text, and what it is to do as data.

The other side has torch and nnsight, and not this package. Classes pickled by value would not do: they carry bytecode
of one Python version, and where they are unpickled in the process that made them (`remote="local"`), they overwrite
the originals. So the sources of the files that are needed go along, and are run there as modules of nobody else's.
"""

import ast
import io
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

from interventions.wrappers import Traced

PACKAGES = ("interventions", "distill")
# jaxtyping names shapes in annotations, which say nothing when a program runs.
STANDING_IN = {
    "jaxtyping": """
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {"__class_getitem__": classmethod(lambda cls, item: object)})
"""
}


class Parcel:
    """Something with methods, which are called here or, sent along with a trace, where the model is.

    Args:
        model: what it is done to; its modules, and nnsight's views of them, travel as their paths.
        content: what has the methods. Where it arrives, its `away` is set to True.
        packed: called when it is sent.
    """

    def __init__(self, model: Traced, content: Any, packed: Callable[[], None] = lambda: None) -> None:
        self.model, self.content, self.packed = model, content, packed

    def call(self, model: Traced, name: str, *args: Any) -> Any:
        """`content.name(*args)`; `model` is the one that is there."""
        return getattr(self.content, name)(*args)

    def __reduce__(self) -> tuple:
        self.packed()
        payload, used = _pickled(self.model, self.content)
        return _by_value(unpack), (zlib.compress(payload), zlib.compress(repr(sources(used)).encode()))


def unpack(payload: bytes, files: bytes) -> Any:
    """What a parcel is where it arrives. It is sent as text, so it imports all that it needs."""
    import ast
    import builtins
    import io
    import linecache
    import pickle
    import sys
    import types
    import zlib

    texts = ast.literal_eval(zlib.decompress(files).decode())
    packages = {name.split(".")[0] for name in texts}
    loaded = {}  # type: ignore[var-annotated]

    def load(name):  # type: ignore[no-untyped-def]
        if name in loaded:
            return loaded[name]
        known_as = f"parcel.{name}"  # a name that is nobody else's, and known only while dataclasses look it up
        module = loaded[name] = types.ModuleType(known_as)
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": importing}
        if name in texts:
            file = f"<{name}>"
            linecache.cache[file] = (len(texts[name]), None, texts[name].splitlines(True), file)
            sys.modules[known_as] = module
            try:
                exec(compile(texts[name], file, "exec"), module.__dict__)
            finally:
                del sys.modules[known_as]
        return module

    def importing(name, globals=None, locals=None, fromlist=(), level=0):  # type: ignore[no-untyped-def]
        root = name.split(".")[0]
        if level or root not in packages:
            return builtins.__import__(name, globals, locals, fromlist, level)
        if not fromlist:
            raise ImportError(f"import {name} does not travel; write from {name} import …")
        parts = {each: load(f"{name}.{each}") for each in fromlist if f"{name}.{each}" in texts}
        if len(parts) == len(fromlist):  # a package of modules, whose own text need not run
            return types.SimpleNamespace(**parts)
        vars(load(name)).update(parts)
        return load(name)

    class Opening(pickle.Unpickler):
        model: Any = None

        def find_class(self, module, name):  # type: ignore[no-untyped-def]
            if module.split(".")[0] not in packages:
                return super().find_class(module, name)
            found = load(module)
            for part in name.split("."):
                found = getattr(found, part)
            return found

        def persistent_load(self, pid):  # type: ignore[no-untyped-def]
            kind, path = pid
            if kind == "module":
                return self.model._module.get_submodule(path)
            views = {view.path.removeprefix(self.model.path).lstrip("."): view for view in self.model.modules()}
            return views[path]

    class Unpacked:
        def call(self, model, name, *args):  # type: ignore[no-untyped-def]
            if "content" not in vars(self):
                opening = Opening(io.BytesIO(zlib.decompress(payload)))
                opening.model = model
                self.content = opening.load()
                self.content.away = True
            return getattr(self.content, name)(*args)

    return Unpacked()


def _by_value(function: Any) -> FunctionType:
    """A function that is sent as its source text, as it is of no module that could be imported."""
    copy = FunctionType(function.__code__, {"__builtins__": __builtins__}, function.__name__)
    copy.__module__ = "__main__"
    return copy


def _pickled(model: Traced, content: Any) -> tuple[bytes, frozenset[str]]:
    """`content`, with what is of our packages by name, and the names of the modules of ours that it needs."""
    from nnsight.intervention.serialization import CustomCloudPickler

    modules = {id(module): path for path, module in model._module.named_modules()}
    views: Any = model
    paths = {id(view): view.path.removeprefix(model.path).lstrip(".") for view in views.modules()}
    used: set[str] = set()

    class Packing(CustomCloudPickler):
        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, type | FunctionType) and _is_ours(obj):
                used.add(obj.__module__)
                return NotImplemented  # by name
            return super().reducer_override(obj)

        def persistent_id(self, obj: Any) -> Any:
            if id(obj) in paths:
                return "envoy", paths[id(obj)]
            return ("module", modules[id(obj)]) if id(obj) in modules else None

    buffer = io.BytesIO()
    Packing(buffer).dump(content)
    return buffer.getvalue(), frozenset(used)


def _is_ours(obj: Any) -> bool:
    """Whether it is of our packages, and can be found there by its name."""
    return (obj.__module__ or "").split(".")[0] in PACKAGES and "<" not in obj.__qualname__


@cache
def sources(names: frozenset[str]) -> dict[str, str]:
    """The text of modules of ours, and of those that they import, by name."""
    found = dict(STANDING_IN)
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = Path(_file(name)).read_text(encoding="utf-8")
            waiting += _imported(found[name])
    return found


def _imported(text: str) -> Iterator[str]:
    """The modules of ours that a text imports."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        # Those that nothing imported here are not run there either.
        yield from (name for name in names if name.split(".")[0] in PACKAGES and "." in name and name in sys.modules)


def _file(name: str) -> str:
    file = sys.modules[name].__file__
    assert file is not None
    return file
