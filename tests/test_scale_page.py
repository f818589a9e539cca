"""The arithmetic of docs/scale.md is that of real steps, its table that of the committed figures; its files start."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed.run import get_args_parser
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

REPOSITORY = Path(__file__).parents[1]
LAUNCH = REPOSITORY / "docs" / "launch"


sys.path.append(str(REPOSITORY / "benchmarks"))  # as for a script that is run there
SCALE = importlib.import_module("scale")
SHAPES = {
    "even": (SCALE.Shape(4, 32, 4, 64, 4, 100), SCALE.Shape(2, 16, 2, 24, 2, 100)),
    "grouped": (SCALE.Shape(6, 48, 4, 80, 2, 64), SCALE.Shape(3, 32, 4, 40, 1, 64)),
}


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("entries", [None, [(0, 0)], [(3, 1)], [(1, 0), (3, 1)]], ids=str)
def test_a_step_takes_as_many_operations_as_the_formula_says(shapes, entries):
    above, below = SHAPES[shapes]
    torch.manual_seed(0)
    # torch does not count what its fused attention does on a CPU.
    teacher, student = (
        LlamaForCausalLM._from_config(each.config(), attn_implementation="eager") for each in (above, below)
    )
    teacher.eval().requires_grad_(False)
    rows, length = 3, 8
    sizes = SCALE.Size.of(teacher), SCALE.Size.of(student)
    step = SCALE.step_of(teacher, student, entries, length, rows)
    step()  # the first one tries things
    with FlopCounterMode(display=False) as counter:
        step()
    found = counter.get_total_flops() / (rows * length)
    every = [SCALE.flop((above, below), sizes, length, each if each is None else [each]) for each in entries or [None]]
    assert min(abs(found / expected - 1) for expected in every) < 1e-9


def test_a_matrix_of_logits_that_is_held_is_counted():
    with SCALE.Held() as held:
        kept = torch.ones(1000)
        for _ in range(3):
            torch.ones(500) + 1
    assert held.most == 4 * (1000 + 2 * 500)
    assert held.now == 4 * 1000
    del kept


def test_the_page_shows_the_committed_figures():
    text = (REPOSITORY / "docs" / "scale.md").read_text()
    shown = text.split(SCALE.BEGIN)[1].split(SCALE.END)[0].strip()
    assert shown == SCALE.table(json.loads(SCALE.FILE.read_text()))


def test_slurm_starts_the_command(tmp_path):
    stubs = {"srun": 'test "$1" = --cpus-per-task=3 && shift && exec "$@"', "scontrol": "echo 127.0.0.1"}
    for name, line in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    found = subprocess.run(
        ["bash", LAUNCH / "slurm.sh", "--version"], capture_output=True, text=True, check=True,
        env={
            **os.environ, "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}", "SLURM_NNODES": "1",
            "SLURM_CPUS_PER_TASK": "3", "SLURM_JOB_ID": "1",
            "SLURM_JOB_NODELIST": "here", "PROCESSES_PER_NODE": "1", "PORT": "0",
            "PYTHONPATH": str(REPOSITORY),
        },
    )  # fmt: skip
    assert found.stdout.splitlines()[-1].startswith("distill ")


def test_kubernetes_starts_the_command():
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    program, *options = container["command"]
    given = get_args_parser().parse_args([*options, *container["args"]])
    assert program == "torchrun"
    assert given.module
    assert given.training_script == "distill"
    assert int(given.nnodes) == job["spec"]["completions"] == job["spec"]["parallelism"]
    host = given.rdzv_endpoint.split(":")[0]
    assert host == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}


def test_ray_runs_the_command_in_each_worker(monkeypatch, tmp_path):
    """Ray is not needed for it: the file runs with a trainer that starts its function here."""
    started = {}

    class Trainer:
        def __init__(self, function, *, train_loop_config, scaling_config):
            started.update(function=function, config=train_loop_config, workers=scaling_config)

        def fit(self):
            monkeypatch.chdir(REPOSITORY)  # Ray starts a worker elsewhere
            started["function"](started["config"])

    modules = {
        "ray": {},
        "ray.train": {"ScalingConfig": lambda **given: given},
        "ray.train.torch": {"TorchTrainer": Trainer},
    }
    for name, content in modules.items():
        module = type(sys)(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    called = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("distill.cli.main.main", lambda: called.append((sys.argv, os.getcwd())))
    monkeypatch.setattr(sys, "argv", ["ray_train.py", "16", "fit", "--task", "pvr"])
    exec(compile((LAUNCH / "ray_train.py").read_text(), "ray_train.py", "exec"), {"__name__": "__main__"})
    assert called == [(["distill", "fit", "--task", "pvr"], str(tmp_path))]
    assert started["workers"] == {"num_workers": 16, "use_gpu": True}
