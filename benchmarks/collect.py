"""What `collect` costs beside a loop with plain hooks, and a sweep over batches beside one over the whole batch.

    python benchmarks/collect.py [--rounds 7] [--rows 1024]

- collect: the activations of two places of a tiny Llama (4 blocks, width 256) for rows of random tokens of 16 to 96, in
  batches of 32, in bf16. The loop registers a hook at each place, drops padding, and saves a file for each 1,024 rows
  with the row and the position of each vector; it stops no run early, checks nothing and cannot continue.
- sweep: 4 blocks and 8 positions of 64 examples, in one batch, in batches of 16, and in batches with a checkpoint.

All of one comparison run in turn in each round. Seconds are processor time of the process (user and system), as
machines are shared; a figure is the median of the rounds, a ratio the median of the ratios within rounds, with the
least and the largest. A first round is not counted. One JSON line is appended to `collect.json`.
"""

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from distill import Rows
from interventions import Location, collect, logit_difference, sweep

FILE = Path(__file__).with_suffix(".json")
VOCABULARY, WIDTH, LAYERS, BATCH = 512, 256, 4, 32


def llama() -> nn.Module:
    """Return the model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=688
    )
    return LlamaForCausalLM(config).eval()


def rows_of(count: int) -> Rows:
    """Return rows of random tokens of several lengths."""
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(16, 97, (count,), generator=draw).tolist()
    ids = [torch.randint(1, VOCABULARY, (length,), generator=draw) for length in lengths]
    return Rows({"input_ids": ids, "attention_mask": [torch.ones_like(each) for each in ids]})


@torch.no_grad()
def by_hooks(model: Any, rows: Rows, folder: Path) -> None:
    """Write the same vectors by plain hooks."""
    folder.mkdir()
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    with ExitStack() as stack:
        for name, part in (("block", model.model.layers[1]), ("mlp", model.model.layers[2].mlp)):
            stack.callback(part.register_forward_hook(keep(name)).remove)
        kept: dict[str, list[Tensor]] = {name: [] for name in ("block", "mlp", "row", "position")}
        for start in range(0, len(rows), BATCH):
            inputs = rows.batch(range(start, min(start + BATCH, len(rows))))
            model(**inputs)
            mask = inputs["attention_mask"].bool()
            row, position = mask.nonzero(as_tuple=True)
            for name in ("block", "mlp"):
                kept[name].append(found[name][mask].bfloat16())
            kept["row"].append(row + start)
            kept["position"].append(position)
            if start + BATCH >= len(rows) or (start + BATCH) % 1024 == 0:
                tensors = {name: torch.cat(parts) for name, parts in kept.items()}
                safetensors.torch.save_file(tensors, folder / f"{start}.safetensors")
                kept = {name: [] for name in kept}


def collecting(count: int) -> dict[str, Callable[[Path], object]]:
    """Return the cases of collecting."""
    model, rows = llama(), rows_of(count)
    places = [Location(1), Location(2, "mlp_output")]
    return {
        "hooks": lambda folder: by_hooks(model, rows, folder),
        "collect": lambda folder: collect(model, rows, places, folder, dtype=torch.bfloat16, batch_size=BATCH),
    }


def sweeping() -> dict[str, Callable[[Path], object]]:
    """Return the cases of sweeping."""
    model, draw = llama(), torch.Generator().manual_seed(2)
    base, source = ({"input_ids": torch.randint(1, VOCABULARY, (64, 24), generator=draw)} for _ in range(2))
    answers, foils = (torch.randint(1, VOCABULARY, (64,), generator=draw) for _ in range(2))
    settings: Any = {
        "at": [Location(layer) for layer in range(LAYERS)],
        "metric": logit_difference(answers, foils),
        "positions": list(range(0, 24, 3)),
    }

    def batches(inputs: dict[str, Tensor]) -> Any:
        return ({name: each[start : start + 16] for name, each in inputs.items()} for start in range(0, 64, 16))

    return {
        "whole": lambda folder: sweep(model, base, source, **settings),
        "batches": lambda folder: sweep(model, batches(base), batches(source), **settings),
        "checkpoint": lambda folder: sweep(model, batches(base), batches(source), checkpoint=folder, **settings),
    }


def measured(cases: dict[str, Callable[[Path], object]], rounds: int) -> dict[str, Any]:
    """Return the seconds of each case, and its ratio to the first."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, work in cases.items():
            with tempfile.TemporaryDirectory() as scratch:
                began = time.process_time()
                work(Path(scratch) / "folder")
                taken = time.process_time() - began
            if number:
                seconds[name].append(taken)
    first = next(iter(cases))
    found: dict[str, Any] = {}
    for name, each in seconds.items():
        ratios = [one / other for one, other in zip(each, seconds[first], strict=True)]
        found[name] = {
            "seconds": round(statistics.median(each), 3),
            "ratio": round(statistics.median(ratios), 3),
            "least": round(min(ratios), 3),
            "largest": round(max(ratios), 3),
        }
    return found


def main() -> None:
    """Measure, print and append one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=1024)
    given = parser.parse_args()
    torch.set_num_threads(1)
    commit = subprocess.run(
        ["git", "log", "-1", "--format=%h"], cwd=FILE.parent, capture_output=True, text=True, check=False
    )
    line = {
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "rounds": given.rounds,
        "rows": given.rows,
        "device": platform.machine(),
        "clock": "processor time of the process, user and system [s]",
        "threads": 1,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
        "collect": measured(collecting(given.rows), given.rounds),
        "sweep": measured(sweeping(), given.rounds),
    }
    print(json.dumps(line, indent=1))
    with FILE.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
