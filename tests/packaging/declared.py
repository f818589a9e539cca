"""Fill an environment with what a wheel declares: links to the packages of this environment, and to no others.

python -m tests.packaging.declared WHEEL PYTHON
"""

import subprocess
import sys
from collections.abc import Iterable, Iterator
from email import message_from_bytes
from importlib.metadata import PathDistribution, distribution
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SITE = "import sysconfig; print(sysconfig.get_path('purelib'))"


def requirements_of(wheel: Path) -> list[Requirement]:
    """Return what a wheel requires, with and without extras."""
    with ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return [Requirement(line) for line in message_from_bytes(archive.read(name)).get_all("Requires-Dist", [])]


def closure(requirements: Iterable[Requirement], extras: Iterable[str] = ("",)) -> dict[str, PathDistribution]:
    """Return all distributions that are required, directly or by others: {name: the one that is installed here}.

    Args:
        requirements: of the package itself.
        extras: those that are chosen.

    Raises:
        PackageNotFoundError: one of them is not installed here.
    """
    found: dict[str, PathDistribution] = {}
    seen: set[tuple[str, str]] = set()

    def follow(needed: Iterable[Requirement], chosen: Iterable[str]) -> None:
        for each in needed:
            if each.marker and not any(each.marker.evaluate({"extra": extra}) for extra in chosen):
                continue
            name = canonicalize_name(each.name)
            wanted = {"", *each.extras}
            if {(name, extra) for extra in wanted} <= seen:
                continue
            seen.update((name, extra) for extra in wanted)
            installed = found.setdefault(name, distribution(each.name))
            follow(map(Requirement, installed.requires or ()), wanted)

    follow(requirements, tuple(extras))
    return found


def files_of(installed: PathDistribution) -> Iterator[Path]:
    """Yield the files and folders of a distribution at the top of its site-packages."""
    names = {path.parts[0] for path in installed.files or ()} - {"..", "__pycache__"}
    yield from (Path(str(installed.locate_file(name))) for name in sorted(names))


def link(found: Iterable[PathDistribution], site: Path) -> None:
    """Link the files of distributions into a folder of packages."""
    for each in found:
        for path in files_of(each):
            if not (site / path.name).exists():
                (site / path.name).symlink_to(path)


if __name__ == "__main__":
    site = subprocess.run([sys.argv[2], "-c", SITE], capture_output=True, text=True, check=True).stdout.strip()
    link(closure(requirements_of(Path(sys.argv[1]))).values(), Path(site))
