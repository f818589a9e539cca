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
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import distill
import distill.models.head as heads
from distill import DIITO, DKD, KD, CausalLM, DistilBERT, Labels, Rows, SpanKD, TokenAlignment
from distill.interchange.mapping import entries_of
from distill.losses import jensen_shannon, reverse_kl
from distill.training.computation import Computation
from distill.training.mutual_computation import Together

MUTUAL = "mutual, KD + CausalLM"
OBJECTIVES: dict[str, Callable[[Any], list[Any]]] = {
    "KD": lambda _: [KD(2.0)],
    "KD reverse KL": lambda _: [KD(2.0, divergence=reverse_kl)],
    "KD Jensen-Shannon": lambda _: [KD(1.0, divergence=jensen_shannon)],
    "CausalLM": lambda _: [CausalLM()],
    "Labels": lambda _: [Labels(0.1)],
    "DKD": lambda _: [DKD(warmup=0)],
    "DistilBERT": lambda _: [DistilBERT()],
    "SpanKD": lambda alignment: [SpanKD(alignment)],
    "KD + CausalLM": lambda _: [KD(2.0), CausalLM()],
    "KD + CausalLM + DIITO": lambda _: [KD(2.0), CausalLM(), DIITO()],
    MUTUAL: lambda _: [KD(2.0)],
}
"""From the alignment of the tokenizers of both models to the objectives of a step."""
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


def data(rows: int, length: int, vocabulary: int) -> tuple[TokenAlignment, dict[str, Tensor]]:
    """Return the alignment of a tokenizer of words with itself, and rows of words for two models with labels."""
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(vocabulary)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    read = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w1", unk_token="w0")
    alignment = TokenAlignment(read, read)
    texts = [" ".join(f"w{each}" for each in row) for row in torch.randint(3, vocabulary, (rows, length)).tolist()]
    read_by_both = alignment.rows(texts, max_length=length).batch(range(rows))
    labels = torch.randint(3, vocabulary, (rows, length))
    labels[:, 0] = -100
    return alignment, {**read_by_both, "labels": labels}


def computation_of(name: str, both: tuple[nn.Module, nn.Module], given: tuple[TokenAlignment, dict]) -> Any:
    """Return the computation of a step, and the columns that it takes."""
    (teacher, student), (alignment, batch) = both, given
    objectives, plain = OBJECTIVES[name](alignment), {"input_ids": batch["input_ids"]}
    if name == MUTUAL:
        networks = [student, copy.deepcopy(teacher).requires_grad_().train()]
        return Together(networks, objectives, [CausalLM()], {(0, 1): (), (1, 0): ()}, {}), plain
    entries = entries_of(distill.layer_mapping(teacher, student, "full"), teacher, student)
    computation = Computation(teacher, student, entries, objectives)
    if name == "SpanKD":
        columns = {column: each for column, each in batch.items() if column != "labels"}
    else:
        columns = plain | ({"labels": batch["labels"]} if name in ("Labels", "DKD", "DistilBERT") else {})
    few = {column: each[:2] for column, each in columns.items()}
    computation.prepare(few, torch.Generator().manual_seed(0), Rows(dict(few)))
    return computation, columns


def step_of(computation: Any, batch: dict[str, Tensor]) -> Callable[[], dict]:
    """Return a function that makes the forward and backward of a step and returns its terms."""

    def step() -> dict[str, float]:
        computation.zero_grad()
        terms = computation(batch, torch.Generator().manual_seed(1))
        sum(terms.values()).backward()
        return {name: term.item() for name, term in terms.items()}

    return step


def seconds_of(step: Callable[[], Any]) -> float:
    """Return the seconds of the processor that a step takes."""
    began = time.process_time()
    step()
    return time.process_time() - began


def compared(name: str, both: tuple[nn.Module, nn.Module], given: tuple[Any, dict], rounds: int) -> dict[str, Any]:
    """Return what one step of some objectives holds and costs, in parts and whole."""
    teacher, student = both
    sides = {logits: copy.deepcopy(student) for logits in (True, False)}
    made = {logits: computation_of(name, (teacher, each), given) for logits, each in sides.items()}
    steps = {logits: step_of(*each) for logits, each in made.items()}
    peaks, terms = {}, {}
    for logits, step in steps.items():
        with whole(logits=logits):
            step()  # the first one tries the heads
            made[logits][0].zero_grad()
            with LiveBytes(nn.ModuleList([teacher, made[logits][0]])) as live:
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
    matrix = given[1]["input_ids"].numel() * student.config.vocab_size * 4
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
    both = make(2).eval().requires_grad_(False), make(2)
    read = data(given.rows, given.length, given.vocabulary)
    found = {}
    for name in OBJECTIVES:
        found[name] = compared(name, both, read, given.rounds)
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
