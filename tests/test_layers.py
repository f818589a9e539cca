"""How the two packages are built: rooms in one order, no circles, small folders, and a test for every file."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from textwrap import dedent

import pytest

REPOSITORY = Path(__file__).parents[1]
THIS_FILE = "tests/test_layers.py"

# A room is a folder, or a file at the door. It may import from those before it; `__init__` of a package stands after
# the last. Inside a room only circles are forbidden.
ORDER = {
    "interventions": """
        version
        names renames public_names errors arguments endings precision devices host_copies locations operators positions
        subspaces models metrics hooks steps execution saving tracing runs interchanges describe analysis attribution
        editing lenses exceptions __main__""".split(),
    "distill": """
        errors precision processes statistics storage causal losses networks data models writing tasks teachers
        interchange students objectives training evaluation publishing metrics monitoring alignment auditing results
        comparison fit prospects specialists mutual chain teach compat cli __main__""".split(),
}
MOST_FILES = 20
MOST_LINES = 400
MOST_LINES_OF_A_FUNCTION = 60
"""Of its code, without its docstring."""
LONG = {"unpack": "interventions/tracing/packing.py sends it to hosts whole, as source text"}
"""Functions that may be longer, and why."""
HANDING_ON = """
    interventions interventions.metrics interventions.subspaces interventions.tracing distill distill.losses
    distill.networks distill.objectives distill.tasks""".split()
"""Those whose `__init__` hands on names. Every other is a docstring: what it imports would travel to other machines."""
VERSION = "__version__"
"""Public, and in no `__all__`, as a star would import it."""
HOOKS = "interventions/hooks/"
HOOKING = re.compile(
    r"register_forward_hook|register_forward_pre_hook|_forward_hooks|\.get_interface\b"
    r"|\.forward\s*=(?!=)|setattr\([^)]*[\"']forward[\"']"
)
TRACED = "tests/interventions/tracing/test_same_numbers.py"
"""Compares what `tests/interventions/tracing/programs.py` and its neighbours compute, in processes of their own."""
TESTED_BY = {
    "interventions/__main__.py": "tests/interventions/test_describe.py",
    **{
        f"interventions/analysis/{name}.py": "tests/interventions/analysis/test_collect.py"
        for name in ("activation_shards", "collected", "progress", "vectors")
    },
    "interventions/analysis/result.py": "tests/test_results.py",
    "interventions/analysis/sweeping/batch_sweeps.py": "tests/interventions/analysis/test_sweeps.py",
    **{
        f"interventions/analysis/sweeping/{name}.py": "tests/interventions/analysis/test_data_sweeps.py"
        for name in ("data_sweeps", "example_cuts", "sweep_checkpoints")
    },
    "interventions/attribution/derivatives.py": "tests/interventions/attribution/test_attribution_patch.py",
    "interventions/attribution/edges.py": "tests/interventions/attribution/test_edge_attribution.py",
    "interventions/devices.py": "tests/interventions/execution/test_measures.py",
    "interventions/endings.py": "tests/faults/test_interrupts.py",
    "interventions/errors.py": "tests/faults/test_security.py",
    "interventions/exceptions.py": "tests/test_renames.py",
    "interventions/names.py": "tests/faults/test_security.py",
    "interventions/public_names.py": "tests/test_public_names.py",
    "interventions/renames.py": "tests/test_renames.py",
    "interventions/execution/examples.py": "tests/interventions/test_runs.py",
    **{f"interventions/execution/{name}.py": "tests/faults/test_stamps.py" for name in ("inventory", "numbers")},
    "interventions/execution/fits.py": "tests/interventions/execution/test_writes.py",
    "interventions/execution/hooked.py": "tests/interventions/test_interchanges.py",
    "interventions/execution/parts.py": "tests/interventions/execution/test_subspace_writes.py",
    "interventions/execution/requests.py": "tests/interventions/test_interchanges.py",
    "interventions/execution/run.py": "tests/interventions/test_runs.py",
    "interventions/execution/stacking.py": "tests/interventions/analysis/test_passes.py",
    "interventions/execution/stamps.py": "tests/faults/test_stale_runs.py",
    "interventions/execution/targets.py": "tests/interventions/execution/test_writes.py",
    "interventions/hooks/attention.py": "tests/interventions/hooks/test_own_attention.py",
    "interventions/hooks/attention_taps.py": "tests/interventions/hooks/test_own_attention.py",
    "interventions/hooks/compiled.py": "tests/interventions/promises/test_compiled.py",
    "interventions/hooks/methods.py": "tests/interventions/promises/test_left_alone.py",
    "interventions/hooks/replacements.py": "tests/faults/test_interrupts.py",
    "interventions/hooks/scopes.py": "tests/interventions/promises/test_only_mine.py",
    "interventions/hooks/states.py": "tests/interventions/test_forms.py",
    "interventions/hooks/taps.py": "tests/interventions/hooks/test_installation.py",
    **{
        f"interventions/lenses/{name}.py": "tests/interventions/lenses/test_logit_lens.py"
        for name in ("fit_lens", "tuned_lens")
    },
    **{
        f"interventions/metrics/{name}.py": "tests/interventions/test_metrics.py"
        for name in ("metric_targets", "metrics")
    },
    "interventions/models/attentions.py": "tests/interventions/models/test_sites.py",
    "interventions/models/block_sites.py": "tests/interventions/models/test_sites.py",
    "interventions/models/feed_forwards.py": "tests/interventions/models/test_sites.py",
    "interventions/models/forward_order.py": "tests/interventions/models/test_final_norms.py",
    "interventions/models/layers.py": "tests/interventions/models/test_stacks.py",
    "interventions/models/modules.py": "tests/interventions/models/test_architectures.py",
    "interventions/models/overrides.py": "tests/conformance/test_exceptions.py",
    "interventions/models/padding.py": "tests/interventions/models/test_sides.py",
    "interventions/models/places.py": "tests/interventions/models/test_axes.py",
    "interventions/models/wrappers.py": "tests/interventions/promises/test_parallel.py",
    "interventions/saving/encodings.py": "tests/interventions/saving/test_saving.py",
    **{
        f"interventions/subspaces/{name}.py": "tests/interventions/subspaces/test_subspaces.py"
        for name in ("masks", "pca", "rotations", "sparse", "subspace")
    },
    **{
        f"interventions/tracing/{name}.py": TRACED
        for name in "current_call edits hook_points inputs jobs operations plans sweeps verbs visits".split()
    },
    **{
        f"interventions/tracing/{name}.py": "tests/interventions/remote/test_remote.py"
        for name in ("packing", "sessions", "source_texts")
    },
    "interventions/tracing/hosts.py": "tests/faults/test_remote_answers.py",
    "interventions/tracing/vllm.py": "tests/interventions/engine/test_vllm.py",
    "interventions/tracing/vllm_architecture.py": "tests/interventions/engine/test_vllm.py",
    "interventions/tracing/vllm_requests.py": "tests/interventions/engine/test_vllm.py",
    **{
        f"distill/causal/{name}.py": "tests/distill/causal/test_model.py"
        for name in ("counterfactuals", "domains", "graph", "mechanisms", "positions", "values")
    },
    "distill/statistics/tables.py": "tests/test_results.py",
    **{f"distill/alignment/{name}.py": "tests/distill/alignment/test_align.py" for name in ("fitting", "learning")},
    "distill/alignment/crossed_interchanges.py": "tests/distill/alignment/test_search_mapping.py",
    "distill/causal/encoding.py": "tests/distill/causal/test_model.py",
    "distill/alignment/search.py": "tests/distill/alignment/test_search_alignment.py",
    **{
        f"distill/auditing/{name}.py": "tests/distill/auditing/test_audit.py"
        for name in ("controls", "differences", "interchanges", "result")
    },
    **{f"distill/auditing/{name}.py": "tests/distill/auditing/test_behaviour.py" for name in ("answers", "reading")},
    "distill/auditing/exchanges.py": "tests/distill/auditing/test_parts.py",
    "distill/auditing/pictures.py": "tests/distill/auditing/test_page.py",
    "distill/causal/feed.py": "tests/distill/objectives/test_iit.py",
    **{
        f"distill/cli/{name}.py": "tests/distill/cli/test_main.py"
        for name in ("compare evaluate fit fit_command headroom loading messages samples student_runs teach".split())
    },
    **{
        f"distill/cli/options/{name}.py": "tests/distill/cli/options/test_config.py"
        for name in ("flags", "groups", "signatures")
    },
    "distill/metrics.py": "tests/distill/evaluation/test_metrics.py",
    "distill/networks/sizes.py": "tests/faults/test_fuzz.py",
    "distill/compat/glue.py": "tests/distill/compat/test_xxs.py",
    "distill/compat/launch.py": "tests/distill/compat/test_xxs.py",
    "distill/compat/models.py": "tests/distill/compat/test_diito.py",
    "distill/compat/neurons.py": "tests/distill/compat/test_mappings.py",
    **{
        f"distill/comparison/{name}.py": "tests/distill/comparison/test_compare.py"
        for name in ("compared_figure", "compared_kinds", "comparison", "samples", "trained_students")
    },
    "distill/comparison/picture.py": "tests/test_results.py",
    "distill/data/columns.py": "tests/distill/data/test_rows.py",
    "distill/data/draws.py": "tests/distill/training/test_readings.py",
    "distill/data/sources/stream_states.py": "tests/distill/data/sources/test_stream.py",
    "distill/data/tables.py": "tests/distill/data/test_files.py",
    "distill/data/texts/reading.py": "tests/distill/data/texts/test_language.py",
    "distill/data/token_meanings.py": "tests/distill/data/test_token_alignment.py",
    "distill/data/trained_on.py": "tests/faults/test_splits.py",
    "distill/errors.py": "tests/faults/test_security.py",
    "distill/evaluation/controls.py": "tests/distill/evaluation/test_variable_accuracy.py",
    "distill/evaluation/drawn_positions.py": "tests/distill/evaluation/test_interchange_accuracy.py",
    "distill/evaluation/interchange_result.py": "tests/distill/evaluation/test_outcome.py",
    "distill/evaluation/network_interchanges.py": "tests/distill/evaluation/test_interchange_accuracy.py",
    "distill/evaluation/network_runs.py": "tests/distill/evaluation/test_interchange_accuracy.py",
    "distill/interchange/attention_keys.py": "tests/distill/test_every_site.py",
    "distill/interchange/real_positions.py": "tests/distill/evaluation/test_interchange_accuracy.py",
    "distill/interchange/swap.py": "tests/distill/evaluation/test_variable_accuracy.py",
    "distill/interchange/vacuous.py": "tests/distill/evaluation/test_interchange_accuracy.py",
    "distill/interchange/whole_state.py": "tests/distill/evaluation/test_variable_accuracy.py",
    "distill/losses/common.py": "tests/distill/losses/test_laws.py",
    "distill/models/class_labels.py": "tests/distill/evaluation/test_metrics.py",
    "distill/models/class_names.py": "tests/distill/data/test_classes.py",
    "distill/models/finite.py": "tests/faults/test_figures_of_nothing.py",
    "distill/models/loss_masks.py": "tests/distill/objectives/test_loss_mask.py",
    "distill/models/modes.py": "tests/distill/models/test_token_positions.py",
    "distill/models/numbering.py": "tests/distill/data/test_classes.py",
    "distill/models/pretrained.py": "tests/distill/test_teach.py",
    "distill/models/reinitialized.py": "tests/distill/evaluation/test_variable_accuracy.py",
    "distill/networks/lstm.py": "tests/distill/networks/test_tokens.py",
    "distill/networks/transformer.py": "tests/distill/networks/test_tokens.py",
    "distill/objectives/answers.py": "tests/distill/objectives/test_response.py",
    "distill/objectives/das.py": "tests/distill/alignment/test_align.py",
    "distill/objectives/memories.py": "tests/distill/objectives/test_contrastive.py",
    "distill/objectives/objective.py": "tests/distill/objectives/test_loss_mask.py",
    "distill/objectives/points.py": "tests/distill/objectives/test_derivatives.py",
    "distill/objectives/regressors.py": "tests/distill/objectives/test_features.py",
    "distill/objectives/step.py": "tests/distill/objectives/test_loss_mask.py",
    "distill/objectives/term_weights.py": "tests/distill/training/test_schedule.py",
    "distill/__main__.py": "tests/distill/cli/test_together.py",
    "distill/processes.py": "tests/distill/cli/test_together.py",
    **{
        f"distill/prospects/{name}.py": "tests/distill/prospects/test_headroom.py"
        for name in ("causal_terms", "gradients", "void_rows")
    },
    "distill/results.py": "tests/distill/cli/test_report.py",
    "distill/storage/files.py": "tests/faults/test_corruption.py",
    "distill/storage/pages.py": "tests/distill/cli/test_report.py",
    "distill/storage/locks.py": "tests/faults/test_two_at_once.py",
    **{
        f"distill/students/{name}.py": "tests/distill/students/test_importance.py"
        for name in ("kept_units", "layer_search", "ranking", "readings")
    },
    "distill/tasks/language.py": "tests/distill/data/texts/test_language.py",
    "distill/tasks/causal/equality.py": "tests/distill/causal/test_model.py",
    "distill/tasks/causal/mqnli_files.py": "tests/distill/tasks/causal/test_mqnli.py",
    "distill/tasks/causal/trees.py": "tests/distill/causal/test_model.py",
    **{
        f"distill/teachers/{name}.py": "tests/distill/teachers/test_served.py"
        for name in """facts fetching model_inputs padding retries served_checks shapes top_k uncacheable verbs
            visible_positions""".split()
    },
    **{
        f"distill/teachers/endpoints/{name}.py": "tests/distill/teachers/endpoints/test_endpoint.py"
        for name in ("completions", "token_texts")
    },
    **{
        f"distill/monitoring/{name}.py": "tests/distill/monitoring/test_monitor.py"
        for name in ("callbacks", "figures", "held_out")
    },
    **{f"distill/training/{name}.py": "tests/distill/monitoring/test_monitor.py" for name in ("after_step", "watches")},
    "distill/training/checks.py": "tests/distill/training/test_loop.py",
    "distill/training/computation.py": "tests/distill/training/test_accumulation.py",
    "distill/training/kept_answers.py": "tests/distill/teachers/test_cached_fit.py",
    "distill/training/fingerprints.py": "tests/faults/test_changes.py",
    "distill/training/gradients.py": "tests/distill/training/test_loop.py",
    "distill/training/mutual_computation.py": "tests/distill/test_mutual.py",
}
"""Files without a test file of their name, and the one that tests them."""


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

    @property
    def is_folder(self) -> bool:
        return self.path.name == "__init__.py"


@dataclass(frozen=True)
class Tree:
    """The files of both packages below a root, and what each imports."""

    root: Path

    @cached_property
    def modules(self) -> dict[str, Module]:
        found = {}
        for package in ORDER:
            for path in sorted((self.root / package).rglob("*.py")):
                parts = path.relative_to(self.root).with_suffix("").parts
                name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                found[name] = Module(path, name, ast.parse(path.read_text(encoding="utf-8")))
        return found

    @cached_property
    def imports(self) -> dict[str, list[Import]]:
        return {name: list(imports(module, self.modules)) for name, module in self.modules.items()}

    @cached_property
    def public(self) -> set[str] | None:
        """The public names of interventions, or None where it does not say."""
        return exported(self.modules["interventions"]) if "interventions" in self.modules else None

    def file_of(self, target: str) -> str | None:
        """The module that an import of `package.name` loads last: the name, if that is a file, or what has it."""
        return next((name for name in (target, target.rpartition(".")[0]) if name in self.modules), None)

    def where(self, module: Module) -> str:
        return module.path.relative_to(self.root).as_posix()


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
    folder = module.name.split(".") if module.is_folder else module.name.split(".")[:-1]
    return ".".join([*folder[: len(folder) - node.level + 1], *([node.module] if node.module else [])])


def place(target: str) -> int:
    """Where in its package's list a module's room stands; a name that is in no room is the package's own."""
    package, _, rest = target.partition(".")
    order, room = ORDER[package], rest.split(".")[0]
    return order.index(room) if room in order else len(order)


