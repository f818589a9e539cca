"""Models of the shapes of 1B and 7B on an accelerator: matrix utilization, tokens per second, waits for the device.

The weights are random and made on the device. Teacher and student are Llamas; the student has half of the blocks. A
step is forward and backward, without the optimizer, whose states need not fit. Multiplications are counted by torch
while one step runs, so that the utilization is of the work that the step does, beside the peak of dense bf16.
"""

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from distill import DIITO, KD
from distill.interchange.mapping import entries_of
from distill.training.computation import Computation
from interventions import Location

from .measuring import Given, clock_of

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12}
"""Multiplications and additions a second of dense bf16, by a part of the device's name."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama, and the texts of a step; without a number of heads of keys there is one for each query."""

    layers: int
    width: int
    heads: int
    inner: int
    keys: int | None = None
    vocabulary: int = 32000
    rows: int = 8
    length: int = 512

    def config(self, layers: int | None = None) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.width, num_hidden_layers=layers or self.layers,
            intermediate_size=self.inner, num_attention_heads=self.heads, num_key_value_heads=self.keys,
            use_cache=False, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip


SHAPES = {
    "1B": Shape(16, 2048, 32, 8192, rows=16),
    "7B": Shape(32, 4096, 32, 11008, rows=4),
    "tiny": Shape(4, 32, 4, 64, vocabulary=100, rows=2, length=8),
}
"""`tiny` is for the test of this file on a CPU."""


def llama(shape: Shape, layers: int, given: Given) -> nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(given.dtype)
    try:
        with given.device:
            return LlamaForCausalLM(shape.config(layers))
    finally:
        torch.set_default_dtype(before)


def stepping(computation: Computation, student: nn.Module, batch: dict[str, Tensor], device: torch.device) -> Callable:
    generator = torch.Generator(device).manual_seed(0)

    def step() -> None:
        with torch.enable_grad():
            terms = computation(batch, generator)
            torch.stack([*terms.values()]).sum().backward()
            student.zero_grad()

    return step


def waits_in(step: Callable[[], None], device: torch.device) -> int | None:
    """Return how often a step waits for the device; None on a CPU, which is not waited for."""
    if device.type != "cuda":
        return None
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchroniz" in str(each.message) for each in caught)


def multiplications_of(step: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def seconds_of(step: Callable[[], None], given: Given) -> float:
    """Return the median seconds of a step."""
    clock, taken = clock_of(given.device), []
    start = time.perf_counter()
    for number in range(given.rounds + 2):
        began = clock()
        step()
        if number > 1:
            taken.append(clock() - began)
        if number > 5 and time.perf_counter() - start > given.seconds:
            break
    return sorted(taken)[len(taken) // 2]


def of_shape(name: str, given: Given) -> dict[str, Any]:
    """Measure steps of KD, and of KD and DIITO, of one shape."""
    shape = SHAPES[name]
    teacher = llama(shape, shape.layers, given).eval().requires_grad_(False)
    student = llama(shape, shape.layers // 2, given).train()
    ids = torch.randint(shape.vocabulary, (shape.rows, shape.length), device=given.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    # The middle of both, so that every step does the same work.
    middle = {Location(shape.layers // 2 - 1): Location(shape.layers // 4 - 1)}
    entries = entries_of(middle, teacher, student)
    peak = next((each for part, each in PEAKS.items() if part in device_name(given.device)), None)
    found: dict[str, Any] = {}
    for side, objectives in {"KD": [KD()], "KD + DIITO": [KD(), DIITO(vacuous="keep")]}.items():
        computation = Computation(teacher, student, entries, objectives).to(given.device)
        step = stepping(computation, student, batch, given.device)
        step()
        work, seconds = multiplications_of(step), seconds_of(step, given)
        found[side] = {
            "ms": round(1e3 * seconds, 3),
            "tokens / s": round(ids.numel() / seconds),
            "TFLOP / s": round(work / seconds / 1e12, 2),
            "of the peak": None if peak is None else round(work / seconds / peak, 4),
            "waits a step": waits_in(step, given.device),
        }
    found["KD + DIITO / KD"] = round(found["KD + DIITO"]["ms"] / found["KD"]["ms"], 4)
    if given.device.type == "cuda":
        found["memory, GB"] = round(torch.cuda.max_memory_allocated(given.device) / 1e9, 1)
        del teacher, student, computation, step
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(given.device)
    return found


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def measure(names: list[str], given: Given) -> dict[str, Any]:
    """Measure the shapes, in bf16 on an accelerator; one that does not fit says so."""
    found = {}
    for name in names:
        settings = given if given.device.type == "cpu" else Given(given.device, given.rounds, 30.0, torch.bfloat16)
        try:
            found[name] = of_shape(name, settings)
        except torch.OutOfMemoryError as error:
            found[name] = {"error": str(error).splitlines()[0]}
    return found


def table(shapes: dict[str, Any]) -> str:
    """Return the figures of the shapes as a table in Markdown."""
    names = ["ms", "tokens / s", "TFLOP / s", "of the peak", "waits a step"]
    rows = [f"| shape | step | {' | '.join(names)} |", "| --- " * (2 + len(names)) + "|"]
    for shape, sides in shapes.items():
        for side, figures in sides.items():
            if isinstance(figures, dict):
                rows.append(f"| {shape} | {side} | {' | '.join(str(figures[name]) for name in names)} |")
            else:
                rows.append(f"| {shape} | {side} | {json.dumps(figures)} |" + " |" * (len(names) - 1))
    return "\n".join(rows)
