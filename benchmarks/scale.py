"""Memory and floating-point operations of a step of large models on several devices, worked out beforehand.

    python benchmarks/scale.py [--devices 8] [--rows 64] [--length 2048]

Nothing of this size is run: parameters are counted on the meta device, and operations by the formula below, which a
test holds to what torch counts in real steps of small models (`tests/test_scale_page.py`). How many matrices of logits
a step holds at once is measured with small ones, as it depends on neither size. What activations take is left out: with
gradient checkpointing it is small beside the rest, and without it depends on the kernels of attention.

A run of a block on a token takes 2 floating-point operations (FLOP) a weight and 4 · length · width in attention, and
its backward twice as many. KD runs the teacher, and the student forward and backward. An interchange that is drawn
at block t of the teacher and s of the student runs, in both, the blocks after these and the head once more.
"""

import argparse
import json
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from speed_cases.shapes import Shape
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

import distill.models.head as heads
from distill import DIITO, KD
from distill.interchange.mapping import Entry, entries_of
from distill.training.computation import Computation

FILE = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
BEGIN, END = "<!-- benchmarks/scale.py -->", "<!-- end -->"
SIDES = (("KD", False), ("KD + DIITO", True))
"""Objectives of a step, and whether they interchange."""
TRAINED_BYTES = {"weights (fp32)": 4, "gradients (fp32)": 4, "AdamW, two moments (fp32)": 8}
"""Bytes of a trained parameter under mixed precision, whose forward casts weights to bf16 as it goes."""


TEACHER, STUDENT = Shape(32, 4096, 32, 11008, 32), Shape(22, 2048, 32, 5632, 4)
"""Those of Llama 2 7B and TinyLlama 1.1B, as their papers give them."""


@dataclass(frozen=True)
class Size:
    """The numbers of parameters of a model: of all, of a block's matrices, and of the head."""

    parameters: int
    block: int
    head: int

    @classmethod
    def of(cls, model: nn.Module) -> "Size":
        block = model.model.layers[0]
        matrices = sum(each.numel() for each in block.parameters() if each.ndim == 2)
        return cls(sum(each.numel() for each in model.parameters()), matrices, model.lm_head.weight.numel())


def sizes_of(shape: Shape) -> dict[str, Any]:
    return {name: value for name, value in asdict(shape).items() if name not in ("rows", "length")}


def on_meta(shape: Shape) -> nn.Module:
    with torch.device("meta"):
        return LlamaForCausalLM(shape.config())


def forward(shape: Shape, size: Size, blocks: float, length: int) -> float:
    """Floating-point operations of a token's run through some blocks and the head."""
    return blocks * (2 * size.block + 4 * length * shape.width) + 2 * size.head


def flop(
    shapes: tuple[Shape, Shape], sizes: tuple[Size, Size], length: int, entries: list[tuple[int, int]] | None = None
) -> float:
    """Floating-point operations of a token in a step of KD, or of KD and an interchange at the mean of entries.

    Args:
        shapes, sizes: of the teacher and of the student.
        length: of a text.
        entries: blocks (of the teacher, of the student), one of which is drawn; None is KD alone.
    """
    sides = list(zip(shapes, sizes, (1, 3), strict=True))
    total = sum(times * forward(shape, size, shape.layers, length) for shape, size, times in sides)
    for entry in entries or []:
        for (shape, size, times), block in zip(sides, entry, strict=True):
            total += times * forward(shape, size, shape.layers - 1 - block, length) / len(entries or [])
    return total


