"""Write where the repository is into what a package index shows: the links of README.md, and the project's addresses.

    python -m tests.packaging.addresses FOLDER HOME_PAGE REVISION

The checkout itself names no address: its links are relative, so that they lead to the same revision in every clone and
fork. A page of PyPI has no files beside it, so a copy of the sources is changed before a release is built from it.
"""

import re
import sys
from pathlib import Path

LINK = re.compile(r"(?<=\]\()(?!#|[a-z]+:)([^)\s]+)(?=[)\s])")
"""What a link of Markdown leads to, where that is a file of the repository."""
SHOWN = ("png", "svg", "gif", "jpg")
ADDRESSES = """
[project.urls]
Homepage = "{home}"
Documentation = "{home}/tree/{revision}/docs"
Changelog = "{home}/blob/{revision}/CHANGELOG.md"
Source = "{home}"
Issues = "{home}/issues"
"""


def absolute(text: str, home: str, revision: str) -> str:
    """Return a text of Markdown whose links to files of the repository are addresses.

    >>> absolute("[words](docs/glossary.md#iia), [here](#top), [out](https://example.org)", "https://host/me/it", "v1")
    '[words](https://host/me/it/blob/v1/docs/glossary.md#iia), [here](#top), [out](https://example.org)'
    """

    def address(match: re.Match[str]) -> str:
        path, _, part = match[1].partition("#")
        kind = "raw" if path.endswith(SHOWN) else "blob"
        return f"{home}/{kind}/{revision}/{path}{f'#{part}' if part else ''}"

    return LINK.sub(address, text)


def write_addresses(folder: Path, home: str, revision: str) -> None:
    """Change README.md and pyproject.toml in a copy of the sources."""
    home = home.rstrip("/")
    readme, project = folder / "README.md", folder / "pyproject.toml"
    readme.write_text(absolute(readme.read_text(encoding="utf-8"), home, revision), encoding="utf-8")
    written = project.read_text(encoding="utf-8") + ADDRESSES.format(home=home, revision=revision)
    project.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    write_addresses(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
