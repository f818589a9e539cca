"""One program in several processes that find each other, as `torchrun` starts them, on one thread each."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

REPOSITORY = Path(__file__).parents[1]


def run_together(arguments: list[str], processes: int = 2) -> list[str]:
    """Run `python …` in each process, and return what each printed, in the order of their ranks.

    A single process is in no group.
    """
    running = [
        subprocess.Popen(
            [sys.executable, *arguments], cwd=REPOSITORY, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for environment in environments(processes)
    ]  # fmt: skip
    try:
        printed = [each.communicate(timeout=300) for each in running]
    finally:
        for each in running:
            each.kill()
    assert not any(each.returncode for each in running), "\n".join(errors[-3000:] for _, errors in printed)
    return [output for output, _ in printed]


def environments(processes: int) -> list[dict[str, str]]:
    """Return the environment of each process: how the others are found, and which of them it is."""
    alone = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    if torch.accelerator.is_available():  # elsewhere they find the CPU themselves, as those of a user do
        alone["ACCELERATE_USE_CPU"] = "true"
    if processes == 1:
        return [alone]
    group = {**alone, "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    return [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])
