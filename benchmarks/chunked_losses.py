"""What losses over large logits hold and cost: made in parts from hidden states and heads, and made whole.

    python benchmarks/chunked_losses.py [--rows 8] [--length 512] [--vocabulary 32000] [--rounds 3]

Each side is one forward and backward of all runs of a step, without the optimizer, of two small Llamas whose heads are
most of them. What is held is counted: the bytes of all tensors that are alive after each operation of torch, at their
most, over those of one matrix of logits in single precision, tokens × vocabulary × 4 bytes. Seconds are those of the
processor, and the figure is the ratio of medians of rounds in which both sides take turns. The JSON is written to
`chunked_losses.json`.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import distill
import distill.models.head as heads
from distill import DIITO, KD, CausalLM
from distill.interchange.mapping import entries_of
from distill.losses import jensen_shannon, reverse_kl
from distill.training.computation import Computation

OBJECTIVES: dict[str, Callable[[], list[Any]]] = {
    "KD": lambda: [KD(2.0)],
    "KD reverse KL": lambda: [KD(2.0, divergence=reverse_kl)],
    "KD Jensen-Shannon": lambda: [KD(1.0, divergence=jensen_shannon)],
    "CausalLM": lambda: [CausalLM()],
    "KD + CausalLM": lambda: [KD(2.0), CausalLM()],
    "KD + CausalLM + DIITO": lambda: [KD(2.0), CausalLM(), DIITO()],
}
WIDTH, NEVER = 256, 2**62


class LiveBytes(TorchDispatchMode):
    """Sum the bytes of the tensors that operations of torch made in a block and that are alive; `most` is their peak.

    Args:
        before: the module whose parameters and buffers were there before, and count for nothing.
    """

    def __init__(self, before: nn.Module) -> None:
        super().__init__()
        self.there = [*before.parameters(), *before.buffers()]  # held, as what is freed makes room for another
        self.old = {each.untyped_storage()._cdata for each in self.there}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, then count what is alive."""
        made = function(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, Tensor) and (storage := each.untyped_storage())._cdata not in self.old:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: kept for key, kept in self.alive.items() if not kept[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return made


def model(layers: int, vocabulary: int, length: int) -> nn.Module:
    """Return a small random Llama."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=4, intermediate_size=2 * WIDTH, max_position_embeddings=length, initializer_range=0.1,
        )
    )  # fmt: skip


@contextmanager
def whole(*, logits: bool) -> Iterator[None]:
    """Make all logits whole inside the block, or none of them, whatever their size."""
    before = heads.LARGE
    heads.LARGE = NEVER if logits else 1
    try:
        yield
    finally:
        heads.LARGE = before


def step_of(models: tuple[nn.Module, nn.Module], objectives: list[Any], batch: dict[str, Tensor]) -> Callable[[], dict]:
    """Return a function that makes the forward and backward of a step and returns its terms."""
    teacher, student = models
    entries = entries_of(distill.layer_mapping(teacher, student, "full"), teacher, student)
    computation = Computation(teacher, student, entries, objectives)

    def step() -> dict[str, float]:
        student.zero_grad()
        terms = computation(batch, torch.Generator().manual_seed(1))
        sum(terms.values()).backward()
        return {name: term.item() for name, term in terms.items()}

    return step


def seconds_of(step: Callable[[], Any]) -> float:
    """Return the seconds of the processor that a step takes."""
    began = time.process_time()
    step()
    return time.process_time() - began


def compared(name: str, models: tuple[nn.Module, nn.Module], batch: dict[str, Tensor], rounds: int) -> dict[str, Any]:
    """Return what one step of some objectives holds and costs, in parts and whole."""
    teacher, student = models
    sides = {logits: copy.deepcopy(student) for logits in (True, False)}
    steps = {logits: step_of((teacher, each), OBJECTIVES[name](), batch) for logits, each in sides.items()}
    peaks, terms = {}, {}
    for logits, step in steps.items():
        with whole(logits=logits):
            step()  # the first one tries the heads
            sides[logits].zero_grad()
            with LiveBytes(nn.ModuleList([teacher, sides[logits]])) as live:
                terms[logits] = step()
        peaks[logits] = live.most
    apart = [
        float((own - other).abs().max() / own.abs().max())
        for own, other in zip(*([p.grad for p in each.parameters()] for each in sides.values()), strict=True)
    ]
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(rounds):
        for logits, step in steps.items():
            with whole(logits=logits):
                times[logits].append(seconds_of(step))
    matrix = batch["input_ids"].numel() * student.config.vocab_size * 4
    return {
        "whole: peak over logits": round(peaks[True] / matrix, 2),
        "in parts: peak over logits": round(peaks[False] / matrix, 2),
        "in parts over whole: seconds": round(statistics.median(times[False]) / statistics.median(times[True]), 2),
        "difference of terms, relative": max(
            abs(terms[True][k] - terms[False][k]) / terms[True][k] for k in terms[True]
        ),
        "difference of gradients, over the largest": max(apart),
    }


def main() -> None:
    """Measure all objectives and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option, default in (("rows", 8), ("length", 512), ("vocabulary", 32000), ("rounds", 3)):
        parser.add_argument(f"--{option}", type=int, default=default)
    given = parser.parse_args()
    torch.manual_seed(0)
    make = partial(model, vocabulary=given.vocabulary, length=given.length)
    models = make(2).eval().requires_grad_(False), make(2)
    batch = {"input_ids": torch.randint(3, given.vocabulary, (given.rows, given.length))}
    found = {}
    for name in OBJECTIVES:
        found[name] = compared(name, models, batch, given.rounds)
        print(name, found[name], flush=True)
    settings = {
        **vars(given),
        "width": WIDTH,
        "layers": 2,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps({"settings": settings, "steps": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