def exported(init: Module) -> set[str] | None:
    """The names in `__all__`, or None where there is none."""
    for node in init.tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return set(ast.literal_eval(node.value))
    return None


def violations(root: Path) -> Iterator[str]:
    tree = Tree(root)
    for name, module in tree.modules.items():
        at = tree.where(module)
        room = name.split(".")[1] if "." in name else None
        if room is not None and room not in ORDER[module.package]:
            yield f"{at}: {room!r} is in no list; add it in its place to ORDER[{module.package!r}] of {THIS_FILE}"
            continue
        for found in tree.imports[name]:
            yield from (f"{at}:{found.line}: {broken}" for broken in broken_rules(module, found, tree))
        if not at.startswith(HOOKS):
            for number, line in enumerate(module.path.read_text(encoding="utf-8").splitlines(), 1):
                if match := HOOKING.search(line):
                    yield f"{at}:{number}: {match[0]!r} belongs in {HOOKS} alone"
        if module.is_folder:
            yield from (f"{at}: {broken}" for broken in broken_by_folder(module))


def broken_rules(module: Module, found: Import, tree: Tree) -> Iterator[str]:
    package = found.target.split(".")[0]
    name = found.target.partition(".")[2]
    if package == "nnsight" and not found.lazy:
        yield "nnsight is imported at top level; import it in the function that needs it"
    if package == "nnsight" and not module.name.startswith("interventions.tracing"):
        yield "nnsight is imported outside of interventions/tracing/"
    if module.package == "interventions" and package == "distill":
        yield "interventions must not know distill"
    if module.package == "distill" and package == "interventions" and name:
        hidden = "." in name or found.target in tree.modules or (name.startswith("_") and name != VERSION)
        if hidden or (tree.public is not None and name not in {*tree.public, VERSION}):
            yield f"{found.target} is not a public name of interventions; import one of its __init__.py"
    if module.package == package and place(found.target) > place(module.name):
        yield f"{found.target} stands after {module.name} in the list of {package}"


