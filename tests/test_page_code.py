"""The Python of the pages for users: it parses, and each name is imported, made before, or the reader's own."""

import ast
import builtins
import re
from importlib import import_module
from pathlib import Path

import pytest

import distill
import interventions

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *(f"docs/{name}.md" for name in (
    "data", "on-policy", "students", "training", "activations", "served-teacher",
))]  # fmt: skip
PACKAGES = {"distill": distill, "interventions": interventions}
READERS = set(
    "model teacher student assistant one two three other net frozen_net bert llama t5 autoencoder "  # models
    "data rows task held_out train_rows test_rows base_rows source_rows pairs texts inputs base_inputs source_inputs "
    "prompt table grids ids mask labels templates images tokenizer teacher_tokenizer student_tokenizer Own "
    "answers foils metric mapping direction kd_result".split()
)
"""Names that stand for what a reader has."""


def blocks(page: str) -> list[ast.Module]:
    found = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return [ast.parse(each) for each in found]


def made_in(block: ast.Module) -> set[str]:
    """The names that a block imports, assigns, or has as parameters."""
    made = {node.id for node in ast.walk(block) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    made |= {node.arg for node in ast.walk(block) if isinstance(node, ast.arg)}
    imports = (node for node in ast.walk(block) if isinstance(node, ast.Import | ast.ImportFrom))
    return made | {each.asname or each.name.split(".")[0] for node in imports for each in node.names}


@pytest.mark.parametrize("page", PAGES)
def test_every_name_of_a_block_is_imported_made_before_or_the_readers(page):
    known = set(dir(builtins)) | READERS
    for block in blocks(page):
        known |= made_in(block)
        used = {node.id: node.lineno for node in ast.walk(block) if isinstance(node, ast.Name)}
        missing = sorted(used.keys() - known)
        assert not missing, f"{page}: {missing} of the block that begins {ast.unparse(block)[:60]!r}"


@pytest.mark.parametrize("page", PAGES)
def test_what_is_imported_from_the_packages_is_there(page):
    for node in (each for block in blocks(page) for each in ast.walk(block)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
            module = import_module(node.module or "")
            assert [each.name for each in node.names if not hasattr(module, each.name)] == []
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in PACKAGES:
            assert hasattr(PACKAGES[node.value.id], node.attr), f"{page}: {node.value.id}.{node.attr}"


def test_the_readers_names_are_names_of_nothing_else():
    """A placeholder that is a public name would hide that it is not imported."""
    public = {name for package in PACKAGES.values() for name in package.__all__}
    assert public & READERS <= {"direction"}  # a vector on the first page, made by `direction`
