"""What a language model's answers add to its text: a student of 2 layers with CausalLM alone, and with KD beside it.

    python benchmarks/causal_lm.py --model ../shared/data/models/stories260K --seeds 0 1 2
    python benchmarks/causal_lm.py --model ../shared/data/models/stories260K --text train.txt.gz --held-out valid.txt.gz

Students start from evenly spread layers of the teacher, the same for both objectives. Without --text, the rows are what
the teacher says itself, sampled at temperature 1 and drawn anew for every seed; those to test on are other samples, on
which no student can expect to be better than the teacher. Perplexity is exp of the mean cross-entropy of each next
token, over all rows to test on. One JSON line for each run is appended to --out; what it has already is not run again.
"""

import argparse
import gzip
import json
import platform
import time
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import distill

OBJECTIVES = {
    "CausalLM": lambda: [distill.CausalLM()],
    "KD(1.0) + CausalLM": lambda: [distill.KD(1.0), distill.CausalLM()],
    "KD(1.0)": lambda: [distill.KD(1.0)],
}


def said(teacher: Any, rows: int, tokens: int, seed: int) -> Tensor:
    """What the teacher says, `[rows, tokens]`, from the token that begins a text."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        begins = torch.full((rows, 1), teacher.config.bos_token_id)
        settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
        # A text that ends is followed by another, so that all rows are of one length.
        return teacher.generate(
            begins, attention_mask=begins * 0 + 1, max_new_tokens=tokens - 1, eos_token_id=[], **settings
        )


def read(path: Path, tokenizer: Any, rows: int, tokens: int) -> Tensor:
    """The first rows of a text, one after the other, each after the token that begins a text."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        text = file.read(rows * tokens * 8)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    if len(ids) < rows * (tokens - 1):
        raise SystemExit(f"{path} has {len(ids)} tokens, too few for {rows} rows of {tokens}; give fewer --rows.")
    table = ids[: rows * (tokens - 1)].view(rows, tokens - 1)
    return torch.cat([torch.full((rows, 1), tokenizer.bos_token_id or 1), table], 1)


@torch.no_grad()
def perplexity(model: Any, rows: Tensor) -> float:
    training = model.training
    model.eval()
    losses = [
        cross_entropy(model(input_ids=part).logits[:, :-1].flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
        for part in rows.split(64)
    ]
    model.train(training)
    return (sum(losses) / rows[:, 1:].numel()).exp().item()


def trained(
    teacher: nn.Module, student: nn.Module, rows: Tensor, objective: list[distill.Objective], schedule: distill.Schedule
) -> tuple[dict[str, float], float]:
    """The terms of the last tenth of the training, and the seconds it took."""
    data = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    began = time.perf_counter()
    records = list(distill.steps(teacher, student, data=data, objective=objective, schedule=schedule))
    last = records[-max(1, len(records) // 10) :]
    return {name: mean(r.terms[name] for r in last) for name in last[0].terms}, time.perf_counter() - began


def table(runs: list[dict]) -> str:
    """Perplexities by objective, means over seeds and each."""
    lines = []
    for key in dict.fromkeys((run["text"], run["objective"], run["schedule"]["steps"]) for run in runs):
        mine = [run for run in runs if (run["text"], run["objective"], run["schedule"]["steps"]) == key]
        found = [run["perplexity"]["student"] for run in mine]
        before, teacher = (mean(run["perplexity"][name] for run in mine) for name in ("untrained", "teacher"))
        each = ", ".join(f"{value:.3f}" for value in found)
        lines.append(
            f"{key[0]:>8} {key[2]:>5} steps  {key[1]:<20} {mean(found):8.3f} ({each})   "
            f"before training {before:.2f}, teacher {teacher:.3f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Train, measure, append."""
    options = argparse.ArgumentParser()
    options.add_argument("--model", type=Path, required=True)
    options.add_argument("--layers", type=int, default=2)
    options.add_argument("--text", type=Path, help="to train on; None: what the teacher says")
    options.add_argument("--held-out", type=Path, help="to test on, with --text")
    options.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES)[:2])
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--steps", type=int, default=300)
    options.add_argument("--batch-size", type=int, default=32)
    options.add_argument("--lr", type=float, default=1e-3)
    options.add_argument("--rows", type=int, default=1024)
    options.add_argument("--held-out-rows", type=int, default=512)
    options.add_argument("--tokens", type=int, default=64)
    options.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    asked = options.parse_args()
    if (asked.text is None) != (asked.held_out is None):
        options.error("--text and --held-out go together")
    teacher = AutoModelForCausalLM.from_pretrained(asked.model).eval()
    done = [json.loads(line) for line in asked.out.read_text().splitlines()] if asked.out.exists() else []
    for seed in asked.seeds:
        sizes = {"layers": asked.layers, "rows": asked.rows, "held_out": asked.held_out_rows, "tokens": asked.tokens}
        schedule = distill.Schedule(steps=asked.steps, batch_size=asked.batch_size, lr=asked.lr, seed=seed)
        name = "sampled" if asked.text is None else f"{asked.text.parent.name}/{asked.text.name}"
        about = {"model": asked.model.name, "text": name, "sizes": sizes, "schedule": asdict(schedule)}
        known = [run["objective"] for run in done if {key: run[key] for key in about} == json.loads(json.dumps(about))]
        left = [objective for objective in asked.objectives if objective not in known]
        if not left:
            continue
        if asked.text is None:
            train = said(teacher, asked.rows, asked.tokens, seed)
            test = said(teacher, asked.held_out_rows, asked.tokens, seed + 10_000)
        else:
            tokenizer = AutoTokenizer.from_pretrained(asked.model)
            train = read(asked.text, tokenizer, asked.rows, asked.tokens)
            test = read(asked.held_out, tokenizer, asked.held_out_rows, asked.tokens)
        for objective in left:
            student = distill.from_layers(teacher, asked.layers)
            before = perplexity(student, test)
            terms, seconds = trained(teacher, student, train, OBJECTIVES[objective](), schedule)
            found = {"student": perplexity(student, test), "untrained": before, "teacher": perplexity(teacher, test)}
            run = {
                **about,
                "objective": objective,
                "perplexity": {key: round(value, 4) for key, value in found.items()},
                "last_terms": {key: round(value, 4) for key, value in terms.items()},
                "seconds": round(seconds, 1),
                "machine": f"{platform.machine()} cpu, {torch.get_num_threads()} threads, torch {torch.__version__}",
            }
            print(json.dumps(run), flush=True)
            with asked.out.open("a") as log:
                log.write(json.dumps(run) + "\n")
            done.append(json.loads(json.dumps(run)))
    print(table(done))


if __name__ == "__main__":
    main()
