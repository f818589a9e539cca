"""Names obey no terminal and no browser; no pickle and no code in any folder or file that is read runs."""

import base64
import io
import json
import os
import pickle
import re
import stat
import sys
import unicodedata
from contextlib import suppress
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import distill
import interventions
from distill.alignment.alignment import Alignment
from distill.cli import main
from distill.cli.report import ComparedModel, Report
from distill.errors import DistillError
from distill.evaluation.evaluate import Evaluation
from distill.evaluation.interchange_result import InterchangeAccuracy
from distill.evaluation.outcome import Outcome
from distill.interchange.mapping import Entry
from distill.models.preprocessors import preprocessors_of
from distill.models.pretrained import load_classifier, load_tokenizer
from distill.results import FitResult, curves
from distill.statistics.intervals import wilson
from distill.tasks import Rows, Task
from distill.teachers.cache import Cache
from distill.training.progress import Plain, Record, show_progress
from interventions import InterventionError, Location, heat_map, printable

HOSTILE = "a\x1b]0;title\x07\x1b[2J\x9b31m\rb\x08\u202ec\u2066[red]d[/red]<script>alert(1)</script>$x$\udcff\n"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.mark.parametrize("start", range(0, 0x3000, 0x400))
def test_what_is_printable(start):
    for code in range(start, start + 0x400):
        character = chr(code)
        kind, direction = unicodedata.category(character), unicodedata.bidirectional(character)
        obeyed = (kind in ("Cc", "Zl", "Zp") or direction in OF_DIRECTION) and character not in "\n\t"
        shown = printable(f"a{character}b")
        assert (shown != f"a{character}b") == (obeyed or code in (0x200E, 0x200F, 0x61C)), hex(code)
        assert printable(shown) == shown
        assert not OBEYED.search(shown)


OF_DIRECTION = ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI")


def outcome() -> Outcome:
    return Outcome(wilson(9, 10), 0.5, 0.5, 0.5, 0.5, 0.1, None, 10, 2)


def evaluation() -> Evaluation:
    return Evaluation(wilson(9, 10), InterchangeAccuracy(outcome(), {HOSTILE: outcome()}, {}), HOSTILE)


def records() -> tuple[Record, ...]:
    return tuple(Record(step, 3, 1.0, {HOSTILE: 0.5}, 1e-3) for step in (1, 2, 3))


def report() -> Report:
    rows = Rows({"x": torch.zeros(4, 2), "labels": torch.arange(4) % 2}, classes=(HOSTILE, "b"))
    task = Task(HOSTILE, rows, rows, (HOSTILE, "b"), description=HOSTILE)
    fitted = FitResult(nn.Linear(2, 2), records(), evaluation(), {HOSTILE: HOSTILE})
    return Report(HOSTILE, task, [ComparedModel(HOSTILE, 1, 2, evaluation(), 1.0, fitted)], {HOSTILE: HOSTILE})


def of_names(written: str) -> str:
    """What is written, without the escape sequences that Rich itself makes."""
    return re.sub(r"\x1b\[[0-9;]*m|\x1b\[\?25[lh]|\x1b\[2K|\x1b\[1A|\r", "", written)


@pytest.mark.parametrize("terminal", [False, True], ids=["piped", "terminal"])
@pytest.mark.parametrize(
    "show",
    [
        lambda console: console.print(report().table()),
        lambda console: console.print(f"report: {HOSTILE}", markup=False),
        lambda console: list(show_progress(records(), HOSTILE, console)),
    ],
    ids=["table", "line", "progress"],
)
def test_consoles_show_names_and_obey_none(show, terminal):
    console = Plain(file=io.StringIO(), width=400, force_terminal=terminal, color_system=None)
    show(console)
    written = console.file.getvalue()
    assert not OBEYED.search(of_names(written))
    assert "[red]d[/red]" in written


def test_a_console_of_the_users_own_gets_printable_progress():
    console = Console(file=io.StringIO(), width=300, force_terminal=False)
    list(show_progress(records(), HOSTILE, console))
    console.print(report().table())
    assert not OBEYED.search(console.file.getvalue())
    assert "[red]d[/red]" in console.file.getvalue()


@pytest.mark.parametrize("kind", [DistillError, InterventionError])
def test_errors_are_printable(kind):
    assert not OBEYED.search(str(kind(f"no class {HOSTILE}")))


def test_results_are_printable():
    fitted = FitResult(nn.Linear(2, 2), records(), evaluation(), {})
    saved = Alignment((), evaluation().interchange, records(), {})
    net = nn.Sequential()
    net.add_module(HOSTILE.replace(".", ""), nn.Linear(2, 2))
    for result in (evaluation(), fitted, evaluation().interchange, saved):
        assert not OBEYED.search(str(result))
        if hasattr(result, "_repr_html_"):
            assert "<script" not in result._repr_html_()
            assert not OBEYED.search(result._repr_html_())
    assert not OBEYED.search(interventions.describe(net))
    with interventions.intervene(net, module=next(iter(net._modules)), op=interventions.Zero()) as handle:
        net(torch.ones(1, 2))
    assert not OBEYED.search(repr(handle))


