"""What the verbs cost on models of nnsight, beside the same trace written by hand.

    python benchmarks/tracing_overhead.py [--models gpt2 bert] [--sizes base short] [--rounds 15] [--seed 0] [--again]

Both sides of a case run in one process, in turn, on the same inputs, with the same operator, and are first compared
bit for bit. On a CPU the clock counts the processor time of this process, since machines are shared. The ratio is the
median of those of the rounds, with its quartiles; the difference is that of the medians. One JSON line for each model
and size is appended to `tracing_overhead.json`; what is there with the same settings is not measured again.

- `swap of one block`, `swap of all blocks`, `swap of heads`: `interchange(model, base, source, at)` beside a session
  with a trace of the source, which stops after what is read, and one of the base. Ours stops at the end of the block
  that it reads in, so heads are also compared with a session that does.
- `mixup at positions`, `zeroed heads`: `intervene(model, …)` around a trace beside that trace with the lines in it.
- `swap in own trace`: the same, of one block with the activation of a run.
- `run at all blocks`: `run(model, inputs, at=…)` beside reading each output, and beside `tracer.cache`.
- `nothing`: a trace beside itself: the noise.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from nnsight import NNsight, save
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from interventions import Location, Mixup, Swap, Zero, interchange, intervene, run, run_to

VOCABULARY = 5000
SIZES = {  # layers, width, heads, batch, length
    "base": (12, 768, 12, 8, 64),
    "short": (12, 64, 4, 1, 8),
}
MIDDLE = 6
HEADS = [1, 3]
POSITIONS = [0, -1]
FILE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True, eq=False)
class Subject:
    """A model under measurement, with its blocks and the projections after their heads, as nnsight shows them."""

    model: NNsight
    blocks: list[Any]
    projections: list[Any]
    heads: int
    base: dict[str, Tensor]
    source: dict[str, Tensor]
    kept: Any


def gpt2(layers: int, width: int, heads: int) -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def bert(layers: int, width: int, heads: int) -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
        )
    )


MODELS: dict[str, Callable[[int, int, int], nn.Module]] = {"gpt2": gpt2, "bert": bert}


def subject(name: str, size: str, seed: int, device: torch.device) -> Subject:
    layers, width, heads, batch, length = SIZES[size]
    torch.manual_seed(seed)
    model = NNsight(MODELS[name](layers, width, heads).eval().to(device))
    base, source = ({"input_ids": torch.randint(0, VOCABULARY, (batch, length), device=device)} for _ in range(2))
    if name == "gpt2":
        blocks = list(model.transformer.h)
        projections = [block.attn.c_proj for block in blocks]
    else:
        blocks = list(model.bert.encoder.layer)
        projections = [block.attention.E_output.dense for block in blocks]  # so nnsight calls its `output`
    return Subject(model, blocks, projections, heads, base, source, run_to(model, source, [Location(MIDDLE)]))


def state_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def like(output: Any, state: Tensor) -> Any:
    return (state, *output[1:]) if isinstance(output, tuple) else state


def swap_by_hand(on: Subject, layers: range) -> Tensor:
    model, blocks, swap, states = on.model, on.blocks, Swap(), []
    with model.session():
        with model.trace(**on.source) as tracer:
            for layer in layers:
                states.append(state_of(blocks[layer].output))
            tracer.stop()
        with model.trace(**on.base):
            for layer, source in zip(layers, states, strict=True):
                output = blocks[layer].output
                blocks[layer].output = like(output, swap(state_of(output), source, None))
            logits = save(model.output.logits)
    return logits


def swap(on: Subject, layers: range) -> Tensor:
    return interchange(on.model, on.base, on.source, [Location(layer) for layer in layers]).logits


def heads_in(state: Tensor, heads: int) -> Tensor:
    return state.unflatten(-1, (heads, -1))


def swap_heads_by_hand(on: Subject, last: Callable[[Subject], Any]) -> Tensor:
    model, projection, swap = on.model, on.projections[MIDDLE], Swap()
    with model.session():
        with model.trace(**on.source) as tracer:
            source = heads_in(projection.input, on.heads)[..., HEADS, :]
            last(on)
            tracer.stop()
        with model.trace(**on.base):
            new = heads_in(projection.input, on.heads).clone()
            new[..., HEADS, :] = swap(new[..., HEADS, :], source, None)
            projection.input = new.flatten(-2)
            logits = save(model.output.logits)
    return logits


def swap_heads(on: Subject) -> Tensor:
    return interchange(on.model, on.base, on.source, Location(MIDDLE, "attention_heads", heads=HEADS)).logits


def zero_heads_by_hand(on: Subject) -> Tensor:
    model, projection, zero = on.model, on.projections[MIDDLE], Zero()
    with model.trace(**on.base):
        new = heads_in(projection.input, on.heads).clone()
        new[..., HEADS, :] = zero(new[..., HEADS, :], None, None)
        projection.input = new.flatten(-2)
        logits = save(model.output.logits)
    return logits


def zero_heads(on: Subject) -> Tensor:
    model = on.model
    with intervene(model, Location(MIDDLE, "attention_heads", heads=HEADS), op=Zero()), model.trace(**on.base):
        logits = save(model.output.logits)
    return logits


def mixup_by_hand(on: Subject) -> Tensor:
    model, block, mixup, generator = on.model, on.blocks[MIDDLE], Mixup(0.5), torch.Generator().manual_seed(0)
    with model.trace(**on.base):
        output = block.output
        new = state_of(output).clone()
        new[:, POSITIONS] = mixup(new[:, POSITIONS].flatten(0, 1), None, generator).view_as(new[:, POSITIONS])
        block.output = like(output, new)
        logits = save(model.output.logits)
    return logits


def mixup(on: Subject) -> Tensor:
    model, generator = on.model, torch.Generator().manual_seed(0)
    block = intervene(model, layer=MIDDLE, op=Mixup(0.5), positions=POSITIONS, generator=generator)
    with block, model.trace(**on.base):
        logits = save(model.output.logits)
    return logits


def own_swap_by_hand(on: Subject) -> Tensor:
    model, block, swap, source = on.model, on.blocks[MIDDLE], Swap(), on.kept.activations[Location(MIDDLE)]
    with model.trace(**on.base):
        output = block.output
        block.output = like(output, swap(state_of(output), source, None))
        logits = save(model.output.logits)
    return logits


def own_swap(on: Subject) -> Tensor:
    model = on.model
    with intervene(model, layer=MIDDLE, source=on.kept), model.trace(**on.base):
        logits = save(model.output.logits)
    return logits


def read_by_hand(on: Subject) -> list[Tensor]:
    model, blocks = on.model, on.blocks
    with model.trace(**on.base):
        states = save([state_of(block.output) for block in blocks])
        logits = save(model.output.logits)
    return [*states, logits]


def read_by_cache(on: Subject) -> list[Tensor]:
    model = on.model
    with model.trace(**on.base) as tracer:
        cache = tracer.cache(modules=on.blocks)
        logits = save(model.output.logits)
    return [*(state_of(cache[block.path].output) for block in on.blocks), logits]


def read(on: Subject) -> list[Tensor]:
    places = [Location(layer) for layer in range(len(on.blocks))]
    ran = run(on.model, on.base, at=places)
    return [*(ran.activations[place] for place in places), ran.logits]


def nothing(on: Subject) -> Tensor:
    model = on.model
    with model.trace(**on.base):
        logits = save(model.output.logits)
    return logits


ONE, ALL = range(MIDDLE, MIDDLE + 1), range(12)
Side = Callable[[Subject], Any]
CASES: dict[str, tuple[Side, Side]] = {
    "nothing": (nothing, nothing),
    "swap of one block": (lambda on: swap_by_hand(on, ONE), lambda on: swap(on, ONE)),
    "swap of all blocks": (lambda on: swap_by_hand(on, ALL), lambda on: swap(on, ALL)),
    "swap of heads": (lambda on: swap_heads_by_hand(on, lambda on: None), swap_heads),
    "swap of heads, to the block's end": (
        lambda on: swap_heads_by_hand(on, lambda on: on.blocks[MIDDLE].output),
        swap_heads,
    ),
    "swap in own trace": (own_swap_by_hand, own_swap),
    "mixup at positions": (mixup_by_hand, mixup),
    "zeroed heads": (zero_heads_by_hand, zero_heads),
    "run at all blocks": (read_by_hand, read),
    "run at all blocks, beside tracer.cache": (read_by_cache, read),
}


def check_same(hand: Any, ours: Any) -> None:
    """Raise where two sides do not compute the same bits."""
    pairs = zip(hand, ours, strict=True) if isinstance(hand, list) else [(hand, ours)]
    assert all(torch.equal(one, other) for one, other in pairs)


def seconds_of(side: Side, on: Subject, device: torch.device) -> float:
    now = time.perf_counter if device.type == "cuda" else time.process_time
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = now()
    side(on)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return now() - start


def compared(sides: tuple[Side, Side], on: Subject, rounds: int, device: torch.device) -> dict[str, Any]:
    """Median seconds by hand and by us, and by how much we are slower."""
    check_same(*(side(on) for side in sides))
    hand: list[float] = []
    ours: list[float] = []
    for number in range(rounds + 2):
        order = ((sides[0], hand), (sides[1], ours))
        for side, taken in order if number % 2 else reversed(order):
            taken.append(seconds_of(side, on, device))
    hand, ours = hand[2:], ours[2:]
    low, middle, high = statistics.quantiles([b / a for a, b in zip(hand, ours, strict=True)], n=4)
    return {
        "by hand, ms": round(1e3 * statistics.median(hand), 3),
        "ours, ms": round(1e3 * statistics.median(ours), 3),
        "ratio": round(middle, 4),
        "quartiles": [round(low, 4), round(high, 4)],
        "difference, µs": round(1e6 * (statistics.median(ours) - statistics.median(hand))),
    }


def settings_of(name: str, size: str, given: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    layers, width, heads, batch, length = SIZES[size]
    chip = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "model": f"{name}, {layers} layers, width {width}, {heads} heads, {VOCABULARY} tokens, fp32",
        "input": f"{batch} × {length}",
        "seed": given.seed,
        "rounds": given.rounds,
        "device": chip,
        "clock": "wall, synchronised" if device.type == "cuda" else "processor time of the process",
        "threads": torch.get_num_threads(),
        **{name: version(name) for name in ("torch", "transformers", "nnsight")},
    }


def known(settings: dict[str, Any]) -> bool:
    """Whether it was measured before."""
    lines = FILE.read_text(encoding="utf-8").splitlines() if FILE.exists() else []
    return any(settings.items() <= json.loads(line).items() for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--again", action="store_true", help="also what was measured before")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    given = parser.parse_args()
    device = torch.device(given.device)
    for size in given.sizes:
        for name in given.models:
            settings = settings_of(name, size, given, device)
            if known(settings) and not given.again:
                continue
            on = subject(name, size, given.seed, device)
            record = {"date": date.today().isoformat(), **settings, "cases": {}}
            print(f"{settings['model']}; {settings['input']}", flush=True)
            with torch.no_grad():
                for case in given.cases:
                    record["cases"][case] = found = compared(CASES[case], on, given.rounds, device)
                    print(f"  {case:40} {found}", flush=True)
            with FILE.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
