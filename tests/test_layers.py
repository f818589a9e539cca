"""Dependencies run one way: from distill to the public names of interventions, and in each package up its list."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest

REPOSITORY = Path(__file__).parents[1]
THIS_FILE = "tests/test_layers.py"

# A file or folder may import from those before it. `__init__` stands after the last.
ORDER = {
    "interventions": """
        names errors endings answers wrappers frames subspaces locations axes positions operators exceptions
        calls examples forward_order sites stacks final_norms sides padding architectures states attention hooks
        steps writes origins stamps recordings plots metrics runs requests interchanges averages descriptions cells
        grids passes sweeps paths encodings saving tracing __main__""".split(),
    "distill": """
        errors finite files locks seeds networks losses decoder_inputs modes pad_tokens token_positions inputs outputs
        trials padding_sides
        loss_masks classes precision ensembles noisy graphs values domains counterfactuals causal_models
        samples seen mapping swaps pairs tasks trained_on preprocessors data token_meanings token_alignment
        similarity metrics tops sensitivities retries cache padding served asking attention_keys
        penultimate wholes vacuous outcomes tallies controls variables abstraction weights ranks
        objectives fingerprints schedules readings widths students probes checkpoints run_folder computations
        arguments loop together training_paths results evaluations progress fit specialist_training specialists
        assistants mutual alignments aligning searches teachers compat report catalogue commands cli""".split(),
}
LAZILY = {("interventions.runs", "interventions.tracing")}
HOOKS = "interventions/hooks.py"
HOOKING = re.compile(
    r"register_forward_hook|register_forward_pre_hook|_forward_hooks|\.get_interface\b"
    r"|\.forward\s*=(?!=)|setattr\([^)]*[\"']forward[\"']"
)


@dataclass(frozen=True)
class Import:
    target: str
    line: int
    lazy: bool


@dataclass(frozen=True)
class Module:
    path: Path
    name: str
    tree: ast.Module

    @property
    def package(self) -> str:
        return self.name.split(".")[0]


def modules(root: Path) -> dict[str, Module]:
    found = {}
    for package in ORDER:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = Module(path, name, ast.parse(path.read_text(encoding="utf-8")))
    return found


def imports(module: Module, known: dict[str, Module]) -> Iterator[Import]:
    """Every import of a module; `from package import name` is one of `package.name`, whether that is a file or not."""
    lazy = {id(inner) for outer in ast.walk(module.tree) if is_function(outer) for inner in ast.walk(outer)}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = absolute(module, node)
            targets = [f"{source}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ORDER:
            targets = [t for t in [f"{node.value.id}.{node.attr}"] if t in known]
        else:
            continue
        yield from (Import(target, node.lineno, id(node) in lazy) for target in targets)


def is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def absolute(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    folder = module.name.split(".") if module.path.name == "__init__.py" else module.name.split(".")[:-1]
    return ".".join([*folder[: len(folder) - node.level + 1], *([node.module] if node.module else [])])


def place(target: str) -> int:
    """Where in its package's list a module stands; a name that is no file of the list is the package's own."""
    package, _, rest = target.partition(".")
    order = ORDER[package]
    entry = rest.split(".")[0]
    return order.index(entry) if entry in order else len(order)


def violations(root: Path) -> Iterator[str]:
    known = modules(root)
    public = exported(known["interventions"]) if "interventions" in known else None
    for module in known.values():
        at = module.path.relative_to(root).as_posix()
        entry = module.name.split(".")[1] if "." in module.name else None
        if entry is not None and entry not in ORDER[module.package]:
            yield f"{at}: {entry!r} is in no list; add it in its place to ORDER[{module.package!r}] of {THIS_FILE}"
            continue
        for found in imports(module, known):
            yield from (f"{at}:{found.line}: {broken}" for broken in broken_rules(module, found, known, public))
        if at != HOOKS:
            for number, line in enumerate(module.path.read_text(encoding="utf-8").splitlines(), 1):
                if match := HOOKING.search(line):
                    yield f"{at}:{number}: {match[0]!r} belongs in {HOOKS} alone"


def exported(init: Module) -> set[str] | None:
    """The names in `__all__`, or None where there is none."""
    for node in init.tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return set(ast.literal_eval(node.value))
    return None


def broken_rules(module: Module, found: Import, known: dict[str, Module], public: set[str] | None) -> Iterator[str]:
    package = found.target.split(".")[0]
    name = found.target.partition(".")[2]
    if package == "nnsight" and not found.lazy:
        yield "nnsight is imported at top level; import it in the function that needs it"
    if module.package == "interventions" and package == "distill":
        yield "interventions must not know distill"
    if module.package == "distill" and package == "interventions" and name:
        hidden = "." in name or found.target in known or name.startswith("_")
        if hidden or (public is not None and name not in public):
            yield f"{found.target} is not a public name of interventions; import one of its __init__.py"
    if module.package == package and place(found.target) > place(module.name):
        if (module.name, ".".join(found.target.split(".")[:2])) not in LAZILY:
            yield f"{found.target} stands after {module.name} in the list of {package}"
        elif not found.lazy:
            yield f"{module.name} may import {found.target} only inside a function"


def test_the_packages_keep_to_the_rules():
    assert not list(violations(REPOSITORY))


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text), encoding="utf-8")
    return root


SOUND = {
    "interventions/__init__.py": """
        from interventions.hooks import opened
        from interventions.runs import run
        __all__ = ["opened", "run"]
        """,
    "interventions/errors.py": "",
    "interventions/hooks.py": """
        from interventions.errors import E
        def opened(m):
            m.register_forward_hook(print)
            m.forward = m._forward_hooks
        """,
    "interventions/runs.py": """
        from .hooks import opened
        def run(model):
            from interventions.tracing import trace
        """,
    "interventions/tracing.py": """
        from interventions import errors
        def trace(model):
            import nnsight
        """,
    "distill/__init__.py": "from distill.tasks import load",
    "distill/losses.py": "from distill import errors",
    "distill/errors.py": "",
    "distill/tasks/__init__.py": "from distill.tasks import pvr",
    "distill/tasks/pvr.py": """
        import interventions
        from interventions import run
        from ..losses import kd
        from . import rows
        same = model.forward == interventions.run
        """,
    "distill/tasks/rows.py": "",
}


def test_a_sound_tree_passes(tmp_path):
    assert list(violations(write(tmp_path, SOUND))) == []


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("interventions/errors.py", "import distill", "interventions must not know distill"),
        ("interventions/runs.py", "def f():\n    from distill.losses import kd", "interventions must not know distill"),
        (
            "distill/losses.py",
            "from interventions.hooks import opened",
            "interventions.hooks.opened is not a public name",
        ),
        ("distill/losses.py", "import interventions.hooks", "interventions.hooks is not a public name"),
        ("distill/losses.py", "from interventions import hooks", "interventions.hooks is not a public name"),
        (
            "distill/losses.py",
            "import interventions\ninterventions.hooks.x",
            "interventions.hooks is not a public name",
        ),
        ("distill/losses.py", "from interventions import _run", "interventions._run is not a public name"),
        ("distill/losses.py", "from interventions import stop", "interventions.stop is not a public name"),
        ("interventions/errors.py", "from interventions.hooks import x", "stands after interventions.errors"),
        ("interventions/errors.py", "from .hooks import x", "stands after interventions.errors"),
        ("interventions/errors.py", "from . import hooks", "stands after interventions.errors"),
        ("interventions/errors.py", "def f():\n    import interventions.hooks", "stands after interventions.errors"),
        ("interventions/runs.py", "from interventions import run", "interventions.run stands after interventions.runs"),
        ("interventions/runs.py", "from interventions.tracing import x", "only inside a function"),
        ("interventions/hooks.py", "def f():\n    from interventions.tracing import x", "stands after"),
        ("distill/losses.py", "from distill.tasks.pvr import x", "distill.tasks.pvr.x stands after distill.losses"),
        ("distill/tasks/pvr.py", "from distill.fit import fit", "distill.fit.fit stands after distill.tasks.pvr"),
        ("distill/tasks/pvr.py", "from distill import fit", "distill.fit stands after distill.tasks.pvr"),
        (
            "distill/extra.py",
            "",
            "'extra' is in no list; add it in its place to ORDER['distill'] of tests/test_layers.py",
        ),
        ("distill/extra/part.py", "", "'extra' is in no list"),
        (
            "interventions/runs.py",
            "m.register_forward_hook(f)",
            "'register_forward_hook' belongs in interventions/hooks.py",
        ),
        ("interventions/runs.py", "m.register_forward_pre_hook(f)", "'register_forward_pre_hook' belongs in"),
        ("interventions/runs.py", "m._forward_hooks.clear()", "'_forward_hooks' belongs in"),
        ("interventions/runs.py", "m.forward = f", "'.forward =' belongs in"),
        ("interventions/runs.py", "setattr(m, 'forward', f)", "belongs in interventions/hooks.py alone"),
        ("distill/losses.py", "a.get_interface('eager', f)", "get_interface' belongs in"),
        ("interventions/tracing.py", "import nnsight", "nnsight is imported at top level"),
        ("distill/losses.py", "if True:\n    from nnsight.intervention import x", "nnsight is imported at top level"),
    ],
)
def test_each_rule_can_fail(tmp_path, file, text, message):
    found = list(violations(write(tmp_path, {**SOUND, file: text})))
    assert len(found) == 1, found
    assert found[0].startswith(file)
    assert message in found[0]


PROBE = """
import sys, torch
backward = torch.Tensor.backward
import {imported}
print("nnsight" in sys.modules, torch.Tensor.backward is backward, hasattr(object(), "save"))
"""


@pytest.mark.parametrize(
    ("imported", "expected"),
    [("interventions, distill", "False True False"), ("nnsight", "True False True")],
)
def test_importing_the_packages_patches_nothing(imported, expected):
    command = [sys.executable, "-c", PROBE.format(imported=imported)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[-2] == expected