def test_pictures_draw_names_and_no_formulas():
    name = "$\\frac{\x1b\r\u202e$"
    for picture in (
        heat_map(torch.eye(2), [name, "b"], [name, 1], label=name, column_label=name),
        curves({name: tuple(Record(1, 1, 1.0, {name: 0.5}, 1e-3) for _ in "ab")}),
        InterchangeAccuracy(outcome(), {name: outcome()}, {}).plot(),
    ):
        assert picture._repr_png_()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", "--data", f"{HOSTILE}.csv"],
        ["fit", "--task", HOSTILE],
        ["fit", "--mapping", HOSTILE],
        ["fit", "--objective", HOSTILE],
        ["fit", "--resume", HOSTILE],
        ["evaluate", HOSTILE],
        ["teach", "--task", "pvr", "--from", HOSTILE, "--output", "x"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]) if len(arguments) > 2 else arguments[0],
)
def test_the_command_line_says_one_line_that_is_printable(arguments, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["distill", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert not OBEYED.search(out + err)
    assert len(err.splitlines()) == 1


class Page(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.images, self.policy, self.style, self.text, self.inside = [], [], "", "", "", ""

    def handle_starttag(self, tag, attributes):
        told = dict(attributes)
        self.tags.append(tag)
        self.inside = tag
        assert not any(name.startswith("on") or name == "style" for name in told)
        if tag == "img":
            self.images.append(told["src"])
        if told.get("http-equiv") == "Content-Security-Policy":
            self.policy = told["content"]

    def handle_data(self, data):
        if self.inside == "style":
            self.style += data
        else:
            self.text += data

    def handle_endtag(self, tag):
        self.inside = ""


def test_the_page_of_a_report_runs_nothing_and_shows_all():
    written = report().html()
    page = Page()
    page.feed(written)
    assert not OBEYED.search(written)
    assert not {"script", "iframe", "object", "embed", "link", "form", "base"} & set(page.tags)
    assert page.text.count("<script>alert(1)</script>") >= 5
    assert {"h1", "table", "pre", "img"} <= set(page.tags)
    rules = dict(rule.strip().split(" ", 1) for rule in page.policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    # The one style of the page is the one that its policy lets a browser use: else it would be shown bare.
    assert rules["style-src"] == f"'sha256-{base64.b64encode(sha256(page.style.encode()).digest()).decode()}'"
    for image in page.images:
        assert base64.b64decode(image.removeprefix("data:image/png;base64,"))[:4] == b"\x89PNG"


class Planted:
    """Makes a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def planted(marker: Path, form: str) -> bytes:
    buffer = io.BytesIO()
    if form == "pickle":
        return pickle.dumps(Planted(marker))
    torch.save({"weight": Planted(marker)}, buffer, _use_new_zipfile_serialization=form == "zip")
    return buffer.getvalue()


NAMES = [
    "pytorch_model.bin", "model.pt", "optimizer.bin", "scheduler.bin", "sampler.bin", "scaler.pt",
    "random_states_0.pkl", "custom_checkpoint_0.pkl", "training_args.bin", "rows.pkl", "answers.pkl", "seen.pkl",
    "tensors.pt",
]  # fmt: skip
FORMS = ["zip", "legacy", "pickle"]


def plant(folder: Path, marker: Path, form: str) -> int:
    """Plant in a folder and all below: beside what is there, and in place of all that is no JSON."""
    count = 0
    for each in [folder, *(inner for inner in folder.rglob("*") if inner.is_dir())]:
        there = [file.name for file in each.iterdir() if file.is_file() and file.suffix not in (".json", ".jsonl")]
        for name in {*NAMES, *there}:
            (each / name).write_bytes(planted(marker, form))
            count += 1
    return count


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.first(x).relu())


def data() -> dict[str, torch.Tensor]:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    return {"x": x, "labels": (x[:, 0] > 0).long()}


def classifier(folder: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=20, num_labels=2
    )
    BertForSequenceClassification(config).save_pretrained(folder)


def made(what: str, folder: Path):
    """A folder of a kind, and what reads it."""
    net = Student()
    if what == "checkpoint":
        from distill.training.checkpoints import Checkpoints

        schedule = distill.Schedule(steps=2, batch_size=8)
        kept = Checkpoints(folder / "checkpoints", every=1)
        list(distill.steps(None, net, data=data(), objective=distill.Labels(), schedule=schedule, checkpoints=kept))
        again = Checkpoints(folder / "checkpoints", every=1, resume=True)
        return lambda: list(
            distill.steps(
                None, Student(), data=data(), objective=distill.Labels(), schedule=schedule, checkpoints=again
            )
        )
    if what == "classifier":
        classifier(folder)
        return lambda: load_classifier(folder)
    if what == "classifier without safetensors":
        classifier(folder)
        (folder / "model.safetensors").unlink()
        return lambda: load_classifier(folder)
    if what == "tokenizer":
        classifier(folder)
        return lambda: load_tokenizer(folder)
    if what == "preprocessors":
        classifier(folder)
        teacher = load_classifier(folder)
        return lambda: preprocessors_of(teacher)
    if what == "cache":
        cache = Cache(folder, {"teacher": "t"})
        cache.put("run/abcd", {"logits": torch.ones(2)})
        return lambda: Cache(folder, {"teacher": "t"}).get("run/abcd")
    if what == "interventions":
        rotation = interventions.Rotation(2, width=4)
        interventions.save(folder, {Location(module="first", subspace=rotation): interventions.Swap()}, model=net)
        return lambda: interventions.load(folder, net)
    if what == "alignment":
        place = Location(module="first", subspace=interventions.Rotation(2, width=4))
        Alignment((Entry(("inner",), (place,)),)).save(folder, net)
        return lambda: Alignment.load(folder, net)
    raise AssertionError(what)


KINDS = [
    "checkpoint", "classifier", "classifier without safetensors", "tokenizer", "preprocessors", "cache",
    "interventions", "alignment",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("what", KINDS)
def test_no_pickle_in_a_folder_runs(what, form, tmp_path):
    read = made(what, tmp_path / "folder")
    marker = tmp_path / "ran"
    assert plant(tmp_path / "folder", marker, form) >= len(NAMES)
    with suppress(Exception):  # what it says is said elsewhere
        read()
    assert not marker.exists()


@pytest.mark.parametrize("form", FORMS)
def test_what_is_planted_would_run(form, tmp_path):
    marker, file = tmp_path / "ran", tmp_path / "file"
    file.write_bytes(planted(marker, form))
    if form == "pickle":
        pickle.loads(file.read_bytes())
    else:
        torch.load(file, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("name", ["rows.pkl", "rows.pt", "rows.csv", "rows.jsonl", "rows.tsv", "rows.npz", "mnist.npz"])
def test_no_pickle_in_a_data_file_runs(name, tmp_path):
    marker = tmp_path / "ran"
    file = tmp_path / name
    if name.endswith(".npz"):
        import numpy as np

        held = np.empty(1, dtype=object)
        held[0] = Planted(marker)
        np.savez(file, x_train=held, y_train=held, x_test=held, y_test=held)
    else:
        file.write_bytes(planted(marker, "pickle"))
    for read in (lambda: distill.tasks.load(data=file), lambda: distill.tasks.load("mnist", data=file)):
        with suppress(Exception):
            read()
    assert not marker.exists()


CODE = "from pathlib import Path\nPath({!r}).touch()\n\n\nclass Mine:\n    pass\n"
REMOTE = {
    "AutoConfig": "mine.Mine", "AutoModelForSequenceClassification": "mine.Mine", "AutoModel": "mine.Mine",
    "AutoTokenizer": ["mine.Mine", None],
}  # fmt: skip


@pytest.mark.parametrize("answer", ["", "y\n"], ids=["nobody there", "somebody who would say yes"])
@pytest.mark.parametrize("read", [load_classifier, load_tokenizer, lambda folder: interventions_main(folder)])
def test_no_code_in_a_model_folder_runs(read, answer, tmp_path, monkeypatch):
    marker, folder = tmp_path / "ran", tmp_path / "model"
    folder.mkdir()
    (folder / "mine.py").write_text(CODE.format(str(marker)))
    told = {"model_type": "mine", "auto_map": REMOTE, "architectures": ["MineForSequenceClassification"]}
    (folder / "config.json").write_text(json.dumps(told))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": REMOTE, "tokenizer_class": "Mine"}))
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    monkeypatch.setattr("builtins.input", lambda *asked: answer.strip())
    with pytest.raises((DistillError, InterventionError)) as said:
        read(folder)
    assert "\n" not in str(said.value)
    assert not marker.exists()


def interventions_main(folder: Path) -> None:
    from interventions.__main__ import _model

    _model(str(folder))


def test_a_cache_is_its_owners(tmp_path):
    before = os.umask(0)
    try:
        Cache(tmp_path / "new", {"teacher": "t"}).put("run/abcd", {"logits": torch.ones(2)})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    (tmp_path / "shared").mkdir(mode=0o755)
    Cache(tmp_path / "shared", {"teacher": "t"})
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o755
