"""Import every module of both packages, as installed: `python every_module.py`, in a folder outside of the checkout."""

import importlib
import pkgutil
import sys
from pathlib import Path

if __name__ == "__main__":
    for name in ("interventions", "distill"):
        package = importlib.import_module(name)
        assert Path(package.__file__).is_relative_to(sys.prefix), f"{package.__file__} is not in {sys.prefix}"
        found = [each.name for each in pkgutil.walk_packages(package.__path__, f"{name}.")]
        for each in found:
            importlib.import_module(each)
        print(f"{name} {package.__version__}: {len(found)} modules of {Path(package.__file__).parent}")