def broken_by_folder(module: Module) -> Iterator[str]:
    files = len(list(module.path.parent.glob("*.py")))
    if files > MOST_FILES:
        yield f"{files} files are in one folder, more than {MOST_FILES}; make a room for some of them"
    if module.name not in HANDING_ON and not (len(module.tree.body) == 1 and ast.get_docstring(module.tree)):
        yield f"holds more or less than a docstring; say what the folder is for, or add it to HANDING_ON of {THIS_FILE}"


def too_long(root: Path) -> Iterator[str]:
    """Files, and functions without their docstrings, of more lines than a reader keeps in mind."""
    for package in ORDER:
        for path in sorted((root / package).rglob("*.py")):
            where, text = path.relative_to(root), path.read_text(encoding="utf-8")
            if (lines := len(text.splitlines())) > MOST_LINES:
                yield f"{where}: {lines} lines, more than {MOST_LINES}; make two files that say what they hold"
            for node in ast.walk(ast.parse(text)):
                if not isinstance(node, ast.FunctionDef) or node.name in LONG:
                    continue
                if (lines := length_of(node)) > MOST_LINES_OF_A_FUNCTION:
                    yield f"{where}: {node.name} has {lines} lines, more than {MOST_LINES_OF_A_FUNCTION}; split it"


