"""Batches of similar length against batches as they are drawn: processor time of an epoch, and tokens with padding.

    python benchmarks/length_groups.py --data ../shared/data/sst2 --vocabulary FOLDER_OF_VOCAB_TXT

A tiny BERT of one layer learns from one of two by KD, on a seeded share of SST-2, one epoch each way; the ways take
turns, and the median of the ratios of a turn is given. Tokens with padding for each real one are counted from the order
of the epoch, on all of the training set too. One JSON object is written to --out.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

import distill
from distill.training.schedule import lengths_to_group, order

WAYS = {"grouped": None, "as drawn": False}


def tiny(layers: int, seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256, "num_labels": 2}
    names = {0: "negative", 1: "positive"}
    return BertForSequenceClassification(BertConfig(num_hidden_layers=layers, id2label=names, **sizes))


def padded(rows: Any, schedule: distill.Schedule) -> float:
    """Tokens with padding for each real one in an epoch."""
    lengths = torch.tensor([len(row) for row in rows.table["input_ids"]])
    grouping = lengths_to_group(rows, schedule)
    numbers = range(schedule.per_epoch(len(rows)))
    batches: list[Tensor] = list(order(len(rows), schedule, numbers, lengths=grouping))
    return sum(len(batch) * int(lengths[batch].max()) for batch in batches) / int(lengths.sum())


def epoch(teacher: Any, rows: Any, schedule: distill.Schedule) -> float:
    """Processor time [s] of the steps of an epoch, without those before the first one ends."""
    records = distill.steps(teacher, tiny(1, 1), data=rows, objective=distill.KD(), schedule=schedule)
    next(records)
    began = time.process_time()
    for _ in records:
        pass
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--vocabulary", type=Path, required=True)
    parser.add_argument("--fraction", type=float, default=0.06)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = BertTokenizerFast(vocab=str(given.vocabulary / "vocab.txt"))
    whole = distill.tasks.load("sst2", data=given.data, tokenizer=tokenizer).train
    rows = distill.tasks.load("sst2", data=given.data, tokenizer=tokenizer, fraction=given.fraction).train
    schedules = {name: distill.Schedule(epochs=1, batch_size=32, group_by_length=way) for name, way in WAYS.items()}
    teacher = tiny(2, 0)
    times: list[dict[str, float]] = []
    for turn in range(given.turns):
        names = list(WAYS) if turn % 2 == 0 else list(WAYS)[::-1]
        times.append({name: epoch(teacher, rows, schedules[name]) for name in names})
    found = {
        "rows": len(rows),
        "batch_size": 32,
        "processor time of an epoch [s]": {name: [round(each[name], 2) for each in times] for name in WAYS},
        "grouped / as drawn": round(median(each["grouped"] / each["as drawn"] for each in times), 3),
        "tokens with padding / real tokens": {
            name: {"these rows": round(padded(rows, each), 3), "all rows": round(padded(whole, each), 3)}
            for name, each in schedules.items()
        },
        "machine": f"{platform.machine()} cpu, 1 thread, torch {torch.__version__}",
    }
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
