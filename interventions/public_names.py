"""Public names that are imported when they are first used, so that importing a package imports nothing else.

A module-level `__getattr__` (PEP 562) does most of it. It is not called where an attribute exists already, though, and
Python makes the module of every imported file an attribute of its package: with `distill/fit.py` imported,
`distill.fit` would be that module, and not the function. `Package` keeps such modules out of the way.
"""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from interventions.renames import renamed_in

IMPORT_SYSTEM = ("importlib._bootstrap", "_frozen_importlib")


class Package(ModuleType):
    """A package in which a public name stands for what a file defines, and never for a file of the same name."""

    def __setattr__(self, name: str, value: object) -> None:
        """Set an attribute, unless Python sets the module of a file whose name is that of what it defines."""
        if not isinstance(value, ModuleType) or vars(self)["_homes"].get(name) != value.__name__:
            super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Callable[[str], ModuleType], tuple[str]]:
        """Return how to pickle the package: by its name, as cloudpickle does for modules of the plain class alone."""
        return import_module, (self.__name__,)


def import_when_used(
    package: str, names: Mapping[str, str], renamed: Mapping[str, str] | None = None
) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package that imports each of its names when it is first used.

    Files and folders that are not public are attributes too, as if all public names had been imported at once.

    Args:
        package: its name.
        names: {a module: the names that it defines, with spaces between them}; for public submodules the package.
        renamed: {a name of the version before: the path of the present one}, as `renamed_in` takes them.
    """
    module = sys.modules[package]
    module.__class__ = Package
    homes = vars(module)["_homes"] = {name: home for home, line in names.items() for name in line.split()}
    get_renamed = renamed_in(package, **renamed or {})

    def get(name: str) -> Any:
        if name in homes:
            home = homes[name]
            found = import_module(f"{package}.{name}") if home == package else getattr(import_module(home), name)
            vars(module)[name] = found
            return found
        is_file = name.isidentifier() and not name.startswith("_")
        if is_file and not _is_import_system(sys._getframe(1)) and find_spec(f"{package}.{name}"):
            for each in homes:
                get(each)
            if name in vars(module):
                return vars(module)[name]
        return get_renamed(name, stacklevel=4)

    return get


def _is_import_system(frame: Any) -> bool:
    """Return whether `from package import name` looks for a name, which imports the file of that name itself."""
    return frame.f_globals.get("__name__") in IMPORT_SYSTEM