def length_of(function: ast.FunctionDef) -> int:
    """The lines of a function without its docstring."""
    first = function.body[0]
    documented = ast.get_docstring(function) is not None
    return function.end_lineno - function.lineno + 1 - (first.end_lineno - first.lineno + 1 if documented else 0)


def circles(root: Path) -> Iterator[str]:
    """Files that import each other, inside functions too; each stands before what it imports."""
    tree = Tree(root)
    graph = {
        name: sorted({file for found in each if (file := tree.file_of(found.target)) and file != name})
        for name, each in tree.imports.items()
    }
    done: set[str] = set()

    def follow(name: str, path: tuple[str, ...]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        found = next((circle for each in graph[name] if (circle := follow(each, (*path, name)))), None)
        done.add(name)
        return found

    for start in graph:
        if circle := follow(start, ()):
            yield f"{tree.where(tree.modules[circle[0]])} imports in a circle: {' → '.join(circle)}"


def untested(root: Path) -> Iterator[str]:
    """Files without a test file of their name that `TESTED_BY` does not name, and what it names in vain."""
    for module in Tree(root).modules.values():
        at = module.path.relative_to(root)
        own, given = Path("tests", at.parent, f"test_{at.name}"), TESTED_BY.get(at.as_posix())
        if module.is_folder:
            continue
        if (root / own).exists() and given is not None:
            yield f"{at.as_posix()}: has a test file of its name; take it out of TESTED_BY of {THIS_FILE}"
        elif not (root / (given or own)).exists():
            yield f"{at.as_posix()}: no tests; write {own.as_posix()}, or name others in TESTED_BY of {THIS_FILE}"
    yield from (f"{at}: does not exist; take it out of TESTED_BY" for at in TESTED_BY if not (root / at).exists())


def test_the_packages_keep_to_the_rules():
    assert not list(violations(REPOSITORY))


def test_no_files_import_each_other():
    assert not list(circles(REPOSITORY))


def test_no_file_or_function_is_too_long():
    assert not list(too_long(REPOSITORY))


def test_what_is_too_long_is_found(tmp_path):
    lines = "\n".join(f"    a{number} = 0" for number in range(MOST_LINES_OF_A_FUNCTION))
    long_text = "\n".join(["a = 0"] * (MOST_LINES + 1))
    (tmp_path / "distill").mkdir()
    (tmp_path / "distill/a.py").write_text(f'def f():\n    """One.\n\n    More.\n    """\n{lines}\n')
    (tmp_path / "distill/b.py").write_text(long_text)
    found = list(too_long(tmp_path))
    assert [each.split(",")[0] for each in found] == ["distill/a.py: f has 61 lines", "distill/b.py: 401 lines"]
    (tmp_path / "distill/a.py").write_text(f'def f():\n    """One."""\n{lines[lines.index(chr(10)) + 1 :]}\n')
    assert len(list(too_long(tmp_path))) == 1


def test_every_file_is_tested():
    assert not list(untested(REPOSITORY))


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text), encoding="utf-8")
    return root


