"""Audits of a real language model: pruned, and with noise in one head that accuracy does not show.

    python benchmarks/audit.py --model ../shared/data/models/stories260K [--rows 200] [--examples 64] [--pairs 200]

The rows are stories that the model writes itself (60 tokens each, seed 0). In the first model 30 % of the weights of
each linear layer but the last are set to zero, the smallest ones; in the second, noise of their own size is added to
the query weights of head 1 of block 2. Each is audited by `distill audit` from folders, as a user would; what it prints
is printed. One JSON line is appended to `audit.json`: the commit, the settings, and for each audit its seconds, its
sentences, what is said of the answers, and the ten parts that changed most.
"""

import argparse
import copy
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.utils import prune

FILE = Path(__file__).with_suffix(".json")
COMMAND_LINE = "from distill.cli.main import main; main()"
BLOCK, HEAD = 2, 1


def write_stories(model: Any, tokenizer: Any, rows: int, path: Path) -> None:
    """Let the model write stories, and save them as a file with a column by which they can be sliced."""
    torch.manual_seed(0)
    start = torch.full((rows, 1), tokenizer.bos_token_id)
    written = model.generate(start, do_sample=True, max_new_tokens=60, pad_token_id=0)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["text", "who"])
        for tokens in written:
            text = " ".join(tokenizer.decode(tokens, skip_special_tokens=True).split())
            table.writerow([text, "girl" if " girl" in text else "boy" if " boy" in text else "other"])


def pruned(model: Any) -> Any:
    """Return a copy in which the smallest 30 % of the weights of each linear layer but the last are zero."""
    changed = copy.deepcopy(model)
    for name, module in changed.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            prune.l1_unstructured(module, "weight", 0.3)
            prune.remove(module, "weight")
    return changed


def planted(model: Any) -> Any:
    """Return a copy with noise in the query weights of one head."""
    changed = copy.deepcopy(model)
    size = model.config.hidden_size // model.config.num_attention_heads
    weight = changed.model.layers[BLOCK].self_attn.q_proj.weight
    with torch.no_grad():
        rows = weight[HEAD * size : (HEAD + 1) * size]
        rows += torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)) * weight.std()
    return changed


def audit(original: str, compressed: Path, data: Path, options: list[str]) -> dict[str, Any]:
    """Audit a model by the command line, and return what its `result.json` says, with the seconds."""
    output, start = compressed.with_name(f"{compressed.name}-audit"), time.monotonic()
    command = [sys.executable, "-c", COMMAND_LINE, "audit", original, str(compressed), "--data", str(data)]
    subprocess.run([*command, "--slice", "who", "--output", str(output), *options], check=True)
    seconds, found = time.monotonic() - start, json.loads((output / "result.json").read_text("utf-8"))
    parts = sorted(found["parts"], key=lambda part: -part["divergence"])[:10]
    kept = {name: found[name] for name in ("sentences", "behaviour", "settings")}
    return {"seconds": round(seconds, 1), **kept, "parts": parts, "itself": found["controls"]["itself"]}


def main() -> None:
    """Make the models and the rows, audit both, and append a line to the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=200)
    settings = parser.parse_args()
    model = transformers.AutoModelForCausalLM.from_pretrained(settings.model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(settings.model)
    options = ["--examples", str(settings.examples), "--pairs", str(settings.pairs)]
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_stories(model, tokenizer, settings.rows, folder / "stories.csv")
        for change in (pruned, planted):
            saved = folder / change.__name__
            change(model).save_pretrained(saved)
            tokenizer.save_pretrained(saved)
            found[change.__name__] = audit(settings.model, saved, folder / "stories.csv", options)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    line = {
        "date": str(date.today()), "commit": commit.strip(), "torch": version("torch"),
        "threads": os.environ.get("OMP_NUM_THREADS"), **vars(settings), "audits": found,
    }  # fmt: skip
    with FILE.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
