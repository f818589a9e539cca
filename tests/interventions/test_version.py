"""The version of both packages, and of packages that are on the path without having been installed."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from shutil import copytree

import interventions
from interventions.version import DISTRIBUTION, installed_version


def test_the_version_is_that_of_the_distribution():
    assert interventions.__version__ == installed_version() == metadata.version(DISTRIBUTION)


def test_packages_that_are_only_on_the_path_have_a_version(tmp_path):
    """A checkout on PYTHONPATH, in an environment that knows no distribution of it."""
    copytree(Path(interventions.__file__).parent, tmp_path / "interventions")
    program = "import sys; sys.path.insert(0, sys.argv[1]); import interventions; print(interventions.__version__)"
    command = [sys.executable, "-I", "-S", "-c", program, str(tmp_path)]  # without site-packages
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "0+unknown\n"