SOUND = {
    "interventions/__init__.py": """
        from interventions.hooks.hooks import opened
        from interventions.runs import run
        __all__ = ["opened", "run"]
        """,
    "interventions/errors.py": "",
    "interventions/hooks/__init__.py": '"""What touches a model."""',
    "interventions/hooks/hooks.py": """
        from interventions.errors import E
        from interventions.hooks import states
        def opened(m):
            m.register_forward_hook(print)
            m.forward = m._forward_hooks
        """,
    "interventions/hooks/states.py": "",
    "interventions/runs.py": """
        from .hooks.hooks import opened
        def run(model):
            from interventions.tracing import trace
        """,
    "interventions/tracing/__init__.py": "from interventions.tracing.verbs import trace",
    "interventions/tracing/verbs.py": """
        from interventions import errors
        def trace(model):
            import nnsight
        """,
    "distill/__init__.py": "from distill.tasks import load",
    "distill/losses/__init__.py": "from distill.losses.kd import kd",
    "distill/losses/kd.py": "from distill import errors",
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
    assert list(circles(tmp_path)) == []


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("interventions/errors.py", "import distill.errors", "interventions must not know distill"),
        ("interventions/runs.py", "def f():\n    from distill.losses import kd", "interventions must not know distill"),
        (
            "distill/losses/kd.py",
            "from interventions.hooks.hooks import opened",
            "interventions.hooks.hooks.opened is not a public name",
        ),
        ("distill/losses/kd.py", "import interventions.hooks", "interventions.hooks is not a public name"),
        ("distill/losses/kd.py", "from interventions import hooks", "interventions.hooks is not a public name"),
        (
            "distill/losses/kd.py",
            "import interventions\ninterventions.hooks.x",
            "interventions.hooks is not a public name",
        ),
        ("distill/losses/kd.py", "from interventions import _run", "interventions._run is not a public name"),
        ("distill/losses/kd.py", "from interventions import stop", "interventions.stop is not a public name"),
        ("interventions/hooks/states.py", "from interventions.runs import x", "stands after interventions.hooks"),
        ("interventions/hooks/states.py", "from ..runs import x", "stands after interventions.hooks"),
        ("interventions/hooks/states.py", "from .. import runs", "stands after interventions.hooks"),
        (
            "interventions/hooks/states.py",
            "def f():\n    import interventions.runs",
            "stands after interventions.hooks",
        ),
        ("interventions/tracing/verbs.py", "from interventions import run", "interventions.run stands after"),
        ("interventions/tracing/verbs.py", "def f():\n    from interventions.runs import x", "stands after"),
        (
            "distill/losses/kd.py",
            "from distill.tasks.rows import x",
            "distill.tasks.rows.x stands after distill.losses",
        ),
        ("distill/tasks/rows.py", "from distill.fit import fit", "distill.fit.fit stands after distill.tasks.rows"),
        ("distill/tasks/rows.py", "from distill import fit", "distill.fit stands after distill.tasks.rows"),
        (
            "distill/extra.py",
            "",
            "'extra' is in no list; add it in its place to ORDER['distill'] of tests/test_layers.py",
        ),
        ("distill/extra/part.py", "", "'extra' is in no list"),
        (
            "interventions/runs.py",
            "m.register_forward_hook(f)",
            "'register_forward_hook' belongs in interventions/hooks/ alone",
        ),
        ("interventions/runs.py", "m.register_forward_pre_hook(f)", "'register_forward_pre_hook' belongs in"),
        ("interventions/runs.py", "m._forward_hooks.clear()", "'_forward_hooks' belongs in"),
        ("interventions/runs.py", "m.forward = f", "'.forward =' belongs in"),
        ("interventions/runs.py", "setattr(m, 'forward', f)", "belongs in interventions/hooks/ alone"),
        ("distill/losses/kd.py", "a.get_interface('eager', f)", "get_interface' belongs in"),
        ("interventions/tracing/verbs.py", "import nnsight", "nnsight is imported at top level"),
        ("interventions/tracing/verbs.py", "if True:\n    from nnsight.x import y", "nnsight is imported at top level"),
        ("distill/tasks/rows.py", "def f():\n    import nnsight", "outside of interventions/tracing/"),
        ("interventions/hooks/__init__.py", "", "holds more or less than a docstring"),
        (
            "interventions/hooks/__init__.py",
            '"""What touches a model."""\nfrom interventions.errors import E',
            "holds more or less than a docstring",
        ),
    ],
)
def test_each_rule_can_fail(tmp_path, file, text, message):
    found = list(violations(write(tmp_path, {**SOUND, file: text})))
    assert len(found) == 1, found
    assert found[0].startswith(file)
    assert message in found[0]


