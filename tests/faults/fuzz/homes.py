"""What the command line is tried on: a tiny teacher, a student, a finished run, files of data; whole and damaged."""

import contextlib
import gzip
import io
import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

from distill.cli import main
from tests.distill.conftest import save_bert, sentences, write_csv


def distill(*arguments: Any) -> tuple[int, str, str]:
    """Return exit status, standard output and error of the command line, run in this process."""
    out, err, before, form = io.StringIO(), io.StringIO(), sys.argv, warnings.formatwarning
    sys.argv = ["distill", *map(str, arguments)]
    status: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            main.main()
    except SystemExit as stop:
        status = stop.code or 0
    finally:
        sys.argv, warnings.formatwarning = before, form
    return status, out.getvalue(), err.getvalue()


def made(folder: Path) -> Path:
    """Make all of it in a folder."""
    write_csv(folder / "films.csv", sentences(24))
    write_csv(folder / "test.csv", sentences(8, seed=3))
    save_bert(folder / "encoder", classifier=False, layers=2)
    teach = ["teach", "--data", folder / "films.csv", "--from", folder / "encoder", "--output", folder / "teacher"]
    _need(distill(*teach, "--steps", 1))
    fit = ["fit", "--data", folder / "films.csv", "--teacher", folder / "teacher", "--any-teacher"]
    _need(distill(*fit, "--objective", "kd", "--steps", 1, "--batch-size", 8, "--output", folder / "run"))
    _need(distill(*fit, "--objective", "labels", "--steps", 1, "--batch-size", 8, "--output", folder / "other"))
    shutil.copytree(folder / "run" / "kd" / "student", folder / "student")
    files_in(folder / "files")
    for name, damage in DAMAGES.items():
        for whole, copy in (("teacher", "teacher"), ("student", "student"), ("run", "run"), ("run", "stopped")):
            shutil.copytree(folder / whole, folder / f"{copy} {name}")
            damage(folder / f"{copy} {name}")
    return folder


def _need(ended: tuple[int, str, str]) -> None:
    assert ended[0] == 0, ended


def files_in(folder: Path) -> None:
    """Write files of data that are damaged or odd in every way."""
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "folder.csv").mkdir()


