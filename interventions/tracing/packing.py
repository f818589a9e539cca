"""Packing of reads and writes for the machine of a model: the code of this package as source text, the rest as data.

The other machine has torch and nnsight, but not this package. Classes pickled by value would not do: they carry
bytecode of one Python version, and unpickled in the process that made them (`remote="local"`) they overwrite the
originals. So the source files that are needed are sent along, and run there as modules with names of their own.
"""

import io
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.abc import MetaPathFinder
from types import FunctionType, ModuleType
from typing import Any
from weakref import WeakValueDictionary

from interventions.models.wrappers import Traced
from interventions.tracing.source_texts import (
    PACKAGES,
    STANDING_IN,
    is_in_packages,
    is_its_text,
    is_local,
    names_in,
    sources,
)


class Parcel:
    """An object whose methods are called here or, if it is sent along with a trace, on the machine of the model.

    Args:
        model: the traced model; its modules, and nnsight's views of them, are sent as their paths.
        content: the object with the methods. On arrival its attribute `away` is set to True.
        packed: called when the parcel is sent.
    """

    def __init__(self, model: Traced, content: Any, packed: Callable[[], None] = lambda: None) -> None:
        self.model, self.content, self.packed = model, content, packed
        self._arrived: Any = None

    def call(self, model: Traced, name: str, *args: Any) -> Any:
        """Return `content.name(*args)`; `model` is the model on the machine where this is called."""
        if self._arrived is not None:
            return self._arrived.call(model, name, *args)
        return getattr(self.content, name)(*args)

    def rehearse(self) -> None:
        """Pack the content, unpack it where this package cannot be imported, and use that copy from now on."""
        from nnsight.intervention.serialization import dumps, loads

        sent = dumps(self)
        with _hidden_packages():
            self._arrived = loads(sent)
            self._arrived.open(self.model)

    def __reduce__(self) -> tuple:
        self.packed()
        payload, used = _pickled(self.model, self.content)
        return _by_value(unpack), (zlib.compress(payload), zlib.compress(repr(sources(used)).encode()))


def unpack(payload: bytes, files: bytes) -> Any:
    """Return the parcel on the machine where it arrives; this function is sent as text, so it imports all it needs.

    Args:
        payload: the pickled content, compressed.
        files: {name of a module: its source text} as a literal, compressed.
    """
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
        known_as = f"parcel.{name}"  # a name that no other module has, registered only while dataclasses look it up
        module = loaded[name] = types.ModuleType(known_as)
        module.__dict__["__builtins__"] = building()
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
            return load(name) if name == root else importing(root)
        parts = {each: load(f"{name}.{each}") for each in fromlist if f"{name}.{each}" in texts}
        # Where all names are modules of the package, its own text need not run.
        if len(parts) == len(fromlist):
            return types.SimpleNamespace(**parts)
        vars(load(name)).update(parts)
        return load(name)

    def building():  # type: ignore[no-untyped-def]
        return {**vars(builtins), "__import__": importing}

    def with_packages(function):  # type: ignore[no-untyped-def]
        copy = types.FunctionType(
            function.__code__, {"__builtins__": building()}, function.__name__, function.__defaults__
        )
        copy.__kwdefaults__ = function.__kwdefaults__
        return copy

    class Opening(pickle.Unpickler):
        model: Any = None

        def find_class(self, module, name):  # type: ignore[no-untyped-def]
            if module.split(".")[0] not in packages:
                found = super().find_class(module, name)
                # A function that was sent as its text finds these packages as the text here does.
                return (lambda *args: with_packages(found(*args))) if name == "_load_function" else found
            found = load(module)
            for part in name.split("."):
                found = getattr(found, part)
            return found

        def persistent_load(self, pid):  # type: ignore[no-untyped-def]
            kind, path = pid
            if kind == "package":
                return load(path)
            if kind == "module":
                return self.model._module.get_submodule(path)
            views = {view.path.removeprefix(self.model.path).lstrip("."): view for view in self.model.modules()}
            return views[path]

    class Unpacked:
        def open(self, model):  # type: ignore[no-untyped-def]
            if "content" not in vars(self):
                opening = Opening(io.BytesIO(zlib.decompress(payload)))
                opening.model = model
                self.content = opening.load()
                self.content.away = True
            return self.content

        def call(self, model, name, *args):  # type: ignore[no-untyped-def]
            return getattr(self.open(model), name)(*args)

    return Unpacked()