@pytest.mark.parametrize(
    "text",
    [
        "from interventions.hooks.hooks import opened",
        "from interventions.hooks import hooks",
        "from . import hooks",
        "def f():\n    from interventions.hooks.hooks import opened",
    ],
)
def test_two_files_of_a_room_do_not_import_each_other(tmp_path, text):
    found = list(circles(write(tmp_path, {**SOUND, "interventions/hooks/states.py": text})))
    assert found == [
        "interventions/hooks/hooks.py imports in a circle: "
        "interventions.hooks.hooks → interventions.hooks.states → interventions.hooks.hooks"
    ]
    assert list(violations(tmp_path)) == []


def test_a_file_does_not_import_what_its_folder_hands_on(tmp_path):
    found = list(circles(write(tmp_path, {**SOUND, "distill/losses/kd.py": "from distill.losses import x"})))
    assert len(found) == 1
    assert "in a circle: distill.losses.kd → distill.losses → distill.losses.kd" in found[0]


def test_a_folder_of_too_many_files(tmp_path):
    few = {f"distill/tasks/a{number}.py": "" for number in range(MOST_FILES - 3)}
    assert list(violations(write(tmp_path, {**SOUND, **few}))) == []
    found = list(violations(write(tmp_path, {"distill/tasks/more.py": ""})))
    assert found == [f"distill/tasks/__init__.py: {MOST_FILES + 1} files are in one folder, more than {MOST_FILES}; "
                     "make a room for some of them"]  # fmt: skip


