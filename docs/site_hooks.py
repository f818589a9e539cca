"""Make the site of what lies in the repository: pages outside of `docs/`, their links, and the API reference."""

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md")
FOLDERS = ("tutorials", "benchmarks")
SHOWN = {".ipynb", ".json", ".png"}
ENTRY = re.compile(r"^- `([\w.]+)`: .*$", re.MULTILINE)
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
CODE = re.compile(r"\[([^\]]*)\]\(([^)\s]+\.py)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages, tutorials and results that lie beside `docs/`, under their paths in the repository."""
    beside = [REPOSITORY / name for name in PAGES]
    for folder in FOLDERS:
        beside += sorted(path for path in (REPOSITORY / folder).iterdir() if path.suffix in SHOWN)
    for path in beside:
        name = path.relative_to(REPOSITORY).as_posix()
        files.append(File(name, str(REPOSITORY), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn entries of the reference into documentation, and links of the repository into links of the site."""
    source = page.file.src_uri
    if source.startswith("reference/"):
        markdown = ENTRY.sub(r"::: \1", markdown)
    if source == "conformance.md":
        head, table = markdown.split("| model type |", 1)
        rows, _, rest = table.partition("\n\n")
        box = '<div markdown="1" data-filter="Filter by model type, class, modality, law …">'
        markdown = f"{head}{box}\n\n| model type |{rows}\n\n</div>\n\n{rest}"
    at = PurePosixPath("docs", source) if Path(config.docs_dir, source).exists() else PurePosixPath(source)
    markdown = CODE.sub(lambda found: f"`{normpath(at.parent / found[2])}`", markdown)
    return LINK.sub(lambda found: _link(found, at, source), markdown)


def _link(found: re.Match[str], at: PurePosixPath, source: str) -> str:
    """Return the link of a page of the site to what a link of the repository leads to."""
    path = normpath(at.parent / found[1])
    inside = path.removeprefix("docs/")
    return relpath(inside, PurePosixPath(source).parent.as_posix()) + (found[2] or "")
