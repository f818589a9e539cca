"""Where a real language model holds the number of a subject, and in how many directions: swaps, DAS, and controls.

    python benchmarks/verb_number.py --model ../shared/data/models/stories260K --seeds 0 1 2

Three causal models of which verb comes next ("was" or "were"), each first compared with what the model answers:

- `subject`: "Next to the dogs, the cat", by the number of the cat. The subject is the last noun and the last token, so
  the positions "subject" and "end" are one, and the whole vector there after the last block is all that is read.
- `far subject`: "The cat near the dogs", by the number of the cat.
- `near noun`: the same sentences, by the number of the dogs: what a model does that goes by the nearest noun.

For each, the accuracy of whole vectors swapped at every layer and token. For the first one then the same search at the
end with k learned directions, and DAS at the middle block by k: for the model with its controls, and learned anew for a
copy of it with new weights.
Figures are of 1000 held-out pairs; do nothing scores about a half, whatever the place. In random weights, too,
directions are found that make the answer follow the source wherever the number changes, because the last token shows
it; where it does not change, such a network answers as badly as before. So `effective` alone would call it perfect.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from matplotlib.patches import Rectangle
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

import distill
from distill import CausalModel, InterchangeAccuracy
from distill.tasks.causal.verb_number import BETWEEN, verb_number
from interventions import Location, Picture, Rotation

QUIET = Console(quiet=True)
TOKENS = ("attractor", "subject", "end")
SEARCH = {"steps": 60, "batch_size": 32}
ALIGN = {"steps": 100, "batch_size": 64}
PAIRS = 1000


def hypotheses(tokenizer: PreTrainedTokenizerBase) -> dict[str, CausalModel]:
    exchanged = [template.format(subject="{attractor}", attractor="{subject}") for template in BETWEEN]
    return {
        "subject": verb_number(tokenizer),
        "far subject": verb_number(tokenizer, templates=BETWEEN),
        "near noun": verb_number(tokenizer, templates=exchanged),
    }


@torch.no_grad()
def behaviour(causal_model: CausalModel, network: nn.Module, seed: int) -> dict[str, float]:
    """The share of sampled sentences that the network continues as the causal model says."""
    values = causal_model.sample(PAIRS, torch.Generator().manual_seed(seed))
    answers = causal_model.decode(network(**causal_model.encode(values)).logits, values).argmax(-1)
    right = (answers == causal_model.answers(values)).float()
    differ = values["subject_number"] != values["attractor_number"]
    return {"all": round(right.mean().item(), 4), "numbers differ": round(right[differ].mean().item(), 4)}


def searched(causal_model: CausalModel, network: nn.Module, places: list[Location], seed: int, dims: int = 0) -> dict:
    """The accuracy of every place and token, of whole vectors or of `dims` learned directions."""
    began = time.perf_counter()
    found = distill.search_alignment(
        causal_model,
        network,
        ["number"],
        places,
        positions=["end"] if dims else TOKENS,
        subspace=(lambda: Rotation(dims, seed=seed)) if dims else None,
        **SEARCH,
        pairs=PAIRS,
        seed=seed,
        console=QUIET,
    )
    return {
        "seed": seed,
        "dims": dims or "all",
        "iia": [[round(value, 4) for value in row] for row in found.iia[0].tolist()],
        "do nothing": found.outcomes[0].do_nothing,
        "replace all": found.outcomes[0].replace_all,
        "seconds": round(time.perf_counter() - began, 1),
    }


def aligned(
    network: nn.Module, causal_model: CausalModel, place: Location, dims: int, seed: int, *, controls: str
) -> dict:
    began = time.perf_counter()
    mapping = {"number": Location(place.layer, subspace=Rotation(dims, seed=seed))}
    learned = distill.align(
        causal_model,
        network,
        mapping,
        positions="end",
        **ALIGN,
        pairs=PAIRS,
        seed=seed,
        controls=controls,
        console=QUIET,
    )
    measured = learned.accuracy
    assert isinstance(measured, InterchangeAccuracy)
    return {
        "seed": seed,
        "dims": dims,
        "iia": measured.iia,
        "effective": measured.overall.effective_iia,
        "do nothing": measured.overall.do_nothing,
        "controls": {name: outcome.iia.value for name, outcome in measured.controls.items()},
        "seconds": round(time.perf_counter() - began, 1),
    }


def mean(values: list[float]) -> float:
    return statistics.fmean(values)


def cells(runs: list[dict]) -> list[list[float]]:
    """The mean over seeds of every place and token."""
    return torch.tensor([run["iia"] for run in runs]).mean(0).tolist()


def span(values: list[float]) -> str:
    return f"{mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def table(result: dict) -> str:
    """Means over seeds; in brackets the least and the largest."""
    lines = ["behaviour                  all                   numbers differ"]
    for name, runs in result["behaviour"].items():
        told = [span([run[which] for run in runs]) for which in ("all", "numbers differ")]
        lines.append(f"{name:26} {told[0]:21} {told[1]}")
    for name, runs in result["whole vectors"].items():
        lines += ["", f"{name + ', whole vectors':26} " + " ".join(f"{token:>9}" for token in TOKENS)]
        for place, row in zip(result["places"], cells(runs), strict=True):
            lines.append(f"{place:26} " + " ".join(f"{value:9.3f}" for value in row))
        lines.append(
            f"{'do nothing, replace all':26} "
            + " ".join(f"{mean([run[x] for run in runs]):9.3f}" for x in ("do nothing", "replace all"))
        )
    ks = sorted({run["dims"] for run in result["directions"]})
    lines += ["", f"{'k directions at the end':26} " + " ".join(f"{'k = ' + str(k):>9}" for k in ks)]
    found = [cells([run for run in result["directions"] if run["dims"] == k]) for k in ks]
    for number, place in enumerate(result["places"]):
        lines.append(f"{place:26} " + " ".join(f"{grid[number][0]:9.3f}" for grid in found))
    lines += ["", f"{'DAS at ' + result['middle']:26} " + " ".join(f"{'k = ' + str(k):21}" for k in ks)]
    for name, pick in ROWS.items():
        told = [span([pick(run) for run in result["aligned"] if run["dims"] == k]) for k in ks]
        lines.append(f"{name:26} " + " ".join(f"{text:21}" for text in told))
    return "\n".join(line.rstrip() for line in lines)


ROWS = {
    "model": lambda run: run["model"]["iia"],
    "random directions": lambda run: run["model"]["controls"]["subspace"],
    "told of other sources": lambda run: run["model"]["controls"]["labels"],
    "other weights, not learned": lambda run: run["model"]["controls"]["network"],
    "other weights, learned": lambda run: run["new weights"]["iia"],
    "… where the number changes": lambda run: run["new weights"]["effective"],
    "do nothing": lambda run: run["model"]["do nothing"],
}


def plot(result: dict) -> Picture:
    figure = Picture(figsize=(10.5, 6.4), dpi=110, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.05))
    heat = above.subplots(1, 3, sharey=True)
    texts = {
        "subject": "“Next to the dogs, the cat …”\nby the number of the cat",
        "far subject": "“The cat near the dogs …”\nby the number of the cat",
        "near noun": "“The cat near the dogs …”\nby the number of the dogs",
    }
    places = ["embedding" if name == "embedding" else f"block {name.split('.')[-1]}" for name in result["places"]]
    for axes, (name, runs) in zip(heat, result["whole vectors"].items(), strict=True):
        grid = cells(runs)
        image = axes.imshow(grid, vmin=0.5, vmax=1, cmap="viridis", aspect="auto")
        for row, values in enumerate(grid):
            for column, value in enumerate(values):
                axes.text(
                    column,
                    row,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="w" if value < 0.8 else "0.15",
                )
        first = 0.5 if name == "subject" else 1.5  # there the subject ends the sentence
        edge = "w" if grid[-1][2] < 0.8 else "0.15"
        box = {"fill": False, "linestyle": "--", "edgecolor": edge}
        axes.add_patch(Rectangle((first + 0.04, len(grid) - 1.46), 2.42 - first, 0.9, **box))
        # Templates name the noun that the hypothesis is about "subject".
        nouns = {
            "subject": ("dogs", "cat", "end"),
            "far subject": ("dogs", "cat", "end"),
            "near noun": ("cat", "dogs", "end"),
        }
        axes.set_xticks(range(3), nouns[name])
        axes.set_yticks(range(len(places)), places)
        axes.tick_params(length=0, labelsize=8)
        axes.spines[:].set_visible(False)
        share = mean([run["all"] for run in result["behaviour"][name]])
        axes.set_title(f"{texts[name]}\nanswers right: {share:.3f}", fontsize=9)
    heat[1].set_xlabel("dashed: the vector that the answer is read from, so a swap is a run of the source", fontsize=8)
    above.colorbar(image, ax=heat, label="IIA, whole vectors", pad=0.01)
    left, right = below.subplots(1, 2)
    ks = sorted({run["dims"] for run in result["directions"]})
    grids = {k: cells([run for run in result["directions"] if run["dims"] == k]) for k in ks}
    colours = ["#cc6677", "#ddaa33", "#228833", "#4477aa", "#aa3377", "0.2"]
    for number, place in enumerate(places):
        left.plot(ks, [grids[k][number][0] for k in ks], "o-", label=place, color=colours[number % 6], markersize=4)
    left.set_title("the subject's number in k directions at the end", fontsize=9)
    styles = {
        "model": ("o-", "#4477aa"),
        "other weights, learned": ("o-", "#cc6677"),
        "random directions": ("s--", "0.45"),
        "do nothing": (":", "0.1"),
    }
    for name, (style, colour) in styles.items():
        values = [[ROWS[name](run) for run in result["aligned"] if run["dims"] == k] for k in ks]
        right.plot(ks, list(map(mean, values)), style, color=colour, label=name, markersize=4)
        right.fill_between(ks, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.15, linewidth=0)
    right.set_title(f"DAS after block {result['middle'].split('.')[-1]}, with controls", fontsize=9)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ks, map(str, ks))
        axes.set(xlabel="directions", ylabel="IIA")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=7, frameon=False, loc="lower right" if axes is left else (0.6, 0.67))
    left.set_ylim(0.85, 1.01)
    right.set_ylim(0.45, 1.02)
    return figure


def machine() -> str:
    chip, threads = platform.processor() or platform.machine(), torch.get_num_threads()
    return f"{chip}, {threads} thread{'' if threads == 1 else 's'}, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, or a name on the Hub, of a causal language model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--dims", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    asked = parser.parse_args()
    began = time.perf_counter()
    logging.disable_progress_bar()
    network = AutoModelForCausalLM.from_pretrained(asked.model).eval()
    causal_models = hypotheses(AutoTokenizer.from_pretrained(asked.model))
    layers = network.config.num_hidden_layers
    places = [Location(site="embedding"), *map(Location, range(layers))]
    middle = Location(layers // 2)
    result = {
        "model": Path(asked.model).name,
        "machine": machine(),
        "settings": {"search": SEARCH, "align": ALIGN, "pairs": PAIRS, "seeds": asked.seeds},
        "places": list(map(str, places)),
        "tokens": TOKENS,
        "middle": str(middle),
        "behaviour": {
            name: [behaviour(each, network, seed) for seed in asked.seeds] for name, each in causal_models.items()
        },
        "whole vectors": {
            name: [searched(each, network, places, seed) for seed in asked.seeds]
            for name, each in causal_models.items()
        },
        "directions": [],
        "aligned": [],
    }
    numbers = causal_models["subject"]
    for seed in asked.seeds:
        copy = distill.reinitialized(network, seed)
        for k in asked.dims:
            learned = {
                "model": aligned(network, numbers, middle, k, seed, controls="all"),
                "new weights": aligned(copy, numbers, middle, k, seed, controls="subspace"),
            }
            result["aligned"].append({"seed": seed, "dims": k, **learned})
            print(json.dumps(result["aligned"][-1]), flush=True)
            result["directions"].append(searched(numbers, network, places, seed, k))
            print(json.dumps(result["directions"][-1]), flush=True)
    result["seconds"] = round(time.perf_counter() - began, 1)
    asked.out.write_text(json.dumps(result, indent=1) + "\n")
    plot(result).savefig(asked.out.with_suffix(".png"))
    print("\n" + table(result))


if __name__ == "__main__":
    main()
