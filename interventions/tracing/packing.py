"""What travels to the machine where a model is: our own code as source text, and what it is to do as data.

The other side has torch and nnsight, and not this package. Classes pickled by value would not do: they carry bytecode
of one Python version, and where they are unpickled in the process that made them (`remote="local"`), they overwrite
the originals. So the sources of the files that are needed go along, and are run there as modules of nobody else's.
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
from interventions.tracing.source_texts import PACKAGES, STANDING_IN, is_its_text, is_local, is_ours, names_in, sources


class Parcel:
    """Something with methods, which are called here or, sent along with a trace, where the model is.

    Args:
        model: what it is done to; its modules, and nnsight's views of them, travel as their paths.
        content: what has the methods. Where it arrives, its `away` is set to True.
        packed: called when it is sent.
    """

    def __init__(self, model: Traced, content: Any, packed: Callable[[], None] = lambda: None) -> None:
        self.model, self.content, self.packed = model, content, packed
        self._arrived: Any = None

    def call(self, model: Traced, name: str, *args: Any) -> Any:
        """`content.name(*args)`; `model` is the one that is there."""
        if self._arrived is not None:
            return self._arrived.call(model, name, *args)
        return getattr(self.content, name)(*args)

    def rehearse(self) -> None:
        """From now on be what arrives elsewhere: packed, and unpacked where none of our modules can be seen."""
        from nnsight.intervention.serialization import dumps, loads

        sent = dumps(self)
        with _elsewhere():
            self._arrived = loads(sent)
            self._arrived.open(self.model)

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
        if len(parts) == len(fromlist):  # a package of modules, whose own text need not run
            return types.SimpleNamespace(**parts)
        vars(load(name)).update(parts)
        return load(name)

    def building():  # type: ignore[no-untyped-def]
        return {**vars(builtins), "__import__": importing}

    def importing_ours(function):  # type: ignore[no-untyped-def]
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
                # A function that was sent by its text finds our packages as this text does.
                return (lambda *args: importing_ours(found(*args))) if name == "_load_function" else found
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
    """Finds none of these packages, and does not let others look for them."""

    roots: frozenset[str]

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.split(".")[0] in self.roots:
            raise ModuleNotFoundError(f"No module named {fullname!r} elsewhere")


@contextmanager
def _elsewhere() -> Iterator[None]:
    """Inside, files of the user and our packages are not to be found, and classes that arrive are new ones.

    Those that cloudpickle made, it would find again, and overwrite.
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
    """A function that is sent as its source text, as it is of no module that could be imported."""
    copy = FunctionType(function.__code__, {"__builtins__": __builtins__}, function.__name__)
    copy.__module__ = "__main__"
    return copy


def _pickled(model: Traced, content: Any) -> tuple[bytes, frozenset[str]]:
    """`content`, with what is of our packages by name, and the names of the modules of ours that it needs."""
    from cloudpickle.cloudpickle import _PICKLE_BY_VALUE_MODULES, CloudPickler
    from nnsight.intervention.serialization import CustomCloudPickler

    modules = {id(module): path for path, module in model._module.named_modules()}
    views: Any = model
    paths = {id(view): view.path.removeprefix(model.path).lstrip(".") for view in views.modules()}
    used: set[str] = set()

    local: set[str] = set()

    class Packing(CustomCloudPickler):
        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, type | FunctionType) and is_ours(obj):
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
