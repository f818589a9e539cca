"""Perplexity of untrained students by importance, on stories that the model wrote itself.

    python benchmarks/importance.py --data ../shared/data --json benchmarks/importance.json

The model is stories260K (a Llama of 5 layers, width 64, 8 heads with 4 key heads, 172 neurons). It samples
stories at temperature 1 among the 50 likeliest tokens; importance is measured on the first half and perplexity on the
other half. `permuted` has the neurons of each layer in a random order, as the order in which a model was trained is no
promise. `Minitron` sums the absolute activations of a neuron, without its output weights (Muralidharan et al. 2024,
arXiv:2407.14679, section 2.2).
"""

import argparse
import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from distill import Rows, from_layers, from_width, importance
from distill.metrics import perplexity
from interventions import Location, run

STORIES, TOKENS, SEED = 200, 64, 0


def main() -> None:
    """Measure all students, print their perplexity, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    teacher = AutoModelForCausalLM.from_pretrained(given.data / "models" / "stories260K").eval()
    stories = sampled(teacher)
    seen, held_out = stories[: STORIES // 2], Rows({"input_ids": stories[STORIES // 2 :]})
    figures = {
        name: round(perplexity(each, held_out), 2) for name, each in students(teacher, Rows({"input_ids": seen}))
    }
    for name, value in figures.items():
        print(f"{name:45} {value:10.2f}")
    if given.json:
        settings = {
            "stories": STORIES,
            "tokens": TOKENS,
            "seed": SEED,
            "temperature": 1.0,
            "top_k": 50,
            "unit": "perplexity",
        }
        given.json.write_text(json.dumps({"settings": settings, "perplexity": figures}, indent=2) + "\n")


def sampled(teacher: nn.Module) -> torch.Tensor:
    """Return stories of the model, `[story, token]`, each from the token that begins a text."""
    torch.manual_seed(SEED)
    begin = torch.full((STORIES, 1), teacher.config.bos_token_id)
    return teacher.generate(begin, do_sample=True, max_new_tokens=TOKENS - 1, pad_token_id=0)


def students(teacher: nn.Module, rows: Rows):
    """Yield the names and the models that are measured."""
    yield "teacher", teacher
    mixed = permuted(teacher)
    found, other = importance(teacher, rows), importance(mixed, rows)
    activations = replace(found, neurons=summed(teacher, rows))
    for count in (129, 86):
        yield f"{count} neurons, the first", from_width(teacher, intermediate=count)
        yield f"{count} neurons, the first of permuted", from_width(mixed, intermediate=count)
        yield f"{count} neurons, importance", from_width(teacher, intermediate=count, by=found)
        yield f"{count} neurons, importance of permuted", from_width(mixed, intermediate=count, by=other)
        yield f"{count} neurons, Minitron", from_width(teacher, intermediate=count, by=activations)
    for count in (6, 4):
        yield f"{count} heads, the first", from_width(teacher, heads=count)
        yield f"{count} heads, importance", from_width(teacher, heads=count, by=found)
    for width in (56, 48):
        sizes = {"heads": 8, "intermediate": 172}
        yield f"width {width}, the first", from_width(teacher, width, **sizes)
        yield f"width {width}, importance", from_width(teacher, width, **sizes, by=found)
    for count in (4, 3):
        yield f"{count} layers, spread", from_layers(teacher, count)
        yield f"{count} layers, block influence {found.most_layers(count)}", from_layers(teacher, count, by=found)
        for criterion in ("kl", "loss"):
            by = importance(teacher, rows, search=count, criterion=criterion)
            yield f"{count} layers, search by {criterion} {by.most_layers(count)}", from_layers(teacher, count, by=by)
    for layers in combinations(range(5), 3):
        yield f"layers {layers}", from_layers(teacher, layers)


def permuted(teacher: nn.Module) -> nn.Module:
    """Return a copy whose neurons are in a random order in each layer."""
    copied = from_layers(teacher, len(teacher.model.layers))
    draw = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for layer in copied.model.layers:
            order, part = torch.randperm(copied.config.intermediate_size, generator=draw), layer.mlp
            for projection, axis in ((part.gate_proj, 0), (part.up_proj, 0), (part.down_proj, 1)):
                projection.weight.copy_(projection.weight.index_select(axis, order))
    return copied


def summed(teacher: nn.Module, rows: Rows) -> dict[Location, torch.Tensor]:
    """Return the mean absolute activation of each neuron."""
    places = [Location(layer, "mlp_activation") for layer in range(len(teacher.model.layers))]
    with torch.no_grad():
        states = run(teacher, rows.batch(range(len(rows))), places).activations
    return {at: states[at].abs().double().mean((0, 1)) for at in places}


if __name__ == "__main__":
    main()
