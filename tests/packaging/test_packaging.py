"""What a package index, a citation and a user's pip read: the names, versions, files and links of the distribution.

`.ci/wheel` builds the wheel and tries it; these tests hold its parts, and what can be known without a build.
"""

import ast
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from importlib.metadata import packages_distributions
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from interventions import __version__
from tests.packaging.addresses import LINK, absolute, write_addresses
from tests.packaging.contents import PACKAGES, differences
from tests.packaging.declared import closure, files_of, link, requirements_of
from tests.packaging.expected_errors import found, named

REPOSITORY = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
METADATA = PROJECT["project"]
HOME, REVISION = "https://host.example/me/it", "v1.2"
OPTIONAL = {"peft", "vllm"}
"""Imported where they are installed and needed, and required by none."""


def test_each_package_ships_its_types():
    for package in PACKAGES:
        assert (REPOSITORY / package / "py.typed").read_text() == ""


def test_every_file_of_a_package_is_packed():
    """By the patterns of package-data, which a new kind of file needs to be in."""
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["*"]
    files = [path for package in PACKAGES for path in (REPOSITORY / package).rglob("*") if path.is_file()]
    others = [path.name for path in files if path.suffix not in (".py", ".pyc")]
    assert others
    assert [name for name in others if not any(fnmatch(name, pattern) for pattern in patterns)] == []


def test_citation_version_and_pythons_agree():
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0"
    assert cited["version"] == METADATA["version"] == __version__
    assert cited["license"] == METADATA["license"]
    assert [each["name"] for each in cited["authors"]] == [each["name"] for each in METADATA["authors"]]
    assert f"## [{METADATA['version']}]" in (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    pythons = [each for each in METADATA["classifiers"] if re.search(r":: 3\.\d+$", each)]
    assert METADATA["requires-python"] == f">={pythons[0].rpartition(' ')[2]}"
    assert "Typing :: Typed" in METADATA["classifiers"]


def test_links_of_the_readme_lead_to_files_and_become_addresses(tmp_path):
    for name in ("README.md", "pyproject.toml"):
        (tmp_path / name).write_text((REPOSITORY / name).read_text(encoding="utf-8"), encoding="utf-8")
    paths = [each.partition("#")[0] for each in LINK.findall((tmp_path / "README.md").read_text(encoding="utf-8"))]
    assert len(paths) > 10
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []
    write_addresses(tmp_path, f"{HOME}/", REVISION)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert LINK.findall(text) == []
    assert all(f"]({HOME}/blob/{REVISION}/{path}" in text for path in paths)
    urls = tomllib.loads((tmp_path / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    assert urls["Homepage"] == HOME
    assert urls["Changelog"] == f"{HOME}/blob/{REVISION}/CHANGELOG.md"
    assert "urls" not in METADATA, "the checkout names no address: it may be a fork"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("![a](docs/a.png)", f"![a]({HOME}/raw/{REVISION}/docs/a.png)"),
        ('[a](docs/a.md "title")', f'[a]({HOME}/blob/{REVISION}/docs/a.md "title")'),
        ("[a](mailto:me@host.example) [b](#b)", "[a](mailto:me@host.example) [b](#b)"),
    ],
)
def test_addresses(text, expected):
    assert absolute(text, HOME, REVISION) == expected


def imported(path: Path) -> set[str]:
    """The packages of others that a file imports, at its top or in a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names} - {*sys.stdlib_module_names, *PACKAGES}


def test_what_is_imported_is_required():
    """Each import leads to a distribution that is required, by the packages or by what they require."""
    required = closure(map(Requirement, METADATA["dependencies"]))
    homes = packages_distributions()
    names = {name for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py") for name in imported(path)}
    assert {"torch", "sklearn", "yaml"} <= names
    missing = {name for name in names if required.keys().isdisjoint(map(canonicalize_name, homes.get(name, ())))}
    assert missing <= OPTIONAL, f"{missing - OPTIONAL} are required nowhere; add them to dependencies in pyproject.toml"


def test_requirements_follow_extras_and_markers():
    plain = closure([Requirement("accelerate"), Requirement("no-such-thing; python_version < '3'")])
    assert {"accelerate", "torch", "numpy"} <= plain.keys()
    assert "no-such-thing" not in plain
    assert "pytest" not in closure(map(Requirement, METADATA["dependencies"]))
    assert "pytest" in closure([Requirement("causal-distillation[test]")])


def test_an_environment_has_what_is_declared_alone(tmp_path):
    link(closure([Requirement("einops")]).values(), tmp_path)
    assert {"einops"} <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "torch").exists()
    assert all(path.exists() for path in files_of(closure([Requirement("torch")])["torch"]))
    program = "import sys, einops; print(einops.__file__); import torch"
    command = [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {program}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.startswith(str(tmp_path))
    assert "No module named 'torch'" in done.stderr


def test_files_of_a_wheel_are_those_of_the_packages(tmp_path):
    for name in ("distill/a.py", "distill/py.typed", "interventions/b.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    with ZipFile(tmp_path / "it.whl", "w") as archive:
        for name in ("distill/a.py", "interventions/b.py", "tests/test_a.py"):
            archive.writestr(name, "")
        archive.writestr("it-1.dist-info/METADATA", "Name: it\nRequires-Dist: torch\nRequires-Dist: x; extra == 'y'\n")
    assert [line.split(" ")[0] for line in differences(tmp_path / "it.whl", tmp_path)] == [
        "distill/py.typed",
        "tests/test_a.py",
    ]
    assert [each.name for each in requirements_of(tmp_path / "it.whl")] == ["torch", "x"]


def test_errors_of_mypy_are_compared_by_file_line_and_kind():
    assert named("b.py", "x = 1\ny = f()  # call-arg\n# not: one\n") == {("b.py", 2, "call-arg")}
    assert found('a/b.py:2: error: Missing "x"  [call-arg]\nFound 1 error in 1 file\n') == {("b.py", 2, "call-arg")}
    here = Path(__file__).parent
    assert named("sound_code.py", (here / "sound_code.py").read_text()) == set()
    assert len(named("mistaken_code.py", (here / "mistaken_code.py").read_text())) > 5


def test_a_release_is_what_was_tried():
    """The job that builds runs .ci/wheel; the one that uploads has no sources, no password, and one permission."""
    workflow = yaml.safe_load((REPOSITORY / ".github/workflows/release.yml").read_text(encoding="utf-8"))
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    assert ".ci/wheel dist" in [step.get("run") for step in build["steps"]]
    assert publish["needs"] == "build"
    assert publish["permissions"] == {"id-token": "write"}
    uses = [step.get("uses", "").partition("@")[0] for step in publish["steps"]]
    assert uses == ["actions/download-artifact", "pypa/gh-action-pypi-publish"]
    assert "password" not in str(publish)
    assert "bash .ci/run" in str(yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text(encoding="utf-8")))
    assert ".ci/wheel" in (REPOSITORY / ".ci/run").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_forms_of_issues_can_be_filled_in(name):
    form = yaml.safe_load((REPOSITORY / f".github/ISSUE_TEMPLATE/{name}.yml").read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= form.keys()
    fields = [each["id"] for each in form["body"]]
    assert len(set(fields)) == len(fields) > 2
    assert all(each["attributes"]["label"] for each in form["body"])
