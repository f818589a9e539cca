"""What `intervene` costs beside hooks written by hand, twelve locations beside one, and ten thousand blocks of memory.

    python benchmarks/intervene_cost.py [--device cuda] [--rounds 40]

All sides run in one process, in turn, on the same inputs; the figures are ratios of medians of seconds, and counts of
block calls. One JSON line is appended to `intervene_cost.json`.

- `intervene`: a forward with a swap of one position in block 6, and the block opened and closed around it; beside the
  same with `register_forward_hook` by hand, and beside the plain forward.
- `intervene`: a forward with a swap of one position in block 6, the block opened and closed around it; beside the
- `memory`: bytes that 10,000 opened and closed blocks leave behind (tracemalloc, after 1,000 to warm up).
"""

import argparse
import gc
import json
import platform
import statistics
import time
import tracemalloc
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from interventions import Location, Swap, Zero, interchange, intervene, run_to

LAYERS = 12


def by_hand(model: GPT2LMHeadModel, inputs: dict, source: Tensor, layer: int, position: int) -> Tensor:
    """The swap as one writes it without a library."""

    def hook(module: torch.nn.Module, args: tuple, output: object) -> object:
        state = output[0] if isinstance(output, tuple) else output
        new = state.clone()
        new[:, position] = source[:, position]
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = model.transformer.h[layer].register_forward_hook(hook)
    try:
        return model(**inputs).logits
    finally:
        handle.remove()


def by_intervene(model: GPT2LMHeadModel, inputs: dict, source: object, layer: int, position: int) -> Tensor:
    with intervene(model, Location(layer), op=Swap(), source=source, positions=position):
        return model(**inputs).logits


def medians(sides: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each side, the sides in turn in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 2):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def source_blocks(model: GPT2LMHeadModel, base: dict, source: dict, locations: list[Location]) -> int:
    """How many blocks ran beside those of one full counterfactual run."""
    calls = []
    handles = [block.register_forward_hook(lambda *_: calls.append(1)) for block in model.transformer.h]
    interchange(model, base, source, locations)
    for handle in handles:
        handle.remove()
    return len(calls) - LAYERS


def bytes_left(model: GPT2LMHeadModel, blocks: int) -> int:
    def open_and_close(times: int) -> None:
        for _ in range(times):
            with intervene(model, layer=6, op=Zero()) as handle:
                handle.writes[0].firings = 1  # it is not called: that is what the other part measures

    open_and_close(1000)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    open_and_close(blocks)
    gc.collect()
    left = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return left


@torch.no_grad()
def measure(device: torch.device, rounds: int, width: int, batch: int, length: int) -> dict[str, object]:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=5000, n_embd=width, n_layer=LAYERS, n_head=8, use_cache=False)
    model = GPT2LMHeadModel(config).eval().to(device)
    base, other = ({"input_ids": torch.randint(0, 5000, (batch, length), device=device)} for _ in range(2))
    kept = run_to(model, other, [Location(6)])
    state = kept.activations[Location(6)]
    assert torch.equal(by_hand(model, base, state, 6, -1), by_intervene(model, base, kept, 6, -1))
    every = [Location(layer, "mlp_output") for layer in range(LAYERS)]
    seconds = medians(
        {
            "plain": lambda: model(**base),
            "by_hand": lambda: by_hand(model, base, state, 6, -1),
            "intervene": lambda: by_intervene(model, base, kept, 6, -1),
            "one_location": lambda: interchange(model, base, other, Location(11, "mlp_output")),
            "twelve_locations": lambda: interchange(model, base, other, every),
        },
        rounds,
        device,
    )
    return {
        "seconds": {name: round(value, 6) for name, value in seconds.items()},
        "intervene / by hand": round(seconds["intervene"] / seconds["by_hand"], 4),
        "intervene / plain": round(seconds["intervene"] / seconds["plain"], 4),
        "twelve locations / one": round(seconds["twelve_locations"] / seconds["one_location"], 4),
        "source blocks, one location in the last block": source_blocks(model, base, other, every[-1:]),
        "source blocks, twelve locations": source_blocks(model, base, other, every),
        "bytes left by 10,000 blocks": bytes_left(model, 10_000),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    given = parser.parse_args()
    device = torch.device(given.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    record = {
        "date": date.today().isoformat(),
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "model": f"GPT-2, {LAYERS} layers, width {given.width}, batch {given.batch} × {given.length}, fp32",
        **measure(device, given.rounds, given.width, given.batch, given.length),
    }
    with (Path(__file__).with_suffix(".json")).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
    print(json.dumps(record, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
