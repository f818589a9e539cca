"""Compare what is in a wheel with the sources: every file of both packages, and nothing else.

python -m tests.packaging.contents WHEEL FOLDER
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

PACKAGES = ("distill", "interventions")


def differences(wheel: Path, folder: Path) -> Iterator[str]:
    """Yield a line for each file that is in one of them alone.

    Args:
        wheel: the file.
        folder: the sources that it was built from, without files that running them leaves behind.
    """
    with ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    present = {path for package in PACKAGES for path in (folder / package).rglob("*") if path.is_file()}
    sources = {path.relative_to(folder).as_posix() for path in present}
    yield from (f"{name} is not in the wheel; see package-data in pyproject.toml" for name in sorted(sources - packed))
    yield from (f"{name} is in the wheel, and no source of a package" for name in sorted(packed - sources))


if __name__ == "__main__":
    found = list(differences(Path(sys.argv[1]), Path(sys.argv[2])))
    sys.exit("\n".join(found) or 0)