class Held(TorchDispatchMode):
    """Counts the bytes that tensors made inside the block hold, and the most of them at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if isinstance(each, Tensor):
                self._count(each.untyped_storage())
        return found

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            size = storage.nbytes()
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def logits_held(with_interchange: bool, in_parts: bool, tokens: int = 2048, vocabulary: int = 8000) -> float:
    """Return how many fp32 matrices of logits, of one model, a step holds at its peak; the models are tiny.

    Args:
        with_interchange: KD and DIITO, or KD alone.
        in_parts: make the logits for some tokens at a time, as replicated models do with as many as here; sharded ones
            make them whole.
        tokens, vocabulary: the sizes of a matrix.
    """
    shape = Shape(2, 8, 2, 8, vocabulary=vocabulary)
    torch.manual_seed(0)
    teacher, student = LlamaForCausalLM(shape.config()).eval().requires_grad_(False), LlamaForCausalLM(shape.config())
    step = step_of(teacher, student, [(0, 0)] if with_interchange else None, tokens // 4, 4)
    with patch.object(heads, "LARGE", 1 if in_parts else 2**62):
        step()  # the first one tries the heads
        with Held() as held:
            step()
    return held.most / (4 * tokens * vocabulary)


def step_of(
    teacher: nn.Module, student: nn.Module, entries: list[tuple[int, int]] | None, length: int, rows: int
) -> Any:
    """Return a step of KD, or of KD and an interchange at a drawn one of these entries."""
    from interventions import Location

    mapped: tuple[Entry, ...] = ()
    if entries:
        mapped = entries_of({Location(above): Location(below) for above, below in entries}, teacher, student)
    objectives = [KD(), *([DIITO(vacuous="keep")] if entries else [])]
    computation = Computation(teacher, student, mapped, objectives)
    vocabulary = int(student.config.vocab_size)
    ids = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        with torch.enable_grad():
            torch.stack([*computation(batch, generator).values()]).sum().backward()
        student.zero_grad()

    return step


def figures(devices: int, rows: int, length: int) -> dict[str, Any]:
    """Return what the page shows, for a step of so many rows on all devices together."""
    shapes = TEACHER, STUDENT
    sizes = tuple(Size.of(on_meta(shape)) for shape in shapes)
    teacher, student = sizes
    entries = [(round((block + 1) * TEACHER.layers / STUDENT.layers) - 1, block) for block in range(STUDENT.layers)]
    kd, diito = (flop(shapes, sizes, length, each) for each in (None, entries))
    tokens = rows * length
    states = student.parameters * sum(TRAINED_BYTES.values())
    return {
        "settings": {"devices": devices, "rows of a step": rows, "length": length, "torch": torch.__version__},
        "teacher": {**sizes_of(TEACHER), "parameters": teacher.parameters},
        "student": {**sizes_of(STUDENT), "parameters": student.parameters},
        "bytes of a device": {
            "teacher (bf16)": {"replicated": 2 * teacher.parameters, "sharded": 2 * teacher.parameters / devices},
            "student, its gradients and AdamW (fp32)": {"replicated": states, "sharded": states / devices},
            "a matrix of logits (fp32), one row": {"either": 4 * length * STUDENT.vocabulary},
        },
        "matrices of logits at the peak": {
            name: {"replicated": logits_held(both, True), "sharded": logits_held(both, False)} for name, both in SIDES
        },
        "gradients of the head that wait (fp32)": {name: 4 * student.head * (1 + both) for name, both in SIDES},
        "FLOP of a token": {"KD": kd, "KD + DIITO": diito, "ratio": diito / kd},
        "of a step": {"tokens": tokens, "KD": kd * tokens, "KD + DIITO": diito * tokens},
    }


def table(found: dict[str, Any]) -> str:
    """Return the figures as the page shows them."""
    devices, held = found["settings"]["devices"], found["matrices of logits at the peak"]
    work, step = found["FLOP of a token"], found["of a step"]
    lines = [f"| of each of {devices} devices | replicated | sharded |", "| --- | --- | --- |"]
    for name, sides in found["bytes of a device"].items():
        if "either" in sides:
            one = sides["either"]
            lines += [f"| {name} | {one / 1e9:.2f} GB | {one / 1e9:.2f} GB |"]
            for side, times in held.items():
                parts, whole = times["replicated"], times["sharded"]
                counts = f"{parts:.1f} of them in parts, {whole:.1f} whole"
                lines += [
                    f"| – at the peak of {side}, {counts} | {one * parts / 1e9:.2f} GB | {one * whole / 1e9:.2f} GB |"
                ]
            for side, waiting in found["gradients of the head that wait (fp32)"].items():
                lines += [f"| – gradients of the head that wait, {side} | {waiting / 1e9:.2f} GB | none |"]
        else:
            lines += [f"| {name} | {sides['replicated'] / 1e9:.1f} GB | {sides['sharded'] / 1e9:.1f} GB |"]
    lines += ["", f"| a step of {step['tokens']:,} tokens | KD | KD + DIITO |", "| --- | --- | --- |"]
    lines += [f"| FLOP a token | {work['KD'] / 1e9:.1f} G | {work['KD + DIITO'] / 1e9:.1f} G |"]
    lines += [f"| of the step | {step['KD'] / 1e15:.2f} P | {step['KD + DIITO'] / 1e15:.2f} P |"]
    lines += [f"| beside KD | 1 | {work['ratio']:.2f} |"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=2048)
    given = parser.parse_args()
    found = figures(given.devices, given.rows, given.length)
    shown = table(found)
    if given == parser.parse_args([]):  # other settings are printed alone
        FILE.write_text(json.dumps(found, indent=1) + "\n")
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{shown}\n\n{END}{rest.split(END)[1]}")
    print(shown)


if __name__ == "__main__":
    main()
