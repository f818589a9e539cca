"""What plain models and those of nnsight compute, in processes of their own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

REPOSITORY = Path(__file__).parents[3]
PROGRAMS = ("plain_side", "nnsight_side")


@pytest.fixture(scope="session")
def sides(tmp_path_factory, worker_id):
    """{program: the file that it wrote}. Of several test processes, the first runs both, at once."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder if worker_id == "master" else folder.parent
    files = {program: folder / f"tracing_{program}.pt" for program in PROGRAMS}
    with FileLock(folder / "tracing.lock"):
        if not files[PROGRAMS[-1]].exists():
            going = [started(program, file) for program, file in files.items()]
            errors = [each.communicate()[1] for each in going]
            assert not any(each.returncode for each in going), "\n".join(errors)
    return files


@pytest.fixture(scope="session")
def plain_side(sides):
    """{"answers": {case: answer}, "left alone": {model: its logits}}."""
    return torch.load(sides["plain_side"])


@pytest.fixture(scope="session")
def nnsight_side(sides):
    """{"answers": {case: answer}, "faults": {check: fault}}."""
    return torch.load(sides["nnsight_side"])


def started(program: str, file: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", f"tests.interventions.tracing.{program}", str(file)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
