"""Memory and processor time of data sets of text that do not fit into memory, and of the first step on them.

    python benchmarks/data.py [--megabytes 200] [--steps 300]

Texts of words drawn at random are written into a folder by `save_to_disk`. A process of its own tokenizes them; two
others train a small language model on them, one for a single step, one for more, and report their resident memory
beside that of the same training on a few texts, how much of it the library `datasets` takes, and the processor time
until the first step. Nothing is downloaded.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".json")
WORDS, LENGTH = 2000, 120
"""Different words, and words of a text."""
BATCH = 16


def write_texts(folder: Path, megabytes: float) -> None:
    """Write so many megabytes of texts into a folder by `save_to_disk`."""
    import datasets
    import numpy as np

    draw = np.random.default_rng(0)
    words = np.array(["".join(chr(97 + c) for c in draw.integers(0, 26, draw.integers(2, 9))) for _ in range(WORDS)])

    def texts() -> Any:
        written = 0
        while written < megabytes * 1e6:
            text = " ".join(words[draw.integers(0, WORDS, draw.integers(LENGTH // 2, LENGTH * 3 // 2))])
            written += len(text)
            yield {"text": text}

    cache = str(folder.parent / "generated")
    datasets.Dataset.from_generator(texts, cache_dir=cache).save_to_disk(str(folder))


def save_model(folder: Path) -> None:
    """Save a small language model with a tokenizer of words in a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    made.train_from_iterator(["the cat likes the bird and the dog"] * 4, trainer)
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>").save_pretrained(
        folder
    )
    sizes = dict(hidden_size=64, intermediate_size=172, num_hidden_layers=3, num_attention_heads=4)
    config = LlamaConfig(vocab_size=len(made.get_vocab()), max_position_embeddings=256, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)


def train(model: str, data: str, steps: int) -> None:
    """Train for some steps and print what it took as JSON; as a process of its own."""
    import psutil
    from transformers import AutoModelForCausalLM

    import distill
    from distill import KD, Schedule
    from distill.tasks.loading import training_rows

    teacher = AutoModelForCausalLM.from_pretrained(model)
    student = distill.from_layers(teacher, [0])
    few = {"text": ["the cat likes the bird and the dog " * 20] * 64}
    schedule = Schedule(steps=steps, batch_size=BATCH, lr=1e-4)
    list(distill.steps(teacher, student, {}, training_rows(few, teacher), objective=KD(), schedule=schedule))
    process = psutil.Process()
    before, began, first = process.memory_info().rss, time.process_time(), 0.0
    import datasets  # noqa: F401

    library = process.memory_info().rss - before
    rows = training_rows(data, teacher)
    for _ in distill.steps(teacher, student, {}, rows, objective=KD(), schedule=schedule):
        first = first or time.process_time() - began
    print(
        json.dumps(
            {
                "rows": len(rows),
                "steps": steps,
                "memory more than on 64 texts [MB]": round((process.memory_info().rss - before) / 1e6, 1),
                "of it the library datasets [MB]": round(library / 1e6, 1),
                "processor time until the first step [s]": round(first, 2),
            }
        )
    )


def apart(folder: Path, steps: int) -> dict[str, Any]:
    """Return what a process of its own that trains for some steps printed."""
    command = [sys.executable, __file__, "--train", str(folder / "model"), str(folder / "texts"), "--steps", str(steps)]
    settings = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(command, capture_output=True, text=True, env=settings, check=True)
    return dict(json.loads(found.stdout.strip().splitlines()[-1]))


def main() -> None:
    """Measure, and write the figures beside this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--train", nargs=2, metavar=("MODEL", "DATA"))
    parser.add_argument("--output", type=Path, default=FILE)
    given = parser.parse_args()
    if given.train:
        train(*given.train, given.steps)
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_texts(place / "texts", given.megabytes)
        save_model(place / "model")
        began = os.times()
        anew = apart(place, 1)
        ended = os.times()
        found = {
            "settings": {"megabytes": given.megabytes, "batch_size": BATCH, "words": WORDS, "words of a text": LENGTH},
            "tokenizing and one step [s of processor time]": round(ended[2] + ended[3] - began[2] - began[3], 1),
            "rows": anew["rows"],
            "once tokenized": [apart(place, steps) for steps in (1, given.steps)],
            "tokens on disk [MB]": round(sum(p.stat().st_size for p in (place / "cache").rglob("*.arrow")) / 1e6, 1),
        }
    given.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