LONG = "the cat " * 20_000
ROWS = [f"the good cat {i},positive\nthe bad dog {i},negative\n" for i in range(6)]
TABLE = "text,label\n" + "".join(ROWS)
OBJECTS = [{"text": f"the {'good' if i % 2 else 'bad'} cat", "label": str(i % 2)} for i in range(12)]
LINES = "".join(json.dumps(each) + "\n" for each in OBJECTS)
FILES: dict[str, str | bytes] = {
    "empty.csv": "",
    "blank.csv": "\n\n\n",
    "header.csv": "text,label\n",
    "one row.csv": "text,label\nthe cat,positive\n",
    "one class.csv": "text,label\n" + "the cat,positive\n" * 6,
    "binary.csv": bytes(range(256)) * 20,
    "zeros.csv": b"\0" * 500,
    "latin.csv": TABLE.replace("cat", "chât").encode("latin-1"),
    "utf16.csv": TABLE.encode("utf-16"),
    "mark.csv": b"\xef\xbb\xbf" + TABLE.encode(),
    "twice.csv": TABLE.replace("text,label", "text,text"),
    "unnamed.csv": TABLE.replace("text,label", ","),
    "long row.csv": TABLE + "a,b,c,d\n",
    "short row.csv": TABLE + "a\n",
    "quote.csv": TABLE + '"the cat,positive\n',
    "no text.csv": TABLE + ",positive\n",
    "no label.csv": TABLE + "the cat,\n",
    "semicolons.csv": TABLE.replace(",", ";"),
    "tabs.csv": TABLE.replace(",", "\t"),
    "real labels.csv": "text,label\n" + "".join(f"the cat,{i / 7}\n" for i in range(12)),
    "many labels.csv": "text,label\n" + "".join(f"the cat,name{i}\n" for i in range(12)),
    "unknown labels.csv": TABLE.replace("positive", "unsure"),
    "nan labels.csv": TABLE.replace("positive", "nan"),
    "control.csv": TABLE.replace("good", "go\x1b[31mod\x07"),
    "returns.csv": TABLE.replace("\n", "\r"),
    "long text.csv": TABLE + f"{LONG},positive\n",
    "other columns.csv": TABLE.replace("text,label", "a,b"),
    "empty.tsv": "",
    "commas.tsv": TABLE,
    "good.tsv": TABLE.replace(",", "\t"),
    "empty.jsonl": "",
    "good.jsonl": LINES,
    "cut.jsonl": LINES[:-9],
    "words.jsonl": "nonsense\n",
    "numbers.jsonl": "1\n2\n3\n",
    "lists.jsonl": "[1]\n[2]\n",
    "null.jsonl": "null\n" * 4,
    "nan.jsonl": LINES.replace('"1"', "NaN"),
    "nested.jsonl": LINES.replace('"1"', '{"a": [1]}'),
    "twice.jsonl": '{"text": "a", "text": "b", "label": "c"}\n' * 4,
    "missing.jsonl": LINES + '{"label": "1"}\n',
    "null text.jsonl": LINES + '{"text": null, "label": "1"}\n',
    "list text.jsonl": LINES + '{"text": ["a"], "label": "1"}\n',
    "deep.jsonl": "[" * 100_000 + "\n",
    "huge number.jsonl": '{"text": "a", "label": ' + "9" * 5000 + "}\n",
    "surrogate.jsonl": LINES + '{"text": "\\ud800 cat", "label": "1"}\n',
    "empty.txt": "",
    "good.txt": "the good cat\nthe bad dog\n" * 6,
    "binary.txt": bytes(range(256)),
    "cut.csv.gz": gzip.compress(TABLE.encode())[:-12],
    "plain.csv.gz": TABLE,
    "good.csv.gz": gzip.compress(TABLE.encode()),
    "noise.csv.gz": b"\x1f\x8b" + b"\x07" * 60,
    "table.xlsx": b"PK\x03\x04" + b"\0" * 40,
    "table": TABLE,
}
"""Names of files and what they hold."""
FINE = {
    "mark.csv", "good.tsv", "good.jsonl", "good.txt", "good.csv.gz", "long text.csv", "control.csv", "returns.csv",
    "other columns.csv",
}  # fmt: skip
"""Those that can be read; what their labels are is another question."""


def cut(path: Path) -> None:
    """Leave the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def each_file(folder: Path, ending: str, change: Any) -> None:
    """Change the files of an ending."""
    for path in sorted(folder.rglob(f"*{ending}")):
        change(path)


DAMAGES: dict[str, Any] = {
    "with cut weights": lambda folder: each_file(folder, ".safetensors", cut),
    "with empty weights": lambda folder: each_file(folder, ".safetensors", lambda path: path.write_bytes(b"")),
    "without weights": lambda folder: each_file(folder, ".safetensors", Path.unlink),
    "with cut json": lambda folder: each_file(folder, ".json", cut),
    "with empty json": lambda folder: each_file(folder, ".json", lambda path: path.write_text("")),
    "with lists": lambda folder: each_file(folder, ".json", lambda path: path.write_text("[1, 2]")),
    "with binary json": lambda folder: each_file(folder, ".json", lambda path: path.write_bytes(bytes(range(256)))),
    "with null": lambda folder: each_file(folder, ".json", lambda path: path.write_text("null")),
    "with braces": lambda folder: each_file(folder, ".json", lambda path: path.write_text("{}")),
    "without json": lambda folder: each_file(folder, ".json", Path.unlink),
    "without config": lambda folder: each_file(folder, "config.json", Path.unlink),
    "without tokenizer": lambda folder: each_file(folder, "tokenizer.json", Path.unlink),
    "with a cut tokenizer": lambda folder: each_file(folder, "tokenizer.json", cut),
    "with a cut log": lambda folder: each_file(folder, ".jsonl", cut),
    "with folders": lambda folder: each_file(folder, ".json", lambda path: (path.unlink(), path.mkdir())),
}
"""What is done to folders."""
MENDED = {
    "with cut weights", "with empty weights", "without weights", "without config", "without tokenizer",
    "with a cut tokenizer", "with a cut log",
}  # fmt: skip
"""What a run that goes on finds, says and makes again."""