@dataclass(frozen=True)
class _Barred(MetaPathFinder):
    """An import finder that raises for some packages, before other finders look for them.

    Attributes:
        roots: the names of the packages.
    """

    roots: frozenset[str]

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.split(".")[0] in self.roots:
            raise ModuleNotFoundError(f"No module named {fullname!r} elsewhere")


@contextmanager
def _hidden_packages() -> Iterator[None]:
    """Hide this package and the user's own files from imports inside the block, as on another machine.

    Cloudpickle's register of classes is empty inside too: it would find the originals again, and overwrite them.
    """
    from cloudpickle import cloudpickle

    known, roots = cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID, PACKAGES | STANDING_IN.keys()
    names = [name for name in sys.modules if name.split(".")[0] in roots or (name != "__main__" and is_local(name))]
    hidden = {name: sys.modules.pop(name) for name in names}
    barred = _Barred(frozenset(name.split(".")[0] for name in names))
    sys.meta_path.insert(0, barred)
    cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID = WeakValueDictionary()
    try:
        yield
    finally:
        cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID = known
        sys.meta_path.remove(barred)
        sys.modules.update(hidden)


def _by_value(function: Any) -> FunctionType:
    """Return a copy of a function that is sent as its source text, as it belongs to no module that can be imported."""
    copy = FunctionType(function.__code__, {"__builtins__": __builtins__}, function.__name__)
    copy.__module__ = "__main__"
    return copy


def _pickled(model: Traced, content: Any) -> tuple[bytes, frozenset[str]]:
    """Return the pickled content, in which this package is referred to by name, and the names of the needed modules."""
    from cloudpickle.cloudpickle import _PICKLE_BY_VALUE_MODULES, CloudPickler
    from nnsight.intervention.serialization import CustomCloudPickler

    modules = {id(module): path for path, module in model._module.named_modules()}
    views: Any = model
    paths = {id(view): view.path.removeprefix(model.path).lstrip(".") for view in views.modules()}
    used: set[str] = set()

    local: set[str] = set()

    class Packing(CustomCloudPickler):
        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, type | FunctionType) and is_in_packages(obj):
                used.add(obj.__module__)
                return NotImplemented  # by name
            if isinstance(obj, type | FunctionType) and is_local(obj.__module__):
                local.add(obj.__module__)
                _PICKLE_BY_VALUE_MODULES.add(obj.__module__)
            if isinstance(obj, FunctionType):
                used.update(PACKAGES & names_in(obj.__code__))  # it may import them where it runs
            if isinstance(obj, _CACHED):
                return lru_cache, (obj.__wrapped__,)
            if isinstance(obj, cached_property):
                return cached_property, (obj.func,), {"attrname": obj.attrname}
            return super().reducer_override(obj)

        def _dynamic_function_reduce(self, func: FunctionType) -> Any:
            if is_its_text(func):
                return super()._dynamic_function_reduce(func)
            return CloudPickler._dynamic_function_reduce(self, func)  # bytecode of this version of Python

        def persistent_id(self, obj: Any) -> Any:
            if isinstance(obj, ModuleType) and obj.__name__.split(".")[0] in PACKAGES:
                used.add(obj.__name__)
                return "package", obj.__name__
            if id(obj) in paths:
                return "envoy", paths[id(obj)]
            return ("module", modules[id(obj)]) if id(obj) in modules else None

    buffer, before = io.BytesIO(), set(_PICKLE_BY_VALUE_MODULES)
    try:
        Packing(buffer).dump(content)
    finally:
        _PICKLE_BY_VALUE_MODULES.difference_update(local - before)
    return buffer.getvalue(), frozenset(used)


_CACHED = type(lru_cache(lambda: None))
