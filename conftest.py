"""Settings of every test process, doctests included: two tiers, no network, one thread for each worker."""

import ast
import os
from typing import Any

import pytest
from jaxtyping import _import_hook, install_import_hook

for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start; torch reads it at import

import torch

from tests.tiers import default_tier

torch.set_num_threads(1)


class Alone(_import_hook.Typechecker):
    """A decorator by itself, without `jaxtyping.jaxtyped` around it."""

    def get_ast(self) -> ast.expr:
        """Return the decorator as it stands in the code of a module."""
        (keyword,) = super().get_ast().keywords
        return keyword.value


class Outermost(_import_hook.JaxtypingTransformer):
    """Checks functions and classes of modules, and none inside of a function: those would be wrapped at each call.

    A class that is `checked` says itself, and in its own words, what of wrong types it is given.
    """

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        """Leave the class itself alone where it is checked; of others the check stands below `renamed`.

        That takes keywords that the class itself has no more.
        """
        if any(isinstance(each, ast.Name) and each.id == "checked" for each in node.decorator_list):
            self._parents.append(node)
            self.generic_visit(node)
            self._parents.pop()
            return node
        node = super().visit_ClassDef(node)
        node.decorator_list.sort(key=lambda each: not ast.unparse(each).startswith("renamed("))
        return node

    def generic_visit(self, node: Any) -> None:
        """Go on, but not into functions."""
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            super().generic_visit(node)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that run everything, and what is left out without them."""
    parser.addoption("--full", action="store_true", help="run every case of every test")
    parser.addoption("--left-out", action="store_true", help="run the cases alone that are left out without --full")


def pytest_configure(config: pytest.Config) -> None:
    """Enforce shapes and types, before anything of ours is imported."""
    from tests.enforcing import enforced  # noqa: F401 (by which the hook finds it)

    _import_hook.JaxtypingTransformer = Outermost
    _import_hook.Typechecker = Alone
    install_import_hook(["interventions", "distill"], "tests.enforcing.enforced")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep some cases of each test function, unless all are asked for or one is named; begin with the tutorials.

    A file runs in one process, and theirs takes minutes: at the end the other process would wait for it.
    """
    items.sort(key=lambda item: item.path.name != "test_tutorials.py")
    if config.getoption("--full") or any("::" in str(argument) for argument in config.args):
        return
    kept = default_tier(items)
    if config.getoption("--left-out"):
        default = set(kept)
        kept = [item for item in items if item not in default]
    config.hook.pytest_deselected(items=list(set(items) - set(kept)))
    items[:] = kept
