"""The site and the pages it is made of: every public name on one page, links that lead somewhere, a strict build."""

import re
import subprocess
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).parents[1]
PAGES = sorted((REPOSITORY / "docs" / "reference").glob("*.md"))
WRITTEN = sorted([*(REPOSITORY / "docs").rglob("*.md"), *REPOSITORY.glob("*.md")])
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!\w+:)([^)\s#]*)(?:#([^)\s]+))?\)")


def entries() -> ModuleType:
    """Import the script that writes the summaries of the reference."""
    spec = spec_from_file_location("reference_entries", REPOSITORY / "docs" / "reference_entries.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(path: Path) -> set[str]:
    """Return the anchors that a code host gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(path: Path, text: str) -> list[str]:
    """Return the links of a page that lead to no file, or to no heading of it."""
    found = []
    for target, anchor in LINK.findall(FENCED.sub("", text)):
        there = (path.parent / target).resolve() if target else path
        if not there.exists() or (anchor and there.suffix == ".md" and anchor not in anchors(there)):
            found.append(f"{target}#{anchor}" if anchor else target)
    return found


def test_every_public_name_is_on_one_page_of_the_reference():
    script = entries()
    listed = [name for page in PAGES for name in script.ENTRY.findall(page.read_text(encoding="utf-8"))]
    assert sorted(listed) == sorted(script.public_names()), "add '- `name`: …' to a page of docs/reference/"


def test_the_summaries_are_those_of_the_docstrings():
    script = entries()
    names = script.public_names()
    old = [
        page.name
        for page in PAGES
        if script.renewed(page.read_text(encoding="utf-8"), names) != page.read_text(encoding="utf-8")
    ]
    assert old == [], "run: python docs/reference_entries.py"


def test_a_summary_that_is_not_that_of_the_docstring_is_seen():
    script = entries()
    assert "another" not in script.renewed("- `interventions.run`: another.", script.public_names())


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_links_lead_somewhere_on_a_code_host(path: Path):
    assert broken(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("link", ["[a](nowhere.md)", "[a](glossary.md#nowhere)", "[a](#nowhere)"])
def test_a_broken_link_is_seen(link: str):
    assert broken(REPOSITORY / "docs" / "index.md", link)


@pytest.mark.skipif(find_spec("mkdocs_jupyter") is None, reason="needs the extra docs")
def test_the_site_is_built_without_a_warning(tmp_path: Path):
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    home = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "https://fonts." not in home
    assert 'id="interventions.run"' in (tmp_path / "site" / "reference" / "running" / "index.html").read_text("utf-8")
    assert "data-filter" in (tmp_path / "site" / "conformance" / "index.html").read_text("utf-8")
