"""Natural language inference with several quantifiers: a transformer trained by interchanges (IIT) beside a plain one.

    OMP_NUM_THREADS=1 python benchmarks/mqnli_iit.py --data ../shared/data/mqnli --seeds 0 1 2

The network is fed the words of both sentences slot by slot: a token is what a linear layer makes of the premise's word
and the hypothesis's, so there are nine, after [CLS]. Six blocks read them. IIT is told where each node of the tree
should be: half of one token after one block, nodes that are computed from others after later blocks. The plain network
is trained on behaviour only: it has the same weights at first, the same bases, steps, batch and learning rate, is told
nothing, and is measured under the same mapping. An IIT step also runs sources and counterfactuals, so it takes longer.

The causal model draws the training rows beforehand. Each is a base once, in one step (the files' 20,000 would be
repeated), and other rows serve as sources. Behaviour is measured on the files' test rows, interchanges on pairs that
the causal model draws. "Do nothing" is what a network's answers to the bases would reach, "neutral" what that answer
would reach whatever is interchanged: most interchanges in the middle of the tree make the answer neutral, so a figure
below that shows no computation. What is in the JSON already is not run again.
"""

import argparse
import json
import platform
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

import distill
from distill.tasks.causal.mqnli import NODES, multiply_quantified, rows, vocabulary
from distill.tasks.causal.mqnli_files import INPUTS
from distill.tasks.causal.natural_logic import LABELS
from interventions import Location

