"""Trains tiny students in as many processes as it is started in, and prints what each of them ends with.

Run by `test_processes.py`: python -m tests.distill.training.two_processes "BATCH_SIZE ACCUMULATE NAME" …, one student
for each of the arguments.
"""

import sys
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import Replicate

from distill import (
    CRD,
    DKD,
    KD,
    PKD,
    Augmented,
    CausalLM,
    Cosine,
    DistillError,
    FitNets,
    Labels,
    Rows,
    Schedule,
    from_layers,
    steps,
)
from interventions import Location
from tests.distill.objectives.test_augmented import Shifted
from tests.distill.tiny_models import bert, gpt2_lm, spread, text

CASES = {
    "tokens": (gpt2_lm, lambda: text(15, labels=False), lambda: [KD(), CausalLM(), Cosine(), Augmented(Shifted())]),
    "examples": (bert, lambda: text(15), lambda: [KD(), Labels(), DKD(warmup=0)]),
    "FitNets": (bert, lambda: text(15), lambda: [FitNets()]),
    "PKD": (bert, lambda: text(15), lambda: [PKD({Location(2): Location(0)})]),
    "Cosine": (bert, lambda: text(15), lambda: [Cosine()]),
    "memories": (bert, lambda: text(15), lambda: [KD(), CRD(8, 16)]),
}


def train(accelerator: Accelerator, batch_size: int, accumulate: int, name: str) -> None:
    make, data, objectives = CASES[name]
    teacher = spread(make(4))
    student = spread(from_layers(teacher, 2), 1)
    rows: Rows = data()
    schedule = Schedule(epochs=2, batch_size=batch_size, lr=0.01, optimizer="sgd", clip=0.5, accumulate=accumulate)
    chosen = objectives()
    for record in steps(
        teacher.double(), student.double(), data=rows, objective=chosen, schedule=schedule, accelerator=accelerator
    ):
        if accelerator.is_main_process:
            print("record", record.step, *(f"{value:.12f}" for value in record.terms.values()), flush=True)
    total = sum(float(p.double().abs().sum()) for p in student.parameters())
    banks = [float(buffer.double().sum()) for each in chosen for buffer in each.buffers()]
    print("weights", accelerator.process_index, f"{total:.10f}", *(f"{bank:.8f}" for bank in banks), flush=True)


def refuse_split() -> None:
    """Print how models whose weights are split over the two processes are refused."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    teacher, student = spread(bert(4)), spread(bert(2), 1)
    parts: nn.Module = parallelize_module(
        spread(bert(4)), mesh, {"classifier": ColwiseParallel(output_layouts=Replicate())}
    )
    attempts: list[Callable[[], object]] = [
        lambda: next(steps(parts, student, data=text(8), objective=KD())),
        lambda: next(steps(teacher, parts, data=text(8), objective=KD())),
        lambda: from_layers(parts, 2),
    ]
    print("refused", flush=True)
    for attempt in attempts:
        try:
            attempt()
        except DistillError as error:
            print(error, flush=True)


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    for run in sys.argv[1:]:
        batch_size, accumulate, name = run.split()
        print(run, flush=True)
        train(accelerator, int(batch_size), int(accumulate), name)
    if torch.distributed.is_initialized():
        refuse_split()
        torch.distributed.destroy_process_group()
