"""Epochs of KD by a teacher's kept answers beside epochs by the teacher itself, and what keeping costs.

    python -m benchmarks.cached_epoch --model ../shared/data/models/stories260K

A language model teaches a student of two of its layers on random tokens by KD, 50 logits kept. One process alternates
epochs by the teacher, which runs in each step, and by its answers; the ratio is that of their processor time, least of
each, the spread that of the ratios of neighbours. And the bytes of a token, the files, and the time in which a cache of
10,000 samples is opened, for a vocabulary of 128,256 classes in single precision and in bf16.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import distill
from distill.teachers.cache import Cache, digest

K = 50


def teacher_of(model: Path | None) -> Any:
    """Return a saved model, or a random one of 8 layers of width 256."""
    if model is not None:
        return AutoModelForCausalLM.from_pretrained(model).eval()
    torch.manual_seed(0)
    sizes = dict(vocab_size=8000, hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=8)
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def epoch(teacher: Any, data: Any) -> float:
    """Return the processor time of an epoch [s]."""
    given = teacher.model if isinstance(teacher, distill.Served) else teacher
    student = distill.from_layers(given, [0, given.config.num_hidden_layers - 1])
    schedule = distill.Schedule(epochs=1, batch_size=16)
    records = distill.steps(teacher, student, {}, data, objective=distill.KD(2.0), schedule=schedule)
    next(records)  # what is done once is none of it
    began = time.process_time()
    for _ in records:
        pass
    return time.process_time() - began


def epochs(model: Path | None, rows: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Return the ratio of a cached epoch to a live one, and the bytes of a token."""
    teacher = teacher_of(model)
    ids = torch.randint(3, teacher.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))
    data = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with tempfile.TemporaryDirectory() as folder:
        served = distill.Served(teacher, top_k=K, cache=Path(folder) / "answers")
        served.fetch(data, batch_size=16)
        fetched = served.requests
        pairs = [(epoch(teacher, data), epoch(served, data)) for _ in range(rounds)]
        assert served.requests == fetched
        size = sum(each.stat().st_size for each in (Path(folder) / "answers").iterdir())
    ratios = sorted(kept / live for live, kept in pairs)
    name = "random, 8 layers of width 256" if model is None else model.name
    return {
        "teacher": name, "parameters": sum(each.numel() for each in teacher.parameters()), "rows": rows,
        "tokens": tokens, "ratio": min(kept for _, kept in pairs) / min(live for live, _ in pairs),
        "ratios": ratios, "bytes a token": size / rows / tokens,
    }  # fmt: skip


def opened(dtype: torch.dtype, samples: int, tokens: int, classes: int = 128_256) -> dict[str, Any]:
    """Return the size of a cache of random answers, and the processor time to open it."""
    draw = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "answers"
        cache, entries = Cache(folder, {}), dict[str, dict[str, torch.Tensor]]()
        for number in range(samples):
            values = torch.randn(tokens, K, generator=draw).mul(2).add(9).sort(-1, descending=True).values.to(dtype)
            indices = torch.randint(classes, (tokens, K), dtype=torch.int32, generator=draw)
            entries[f"samples/{digest(number)}"] = {
                "values": values, "indices": indices, "level": torch.randn(tokens, 1, generator=draw),
                "classes": torch.tensor(classes, dtype=torch.int32),
            }  # fmt: skip
            if len(entries) == 64 or number == samples - 1:
                cache.put_all(entries)
                entries.clear()
        files = [each for each in folder.iterdir() if each.is_file()]
        began = time.process_time()
        assert Cache(folder, {}).count("samples") == samples
        return {
            "dtype": str(dtype).removeprefix("torch."), "classes": classes, "samples": samples, "tokens": tokens,
            "files": len(files), "bytes a token": sum(each.stat().st_size for each in files) / samples / tokens,
            "seconds to open": time.process_time() - began,
        }  # fmt: skip


def main() -> None:
    """Measure, print and write."""
    options = argparse.ArgumentParser()
    options.add_argument("--model", type=Path, help="a saved language model, beside a random one")
    options.add_argument("--rows", type=int, default=192)
    options.add_argument("--tokens", type=int, default=64)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--samples", type=int, default=10_000)
    options.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    given = options.parse_args()
    torch.set_num_threads(1)
    models = [None] if given.model is None else [given.model, None]
    found = {
        "k": K,
        "epochs": [epochs(model, given.rows, given.tokens, given.rounds) for model in models],
        "caches": [opened(dtype, given.samples, given.tokens) for dtype in (torch.float32, torch.bfloat16)],
    }
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    Console(width=120).print_json(json.dumps(found))


if __name__ == "__main__":
    main()