WIDTH, BLOCKS = 64, 6
PLACES = {
    "vp": (0, "premise_verb"),
    "object_np": (0, "premise_object_noun"),
    "subject_np": (0, "premise_subject_noun"),
    "object_dp": (1, "premise_object_determiner"),
    "negated_object_dp": (2, "premise_object_determiner"),
    "negated_vp": (3, "premise_negation"),
    "subject_dp": (4, "premise_subject_determiner"),
    "negated_subject_dp": (5, "[CLS]"),
}
"""After which block a node should be, and in which token: that of both sentences' words in the premise's slot."""
MAPPING = {node: Location(block, dims=range(WIDTH // 2)) for node, (block, _) in PLACES.items()}
POSITIONS = {node: token for node, (_, token) in PLACES.items()}
ALIGNED = {"IIT": MAPPING, "behaviour only": {}}
QUIET = Console(quiet=True)
MACHINE = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


class Network(nn.Module):
    """Pairs of words, transformer blocks, and the answer from [CLS]."""

    def __init__(self, words: int) -> None:
        super().__init__()
        slots = len(INPUTS) // 2
        self.words, self.pair = nn.Embedding(words, WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.start, self.places = nn.Embedding(1, WIDTH), nn.Embedding(1 + slots, WIDTH)
        block = {"nhead": 4, "dim_feedforward": 2 * WIDTH, "dropout": 0.0, "activation": "gelu", "norm_first": True}
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(WIDTH, batch_first=True, **block) for _ in range(BLOCKS))
        )
        self.norm, self.answer = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, words: Tensor) -> Tensor:
        """`words` is `[batch, slot, premise or hypothesis]`."""
        pairs = self.pair(self.words(words).flatten(2))
        start = self.start.weight.expand(len(words), 1, WIDTH)
        states = self.blocks(torch.cat([start, pairs], 1) + self.places.weight)
        return self.answer(self.norm(states[:, 0]))


def slot_by_slot(folder: Path) -> distill.CausalModel:
    """`multiply_quantified`, for a network that is fed `words`."""
    model = multiply_quantified(folder)
    given = {name: model.domains[name].values for name in model.variables}
    return distill.CausalModel(
        inputs={name: given[name] for name in model.inputs},
        mechanisms=model.mechanisms,
        output=model.output,
        encode=lambda values: {"words": torch.stack(list(by_slot(values)), 1)},
        sample=model.sample,
        domains={name: given[name] for name in model.mechanisms},
        positions={name: model.positions[name] for name in POSITIONS.values()},  # a premise's words keep their places
    )


def by_slot(values: dict[str, Tensor]) -> Iterable[Tensor]:
    half = len(INPUTS) // 2
    for premise, hypothesis in zip(INPUTS[:half], INPUTS[half:], strict=True):
        yield torch.stack([values[premise], values[hypothesis]], 1)


def network(words: int, seed: int) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(words)


def measured(kind: str, schedule: distill.Schedule, *, folder: Path, pairs: int) -> dict:
    seed, model = schedule.seed, slot_by_slot(folder)
    net = network(len(vocabulary(folder)), seed)
    drawn = model.sample(schedule.steps * schedule.batch_size, torch.Generator().manual_seed(seed))
    told = distill.IIT(positions=POSITIONS) if ALIGNED[kind] else distill.IIT()
    test = rows(folder, "test")
    unseen = {name: test[name] for name in model.inputs}
    fitted = distill.fit(
        model, net, ALIGNED[kind], drawn, objective=told, schedule=schedule, eval_data=unseen, console=QUIET
    )
    began = time.perf_counter()
    found = distill.interchange_accuracy(model, net, MAPPING, positions=POSITIONS, pairs=pairs, seed=1)
    return {
        "network": kind,
        "schedule": asdict(schedule),
        "behaviour": round(fitted.accuracy, 4),
        "last losses": {name: round(value, 4) for name, value in last(fitted.records).items()},
        "pairs": pairs,
        "nodes": {node: figures(each) for node, each in zip(MAPPING, found.per_pair.values(), strict=True)},
        "all nodes": figures(found.overall),
        "seconds to train": round(fitted.seconds, 1),
        "seconds to measure": round(time.perf_counter() - began, 1),
    }


def last(records: tuple[distill.Record, ...], count: int = 100) -> dict[str, float]:
    """Means of the terms over the last steps."""
    chosen = records[-count:]
    return {name: sum(each.terms[name] for each in chosen) / len(chosen) for name in chosen[-1].terms}


def figures(outcome: distill.Outcome) -> dict[str, float]:
    """Interchange accuracy; that of interchanges which change the answer; and what ignoring them all would reach."""
    named = {
        "iia": outcome.iia.value,
        "effective": outcome.effective_iia,
        "do nothing": outcome.do_nothing,
        "effect rate": outcome.effect_rate,
    }
    return {name: round(value, 4) for name, value in named.items()}


def always_neutral(model: distill.CausalModel, pairs: int) -> dict[str, dict[str, float]]:
    """What a network that answers neutral to everything would reach, on pairs of the same distribution."""
    generator, neutral = torch.Generator().manual_seed(1), LABELS.index("neutral")
    base, source = (model.run(model.sample(pairs, generator)) for _ in range(2))
    before, found = model.answers(base), {}
    for node in MAPPING:
        right = (wanted := model.answers(model.interchange(base, {node: source}))) == neutral
        shares = {"iia": right, "effective": right[wanted != before]}
        found[node] = {name: round(share.double().mean().item(), 4) for name, share in shares.items()}
    return found


def table(runs: list[dict], neutral: dict[str, dict[str, float]]) -> str:
    """Means over the seeds, and the lowest and highest of behaviour and of all nodes."""
    kinds = {kind: [run for run in runs if run["network"] == kind] for kind in ALIGNED}
    heads = ("IIA", "effective", "do nothing")
    lines = ["".ljust(20) + "".join(f"{kind + ', ' + str(len(found)) + ' seeds':34}" for kind, found in kinds.items())]
    lines.append(
        "node".ljust(20) + "".join(f"{head:11}" for head in heads).ljust(34) * len(kinds) + "neutral: IIA, effective"
    )
    for node in (*NODES, "all nodes"):
        lines.append(node.ljust(20))
        for found in kinds.values():
            each = [run["all nodes"] if node == "all nodes" else run["nodes"][node] for run in found]
            means = [sum(one[name.replace("IIA", "iia")] for one in each) / max(1, len(each)) for name in heads]
            lines[-1] += "".join(f"{mean:<11.3f}" for mean in means).ljust(34)
        lines[-1] += "".join(f"{share:<11.3f}" for share in neutral.get(node, {}).values())
    for kind, found in kinds.items():
        columns = {
            "behaviour": [run["behaviour"] for run in found],
            "IIA of all nodes": [run["all nodes"]["iia"] for run in found],
            "effective IIA of all nodes": [run["all nodes"]["effective"] for run in found],
            "seconds to train": [run["seconds to train"] for run in found],
        }
        for name, values in columns.items():
            if values:
                lines.append(f"{kind}: {name} {sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of mqnli_train.jsonl.gz")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    asked = parser.parse_args()
    done = json.loads(asked.out.read_text()) if asked.out.exists() else {"machine": MACHINE, "runs": []}
    chosen = []
    for seed in asked.seeds:
        schedule = distill.Schedule(steps=asked.steps, batch_size=64, lr=2e-3, seed=seed)
        for kind in ALIGNED:
            same = [run for run in done["runs"] if (run["network"], run["schedule"]) == (kind, asdict(schedule))]
            if not same:
                same = [measured(kind, schedule, folder=asked.data, pairs=asked.pairs)]
                done["runs"] += same
                asked.out.write_text(json.dumps(done, indent=1) + "\n")
            chosen += same
            print(
                f"{kind}, seed {seed}: behaviour {same[0]['behaviour']}, {same[0]['seconds to train']} s to train",
                flush=True,
            )
    done["always neutral"] = always_neutral(slot_by_slot(asked.data), 10_000)
    asked.out.write_text(json.dumps(done, indent=1) + "\n")
    print(table(chosen, done["always neutral"]))


if __name__ == "__main__":
    main()