def test_a_file_without_tests_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "TESTED_BY", {"distill/tasks/rows.py": "tests/test_x.py"})
    files = {"distill/tasks/rows.py": "", "distill/tasks/__init__.py": "", "distill/tasks/pvr.py": ""}
    write(tmp_path, {**files, "tests/distill/tasks/test_pvr.py": "", "tests/test_x.py": ""})
    assert list(untested(tmp_path)) == []
    write(tmp_path, {"distill/fit.py": "", "tests/distill/tasks/test_rows.py": ""})
    found = list(untested(tmp_path))
    assert [each.split(":")[0] for each in found] == ["distill/fit.py", "distill/tasks/rows.py"]
    assert "no tests; write tests/distill/test_fit.py, or name others" in found[0]
    assert "has a test file of its name; take it out" in found[1]
    (tmp_path / "tests/distill/tasks/test_rows.py").unlink()
    (tmp_path / "tests/test_x.py").unlink()
    assert "distill/tasks/rows.py: no tests; write" in list(untested(tmp_path))[-1]


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


def test_the_picture_of_the_floors_shows_the_rooms_in_their_order():
    """A room of the first picture stands above those that it may import."""
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = text[text.index("```mermaid") : text.index("```\n\n|")]
    for package, order in ORDER.items():
        drawn = picture[picture.index(f"subgraph {package}\n") :].partition("    end\n")[0]
        floors = [floor.split(" · ") for floor in re.findall(r'\["([^"]+)"\]', drawn)]
        names = [name for floor in floors for name in floor]
        assert sorted(names) == sorted(name for name in order if name != "__main__")
        height = {name: number for number, floor in enumerate(floors) for name in floor}
        assert all(height[a] <= height[b] for a, b in pairwise(order) if b != "__main__")
