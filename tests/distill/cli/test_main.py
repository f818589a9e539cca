"""The command line, end to end on tiny models: what it writes, what it refuses, and how it stops."""

import contextlib
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest
import torch
import transformers

from distill.cli import main, messages
from distill.cli.compare import students_of_runs
from distill.cli.fit_command import FitCommand
from distill.cli.options.groups import DataOptions, InterchangeOptions
from distill.comparison.compare import compare
from distill.errors import OtherProcessFailed
from distill.evaluation.evaluate import evaluate
from distill.interchange.kinds import USUAL, usual_kinds
from distill.models.pretrained import load_classifier, load_tokenizer, save_teacher
from distill.tasks import Recipe
from distill.tasks.loading import EMBEDDED
from tests.distill.conftest import save_bert, sentences, write_csv

REPOSITORY = Path(__file__).parents[3]


KIND = "answering token"


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Measured on 40 pairs, of two kinds, timed over 2 steps, in a folder of one's own; no colour asked for."""
    monkeypatch.setattr("distill.evaluation.measurement.MOST_PAIRS", 40)
    monkeypatch.setattr("distill.cli.evaluate.evaluate", partial(evaluate, pairs=40))
    monkeypatch.setattr("distill.cli.fit.compare", partial(compare, pairs=40))
    monkeypatch.setattr("distill.cli.fit.USUAL_KINDS", {KIND: usual_kinds()[KIND]})
    monkeypatch.setattr("distill.cli.student_runs.TIMED", 2)
    # The command line sets these before transformers is imported; here it was imported long ago.
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    monkeypatch.chdir(tmp_path)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def distill(*arguments, monkeypatch=None):
    """Exit status, standard output and error of the command line."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["distill", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main.main()
                status = 0
            except SystemExit as stop:
                status = stop.code or 0
    finally:
        sys.argv = before
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="session")
def teacher(tmp_path_factory, encoder):
    """A classifier of the sentences, fine-tuned by `distill teach`."""
    folder = tmp_path_factory.mktemp("teacher")
    data = write_csv(folder / "films.csv", sentences(60))
    arguments = [
        "teach",
        "--data",
        data,
        "--from",
        encoder,
        "--output",
        folder / "t",
        "--steps",
        60,
        "--lr",
        0.01,
        "--batch-size",
        16,
    ]
    status, _out, err = distill(*arguments)
    assert status == 0, err
    return folder / "t"


def test_teach_saves_a_classifier_with_its_tokenizer(teacher):
    told = json.loads((teacher / "result.json").read_text())
    assert told["steps"] == 60
    assert (teacher / "tokenizer.json").exists()
    model = load_classifier(teacher)
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert told["evaluation"]["accuracy"]["value"] > 0.7


FIT = ["--steps", "5", "--batch-size", "8", "--student-layers", "2"]


def test_where_another_process_failed_the_command_that_goes_on_is_named(teacher, csv, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OtherProcessFailed("the training ended in all 2 processes; go on with the same call and resume=True.")

    monkeypatch.setattr("distill.cli.student_runs.fit", fails)
    run = tmp_path / "run"
    status, _out, err = distill("fit", "--data", csv, "--teacher", teacher, "--output", run, *FIT)
    told = f"distill: the training ended in all 2 processes; go on with: distill fit --resume {run}\n"
    assert (status, err) == (2, told)


def test_fit_then_evaluate(teacher, csv, tmp_path, monkeypatch):
    monkeypatch.setattr("distill.cli.fit.USUAL_KINDS", USUAL)
    run = tmp_path / "run"
    status, out, err = distill("fit", "--data", csv, "--teacher", teacher, "--output", run, *FIT)
    assert (status, err) == (0, "")
    assert not set("\x1b\r") & set(out)
    plan, steps = out.split("1 of 4, KD: step 1/5  loss", 1)
    assert plan.startswith("4 trainings, one after the other (KD, KD, equal time, KD + interchange")
    assert "40 interchanged pairs (IIA: the share" in " ".join(plan.split())
    assert "4 of 4, " in steps
    names = ["teacher", "untrained", "KD", "KD, equal time", "KD + interchange", "KD + augmented"]
    assert [name for name in names if re.search(rf"^ *{re.escape(name)} ", out, re.M)] == names
    table = out.split("kind of interchange")[1]
    assert "answering token" in table
    assert out.rstrip().endswith(f"report: {run / 'report.html'}")
    told = json.loads((run / "result.json").read_text())
    assert [model["name"] for model in told["models"]] == names
    assert len(told["sentences"]) == 4
    assert told["sentences"][0] in " ".join(out.split())
    assert "KD + interchange" in told["sentences"][0]
    assert told["comparison"]["runs"] == dict.fromkeys([*names[2:], "untrained"], 1)
    page = (run / "report.html").read_text()
    assert not re.search(r"https?://|src=\"(?!data:)", page)
    equal = json.loads((run / "kd-equal-time" / "result.json").read_text())
    ratio = json.loads((run / "times.json").read_text())["ratio"]
    assert equal["steps"] == equal["settings"]["schedule"]["steps"] == max(5, round(5 * ratio))
    for name, terms in (("kd", {"kd"}), ("diito", {"kd", "kd_cf"}), ("augmented", {"kd", "kd_aug"})):
        assert (run / name / "student" / "tokenizer.json").exists()
        last = json.loads((run / name / "log.jsonl").read_text().splitlines()[-1])
        assert last["terms"].keys() == terms
    status, again, err = distill("evaluate", run, "--pairs", 40)
    assert (status, err) == (0, "")
    for model in told["models"][2:]:
        overall = model["interchange"]["overall"]
        shown = f"{overall['iia']['value']:.3f}"
        if overall["effective"] is not None:
            shown += " +{value:.3f} \\[{low:.3f}, {high:.3f}\\]".format(**overall["effective"])
        assert re.search(rf"^ *{re.escape(model['name'])} .*{shown}", again, re.M)
    one = ["evaluate", "--student", run / "kd" / "student", "--teacher", teacher, "--data", csv, "--pairs", 40]
    status, alone, err = distill(*one)
    assert (status, err) == (0, "")
    assert f"{told['models'][2]['interchange']['overall']['iia']['value']:.3f}" in alone


def test_several_seeds_are_compared_over_them(teacher, csv, tmp_path):
    run = tmp_path / "run"
    seeds = ["--seeds", 3, 5, "--steps", "4", "--batch-size", "8", "--student-layers", "2"]
    status, out, err = distill("fit", "--data", csv, "--teacher", teacher, "--output", run, *seeds)
    assert (status, err) == (0, "")
    told = json.loads((run / "result.json").read_text())
    titles = ("KD", "KD, equal time", "KD + interchange", "KD + augmented")
    names = [f"{title}, seed {seed}" for title in titles for seed in (3, 5)]
    assert [model["name"] for model in told["models"]] == ["teacher", "untrained", *names]
    assert told["comparison"]["runs"] == dict.fromkeys([*titles, "untrained"], 2)
    assert told["sentences"][0].startswith("Over 2 seeds, ")
    for seed in (3, 5):
        settings = json.loads((run / f"seed-{seed}" / "diito" / "settings.json").read_text())
        assert settings["schedule"]["seed"] == seed
        assert len(settings["kinds"]) == 1
    assert max(map(len, out.split("accuracy")[0].splitlines())) <= 120
    status, again, err = distill("evaluate", run, "--pairs", 40)
    assert (status, err) == (0, "")
    assert [line.split("  ")[0].strip() for line in again.splitlines() if "seed" in line[:30]][1:] == names
    assert distill("fit", "--seeds", 1, 2, 1)[2] == (
        "distill: --seeds 1 2 1 names 1 twice, and one seed gives one student; name different ones: --seeds 0 1 2.\n"
    )


def test_compare_the_students_of_runs(teacher, csv, tmp_path):
    """Students of two seeds, on rows that none of them saw; written where a folder is named."""
    for seed in (0, 1):
        made = distill(
            "fit", "--data", csv, "--teacher", teacher, "--output", tmp_path / f"r{seed}", "--seed", seed, *FIT
        )
        assert made[0] == 0, made[2]
    runs, out = (tmp_path / "r0", tmp_path / "r1"), tmp_path / "found"
    status, text, err = distill("compare", *runs, "--pairs", 30, "--output", out)
    assert (status, err) == (0, "")
    assert "Over 2 seeds, " in text
    others = ("KD, equal time", "KD + interchange", "KD + augmented")
    assert re.search(r"^ +" + " +".join(re.escape(f"{each} − KD") for each in others) + "$", text, re.MULTILINE)
    assert "  answering token" in text
    told = json.loads((out / "compare.json").read_text())
    assert told["runs"] == dict.fromkeys(["KD", *others], 2)
    assert told["sentences"]["KD + interchange"] in text
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    status, one, err = distill("compare", runs[0], "--pairs", 30)
    assert (status, err) == (0, "")
    assert "One training of each student" in one
    status, _, err = distill("compare", *runs, "--output", out)
    assert status == 2
    assert err == f"distill: --output {out} exists; choose a new folder for compare.json and compare.png.\n"
    shutil.copytree(runs[0], tmp_path / "again")
    refused = distill("compare", runs[0], tmp_path / "again")[2]
    assert refused.startswith(f"distill: {runs[0]} and {tmp_path / 'again'} hold the same student, KD of seed 0, which")


def test_compare_a_run_that_searched_its_mapping(teacher, csv, tmp_path):
    options = ["--mapping", "search", "--objective", "kd", "--output", tmp_path / "r"]
    status, _, err = distill("fit", "--data", csv, "--teacher", teacher, *options, *FIT)
    assert status == 0, err
    distill("fit", "--data", csv, "--teacher", teacher, "--objective", "labels", "--output", tmp_path / "s", *FIT)
    shutil.copy(tmp_path / "r" / "mapping.json", tmp_path / "s" / "mapping.json")
    replace(FitCommand.read(tmp_path / "s"), interchanges=InterchangeOptions("search")).write(tmp_path / "s")
    status, text, err = distill("compare", tmp_path / "r", tmp_path / "s", "--pairs", 20)
    assert (status, err) == (0, "")
    assert "labels − KD" in text
    shutil.rmtree(tmp_path / "s" / "labels" / "student")
    (tmp_path / "s" / "labels" / "result.json").unlink()
    err = distill("compare", tmp_path / "r", tmp_path / "s")[2]
    assert err.startswith(
        f"distill: {tmp_path / 's' / 'labels'} holds no finished student; go on with the run: distill fit"
    )


def command(**settings):
    """The settings of a run, the data of which is a file."""
    return FitCommand(**{"source": DataOptions(data="films.csv"), "teacher": "t", **settings})


def test_which_students_are_seeds_of_one(tmp_path):
    """Those of runs that differ in the seed alone, or in which students they have."""
    a, b, c = (tmp_path / name for name in "abc")
    for run in (a, c):
        for student in ("kd", "diito"):
            (run / student).mkdir(parents=True)
    found = students_of_runs({a: command(), b: command(seed=1, objective="kd"), c: command(temperature=3.0)})
    assert found == {
        "KD": [a / "kd", b / "kd"], "KD + interchange": [a / "diito"], "KD (c)": [c / "kd"],
        "KD + interchange (c)": [c / "diito"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([{"objective": "kd"}], r"hold.? one student, KD, and nothing to compare it with; name a run of others too"),
        ([{}, {"teacher": "u"}], r"has --teacher t and .*b has u, and students are compared on the same rows"),
        ([{}, {"source": DataOptions(data="other.csv")}], r"has --data films.csv and .*b has other.csv"),
        ([{}, {"interchanges": InterchangeOptions(share=0.5)}], r"has --share 0.3 and .*b has 0.5"),
        ([{"teacher": None}, {"teacher": None, "seed": 1}], r"have other seeds and train teachers of their own"),
        ([], r"nowhere holds no run of distill fit to compare; name its folder: distill compare RUN"),
    ],
)
def test_runs_that_cannot_be_compared(settings, message, tmp_path):
    folders = [tmp_path / name for name in "ab"[: len(settings)]] or [tmp_path / "nowhere"]
    for folder, each in zip(folders, settings, strict=False):
        folder.mkdir()
        command(**each).write(folder)
    status, _, err = distill("compare", *folders)
    assert status == 2
    assert re.search(message, err)
    assert err.count("\n") == 1


@pytest.mark.parametrize("sources", ["in-context", "shuffle"])
def test_headroom_is_printed_before_a_fit(sources, teacher, csv, tmp_path):
    """The table and the advice that the function gives for the student of the command; nothing is written."""
    options = ["--data", csv, "--teacher", teacher, "--student-layers", "2", "--sources", sources, "--batch-size", "8"]
    status, out, err = distill("headroom", *options, "--steps", "3", "--batches", "2")
    assert status == 0, err
    assert "After 3 steps of KD(temperature=2.0), dropout off, 2 batches of 8 rows" in out
    assert {"in-context": "InContext(0.3), Span(0.3)", "shuffle": "Shuffle(), Span(0.3)"}[sources] in out
    lines = out.splitlines()
    (head,) = (number for number, line in enumerate(lines) if line.startswith("entry "))
    assert lines[head + 1].startswith("block_output.")
    assert lines[-1].startswith("After 3 steps of KD(temperature=2.0) the counterfactual loss of block_output.")
    assert list(tmp_path.glob("runs*")) == []
    assert distill("headroom", *options, "--steps", "3", "--batches", "2")[1] == out


def test_headroom_of_objectives_without_interchange_is_refused(teacher, csv):
    status, _, err = distill("headroom", "--data", csv, "--teacher", teacher, "--objective", "kd")
    assert status == 2
    assert err == (
        "distill: --objective kd interchanges nothing, so there is no headroom to measure; leave it out, or add diito: "
        "--objective kd,diito.\n"
    )


def test_every_student_is_measured_by_the_same_rule(teacher, csv, tmp_path):
    distill("fit", "--data", csv, "--teacher", teacher, "--output", tmp_path / "r", "--share", 0.6, *FIT)
    told = json.loads((tmp_path / "r" / "result.json").read_text())
    rules = {model["interchange"]["settings"]["positions"] for model in told["models"][1:]}
    assert len(rules) == 1
    assert rules.pop().startswith("Span(share=0.6")


@pytest.mark.parametrize(
    ("option", "sources", "note"),
    [
        ("--sources", "in-context", ""),
        ("--sources", "mixup", ""),
        ("--sources", "noise", ""),
        ("--pairs", "noise", "distill: --pairs is deprecated; write --sources noise.\n"),
    ],
)
def test_sources(option, sources, note, teacher, csv, tmp_path):
    arguments = ["--objective", "diito,labels", option, sources, "--mapping", "single", "--sigma", 0.5]
    status, _out, err = distill(
        "fit", "--data", csv, "--teacher", teacher, "--output", tmp_path / "r", *arguments, *FIT
    )
    assert (status, err) == (0, note)
    assert json.loads((tmp_path / "r" / "command.json").read_text())["interchanges"]["sources"] == sources
    last = json.loads((tmp_path / "r" / "diito+labels" / "log.jsonl").read_text().splitlines()[-1])
    assert last["terms"].keys() == {"kd", "kd_cf", "labels"}


@pytest.mark.parametrize(
    ("objective", "title", "terms"),
    [
        ("augmented", "KD + augmented", {"kd", "kd_aug"}),
        ("labels,diito,kd,augmented", "KD + labels + interchange + augmented", {"kd", "kd_cf", "kd_aug", "labels"}),
    ],
)
def test_on_texts_with_words_replaced(objective, title, terms, teacher, csv, tmp_path):
    arguments = ["fit", "--data", csv, "--teacher", teacher, "--output", tmp_path / "r", "--objective", objective, *FIT]
    status, _out, err = distill(*arguments)
    assert (status, err) == (0, "")
    told = json.loads((tmp_path / "r" / "result.json").read_text())
    assert [model["name"] for model in told["models"]] == ["teacher", "untrained", title]
    folder = tmp_path / "r" / objective.replace(",", "+")
    assert json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["terms"].keys() == terms
    assert "Augmented(InContext(share=0.3, words=tensor" in (folder / "settings.json").read_text()


def test_a_finished_run_resumed_gives_the_same_figures(teacher, csv, tmp_path):
    distill("fit", "--data", csv, "--teacher", teacher, "--output", tmp_path / "r", "--share", 0.5, *FIT)
    before = json.loads((tmp_path / "r" / "result.json").read_text())
    status, _out, err = distill("fit", "--resume", tmp_path / "r")
    assert (status, err) == (0, "")
    after = json.loads((tmp_path / "r" / "result.json").read_text())
    assert [m["interchange"] for m in after["models"]] == [m["interchange"] for m in before["models"]]
    assert [m["accuracy"] for m in after["models"]] == [m["accuracy"] for m in before["models"]]


def test_a_command_that_is_started_again_goes_on(teacher, csv, tmp_path):
    run = tmp_path / "r"
    command = [
        "fit",
        "--data",
        csv,
        "--teacher",
        teacher,
        "--resume",
        "auto",
        "--every",
        "1 minute",
        "--objective",
        "kd",
    ]
    assert distill(*command, *FIT)[0] == 2  # in which folder?
    assert distill(*command, *FIT, "--output", run)[0] == 0
    written = (run / "kd" / "student" / "model.safetensors").stat().st_mtime_ns
    status, _out, err = distill(*command, *FIT, "--output", run)
    assert (status, err) == (0, "")
    assert (run / "kd" / "student" / "model.safetensors").stat().st_mtime_ns == written
    status, _out, err = distill(*command, *FIT, "--output", run, "--temperature", 3)
    assert status == 2
    assert f"{run} was started with other options than these" in err


def test_a_mapping_is_searched_once_for_all_students_and_kept(teacher, csv, tmp_path, monkeypatch):
    run, arguments = tmp_path / "r", ["--data", csv, "--teacher", teacher, "--share", 0.5, *FIT]
    monkeypatch.setattr("distill.alignment.after_kd.PAIRS", 60)
    status, out, err = distill("fit", "--mapping", "search", "--output", run, *arguments)
    assert (status, err) == (0, "")
    kept = json.loads((run / "mapping.json").read_text())
    assert re.fullmatch(r"block_output.\d~block_output.0", kept["mapping"])
    assert kept["mapping"].replace("~", " ↔ ") in out
    assert (run / "mapping.png").read_bytes().startswith(b"\x89PNG")
    settings = [json.loads((run / each / "settings.json").read_text()) for each in ("kd", "diito")]
    assert {each["mapping"][0] for each in settings} == {kept["mapping"].replace("~", " ↔ ")}
    before = json.loads((run / "result.json").read_text())
    assert before["settings"]["mapping"] == kept["mapping"]
    monkeypatch.setattr("distill.cli.fit.search_after_kd", lambda *_, **__: pytest.fail("searched again"))
    assert distill("fit", "--resume", run)[0] == 0
    after = json.loads((run / "result.json").read_text())
    assert [m["interchange"] for m in after["models"]] == [m["interchange"] for m in before["models"]]


@pytest.fixture
def small_pvr(cache, monkeypatch):
    """The embedded task with few rows and a teacher of three steps."""
    from distill.tasks import pvr

    monkeypatch.setattr(pvr, "TRAIN_ROWS", 64)
    monkeypatch.setattr(pvr, "TEST_ROWS", 40)
    make = pvr.task

    def task():
        from dataclasses import replace

        return replace(make(), recipe=Recipe(steps=3, batch_size=16, lr=1e-3), student=None)

    monkeypatch.setitem(EMBEDDED, "pvr", task)
    return cache


def test_without_an_argument_the_embedded_task_runs(small_pvr, tmp_path):
    status, out, err = distill("fit", "--steps", 5, "--any-teacher", "--batch-size", 8)
    assert (status, err) == (0, "")
    assert out.splitlines()[0].startswith("teacher: step 1/3")
    assert "report: runs/pvr-1/report.html" in out
    assert (tmp_path / "runs" / "pvr-1" / "report.html").exists()
    status, out, err = distill("fit", "--steps", 2, "--any-teacher", "--batch-size", 8, "--objective", "kd")
    assert "teacher: step" not in out  # cached
    assert "report: runs/pvr-2/report.html" in out


def test_images_have_no_words_to_replace(small_pvr):
    status, out, err = distill("fit", "--any-teacher", "--objective", "augmented,labels")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "--objective augmented replaces tokens, and the rows of pvr are pixel_values, labels; use --objective" in err


def relabelled(folder, teacher, names):
    """The teacher with its outputs in the order of `names`, or, if these are others, called so."""
    model = load_classifier(teacher)
    if set(names) == {"negative", "positive"}:
        places = torch.tensor([["negative", "positive"].index(name) for name in names])
        with torch.no_grad():
            for parameter in model.classifier.parameters():
                parameter.copy_(parameter[places])
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    save_teacher(model, load_tokenizer(teacher), folder)
    return folder


def accuracies(run):
    return [model["accuracy"] for model in json.loads((run / "result.json").read_text())["models"]]


def test_classes_are_those_that_the_teacher_names(teacher, csv, tmp_path):
    one = ["--objective", "labels,kd", *FIT]
    status, _out, err = distill("fit", "--data", csv, "--teacher", teacher, "--output", tmp_path / "a", *one)
    assert (status, err) == (0, "")
    other = relabelled(tmp_path / "t", teacher, ("positive", "negative"))
    upper = write_csv(tmp_path / "upper.csv", [(text, name.upper()) for text, name in sentences(60)])
    status, out, err = distill("fit", "--data", upper, "--teacher", other, "--output", tmp_path / "b", *one)
    assert (status, err, "note:" in out) == (0, "", False)
    assert accuracies(tmp_path / "b") == accuracies(tmp_path / "a")
    assert json.loads((tmp_path / "b" / "result.json").read_text())["task"]["classes"] == ["positive", "negative"]
    student = load_classifier(tmp_path / "b" / "labels+kd" / "student")
    assert student.config.id2label == {0: "positive", 1: "negative"}
    status, _out, err = distill("evaluate", "--student", teacher, "--teacher", other, "--data", csv, "--pairs", 4)
    assert (status, err.count("\n")) == (2, 1)
    assert "other order, and their answers are compared output by output" in err


def test_classes_without_names_are_taken_in_sorted_order_or_as_told(teacher, csv, tmp_path):
    unnamed = relabelled(tmp_path / "t", teacher, ("LABEL_0", "LABEL_1"))
    arguments = ["fit", "--data", csv, "--teacher", unnamed, "--objective", "kd", *FIT]
    status, out, err = distill(*arguments, "--output", tmp_path / "a")
    assert (status, err) == (0, "")
    assert out.count("note: the model does not name its classes") == 1
    status, out, err = distill(*arguments, "--output", tmp_path / "b", "--classes", "negative,positive")
    assert (status, err, "note:" in out) == (0, "", False)
    assert accuracies(tmp_path / "a") == accuracies(tmp_path / "b")
    status, _out, err = distill(*arguments, "--output", tmp_path / "c", "--classes", "positive,negative")
    assert status == 2
    assert "or say in which order its classes are: --classes positive,negative" in err


@pytest.mark.parametrize("name", ["x.txt", "x.csv", "x.jsonl"])
def test_texts_without_labels(name, teacher, tmp_path):
    texts = [text for text, _ in sentences(40, seed=7)]  # others than the teacher's
    lines = {"x.txt": texts, "x.csv": ["text", *texts], "x.jsonl": [json.dumps({"text": text}) for text in texts]}
    (tmp_path / name).write_text("\n".join(lines[name]) + "\n")
    arguments = ["fit", "--data", tmp_path / name, "--teacher", teacher, "--output", tmp_path / "r"]
    status, out, err = distill(*arguments, *FIT)
    assert (status, err) == (0, "")
    assert re.search(r"^ +agreement +IIA", out, re.M)  # with the teacher, as there is no accuracy
    assert not any(line.split()[:1] == ["accuracy"] for line in out.splitlines())  # no column
    told = json.loads((tmp_path / "r" / "result.json").read_text())
    assert [model["accuracy"] for model in told["models"]] == [None] * 6
    assert all(0 <= model["agreement"]["value"] <= 1 for model in told["models"][1:])
    assert told["task"] == {"name": "x", "classes": [], "majority": None}
    assert all(model["interchange"]["overall"]["count"] for model in told["models"][1:])
    status, out, err = distill("evaluate", tmp_path / "r", "--pairs", 40)
    assert (status, err) == (0, "")
    status, _out, err = distill("teach", "--data", tmp_path / name, "--from", teacher, "--output", tmp_path / "t")
    assert (status, err.count("\n")) == (2, 1)
    assert "'x' has no labels to teach; add a column of them" in err


# --- bad input --------------------------------------------------------------------------------------------------------


def bad(case, tmp_path, teacher, csv):
    """The arguments of each bad input."""
    data = ["--data", csv, "--teacher", teacher]
    if case == "three labels":
        return [
            "--data",
            write_csv(tmp_path / "x.csv", [*sentences(30), *[("the cat", "unsure")] * 30]),
            "--teacher",
            teacher,
        ]
    if case == "two columns":
        return ["--data", write_csv(tmp_path / "x.csv", sentences(30), header="text,text"), "--teacher", teacher]
    if case == "no labels":
        (tmp_path / "x.txt").write_text("the cat\na dog\n" * 5)
        return ["--data", tmp_path / "x.txt", "--teacher", teacher, "--objective", "labels"]
    if case == "empty":
        return ["--data", write_csv(tmp_path / "x.csv", []), "--teacher", teacher]
    if case == "used":
        (tmp_path / "used").mkdir()
        (tmp_path / "used" / "result.json").touch()
        return [*data, "--output", tmp_path / "used"]
    return {
        "task": ["--task", "pwr"],
        "task and data": ["--task", "nonsense", "--data", csv],
        "column": [*data, "--label", "verdict"],
        "eval_data": [*data, "--eval-data", csv],
        "classes": [*data, "--classes", "negative"],
        "classes moved": [*data, "--classes", "positive,negative"],
        "no file": ["--data", tmp_path / "nothing.csv", "--teacher", teacher],
        "fraction": [*data, "--fraction", 0],
        "mapping layer": [*data, "--mapping", "block_output.9~block_output.0"],
        "mapping kind": [*data, "--mapping", "fulll"],
        "layers": [*data, "--student-layers", 9],
        "objective": [*data, "--objective", "kdd"],
        "sources": [*data, "--sources", "shufle"],
        "share": [*data, "--share", 1.5],
        "steps": [*data, "--steps", 0],
        "lr": [*data, "--lr", -1],
        "temperature": [*data, "--temperature", 0],
        "teacher": ["--data", csv, "--teacher", tmp_path / "nowhere"],
        "no teacher": ["--data", csv],
        "sst2": ["--task", "sst2"],
        "resume": ["--resume", tmp_path / "nowhere"],
    }[case]


MESSAGES = {
    "task": "there is no task 'pwr'; did you mean 'pvr'",
    "task and data": "there is no task 'nonsense'",
    "column": "has no label column 'verdict': its columns are 'text', 'label'; name one with",
    "empty": "has no rows",
    "no file": "nothing.csv does not exist",
    "three labels": "are negative, positive, unsure and the classes of the model negative, positive: unsure is none of",
    "two columns": "has 2 columns called 'text', and which is meant is not known",
    "eval_data": "eval_data is .*films.csv, the file that is trained on, so nothing would be held out; leave eval_data",
    "no labels": r"Labels\(\) needs a column 'labels' and the data has input_ids",
    "classes": "classes=.* does not say which class is which",
    "classes moved": "'positive' has another number there; leave classes out",
    "fraction": "fraction=0.0 is not a share of the training rows; use a number above 0",
    "mapping layer": r"Location\(layer=9\) is out of range: this 'bert' model has 3 layers",
    "mapping kind": "mapping 'fulll' does not exist: choose one of full, middle, late, single",
    "layers": "a student of 9 layers cannot be made from a teacher of 3; choose 1 to 3",
    "objective": "--objective kdd does not exist: choose of kd, diito, augmented, labels",
    "sources": "--sources shufle does not exist: choose one of shuffle",
    "share": r"Span\(share=1.5\) is not a share",
    "steps": "steps=0 train nothing; use e.g.",
    "lr": "lr=-1.0: both must be above 0",
    "temperature": "softens nothing; use a temperature above 0",
    "used": "is not empty: it may hold another run; choose a new folder",
    "teacher": "teacher '.*nowhere' cannot be loaded",
    "no teacher": "has no teacher of its own; give a classifier .*distill teach --data",
    "sst2": "--task sst2 has no teacher of its own; .*distill teach --task sst2",
    "resume": "holds no run of distill fit to go on with; start one",
}


@pytest.mark.parametrize("case", MESSAGES)
def test_bad_input_is_one_line_and_status_2_before_any_training(case, tmp_path, teacher, csv, monkeypatch):
    def trained(*args, **kwargs):
        raise AssertionError("training began")

    monkeypatch.setattr("distill.cli.student_runs.fit", trained)
    monkeypatch.setattr(importlib.import_module("distill.teach"), "fit", trained)
    arguments = bad(case, tmp_path, teacher, csv)
    output = [] if {"--output", "--resume"} & set(arguments) else ["--output", tmp_path / "r"]
    status, out, err = distill("fit", *arguments, *output)
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("distill: ")
    assert re.search(MESSAGES[case], err), err
    assert not (tmp_path / "r").exists()


def test_mistakes_are_found_before_an_embedded_teacher_is_trained(small_pvr):
    for arguments in (
        ["--mapping", "block_output.9~block_output.0"],
        ["--student-layers", 9],
        ["--sources", "in-context"],
        ["--steps", 0],
        ["--mapping", "fulll"],
    ):
        status, out, err = distill("fit", *arguments)
        assert (status, out) == (2, ""), err
        assert err.count("\n") == 1
    assert not small_pvr.exists()


def test_debug_shows_the_traceback(tmp_path):
    from distill import DistillError

    with pytest.raises(DistillError, match="there is no task 'pwr'"):
        distill("fit", "--task", "pwr", "--debug")


def test_a_teacher_with_other_classes_or_another_vocabulary(tmp_path, teacher, csv):
    other = save_bert(tmp_path / "other", classifier=True, labels=5)
    arguments = ["evaluate", "--teacher", teacher, "--data", csv, "--student", other]
    status, _out, err = distill(*arguments)
    assert (status, err.count("\n")) == (2, 1)
    assert "the teacher has 2 classes and the student 5" in err


def test_a_teacher_no_better_than_the_majority_is_refused_unless_asked_for(tmp_path, csv):
    untrained = save_bert(tmp_path / "untrained", classifier=True)
    arguments = ["fit", "--data", csv, "--teacher", untrained, "--output", tmp_path / "r", *FIT]
    status, _, err = distill(*arguments)
    assert (status, err.count("\n")) == (2, 1)
    assert "there is nothing to learn from it; train it (distill teach), or pass --any-teacher" in err
    assert not (tmp_path / "r").exists()
    status, _out, err = distill(*arguments, "--any-teacher", "--objective", "kd")
    assert (status, err) == (0, "")


def test_an_encoder_is_no_teacher(encoder, teacher, csv, tmp_path):
    status, _, err = distill("fit", "--data", csv, "--teacher", encoder)
    assert status == 2
    assert "has no classifier; fine-tune one first: distill teach" in err
    status, _, err = distill("teach", "--data", csv, "--output", tmp_path / "t")
    assert (status, err.count("\n")) == (2, 1)
    assert "--from" in err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    status, _, err = distill("teach", "--data", csv, "--from", encoder, "--output", tmp_path / "full")
    assert (status, err.count("\n")) == (2, 1)
    assert "is not empty" in err
    status, _, err = distill("evaluate")
    assert (status, err.count("\n")) == (2, 1)
    assert "nothing to evaluate was named" in err
    (tmp_path / "real.csv").write_text("text,label\n" + "".join(f"a film,{i / 7}\n" for i in range(12)))
    for command in (["evaluate", "--student", teacher], ["fit", "--output", tmp_path / "r"], ["headroom"]):
        status, _, err = distill(*command, "--data", tmp_path / "real.csv", "--teacher", teacher)
        assert (status, err.count("\n")) == (2, 1)
        assert "has real values as labels, as 0" in err
        assert "the teacher tells 2 classes apart; name the column of classes: --label COLUMN" in err
    assert not (tmp_path / "r").exists()
    status, _, err = distill("evaluate", "--data", csv, "--teacher", teacher, "--student", encoder)
    assert (status, err.count("\n")) == (2, 1)
    assert f"--student {encoder}: nothing was measured: BertModel has no logits; name a student with a head" in err


def test_nan_stops_with_status_2(teacher, csv, tmp_path):
    status, _, err = distill(
        "fit",
        "--data",
        csv,
        "--teacher",
        teacher,
        "--output",
        tmp_path / "r",
        "--objective",
        "kd",
        "--lr",
        1e30,
        "--steps",
        30,
        "--student-layers",
        2,
    )
    assert (status, err.count("\n")) == (2, 1)
    assert re.search(r"the loss is (nan|inf) at step \d+ \(kd=(nan|inf)\); no checkpoint was saved yet", err)


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_leaves_a_checkpoint_and_going_on_gives_the_same_student(teacher, csv, tmp_path):
    arguments = [
        "--data",
        csv,
        "--teacher",
        teacher,
        "--objective",
        "diito",
        "--batch-size",
        8,
        "--student-layers",
        2,
        "--steps",
        100,
    ]
    status, _, err = distill("fit", *arguments, "--output", tmp_path / "whole")
    assert status == 0, err
    command = [
        sys.executable,
        "-c",
        "from distill.cli.main import main; main()",
        "fit",
        *map(str, arguments),
        "--output",
        "r",
    ]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    log = tmp_path / "r" / "diito" / "log.jsonl"
    deadline = time.monotonic() + 120
    while (
        not (log.exists() and log.read_text().count("\n") >= 3)
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert re.search(
        r"stopped after step \d+ of 100; the state is in r/diito/checkpoints/step-\d+; "
        r"go on with: distill fit --resume r\n",
        err,
    )
    assert "Traceback" not in err
    assert not set("\x1b\r") & set(out)
    status, _, err = distill("fit", "--resume", tmp_path / "r")
    assert (status, err) == (0, "")
    students = [load_classifier(tmp_path / name / "diito" / "student") for name in ("whole", "r")]
    assert all(torch.equal(a, b) for a, b in zip(*(s.state_dict().values() for s in students), strict=True))
    logs = [(tmp_path / name / "diito" / "log.jsonl").read_text() for name in ("whole", "r")]
    assert logs[0] == logs[1]


def test_help_names_the_commands():
    status, out, _err = distill("--help")
    assert status == 0
    assert {"fit", "evaluate", "teach"} <= set(re.findall(r"\w+", out))


def test_the_version_is_shown():
    number = metadata.version("causal-distillation")
    assert distill("--version") == (0, f"distill {number}\n", "")
    command = [sys.executable, "-m", "interventions", "--version"]
    assert subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True).stdout == f"interventions {number}\n"


def test_objectives_are_listed():
    status, out, err = distill("objectives")
    assert (status, err) == (0, "")
    assert "DIITO  kd_cf" in out
    assert "formula    min(epoch / warmup, 1)" in out


def test_tasks_whose_teacher_is_no_transformer_say_how():
    status, _, err = distill("fit", "--task", "digits")
    assert status == 2
    assert "the teacher of digits is a CNN" in err
    assert "distill.networks.MLP(64)" in err


def test_a_warning_is_printed_once(monkeypatch, capsys):
    """Where filters change in between Python gives it again."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    messages.silence_libraries()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", _shown)
        for text in ("no padding token", "no padding token", "another"):
            warnings.warn(text, stacklevel=1)
    assert capsys.readouterr().err == "distill: no padding token\ndistill: another\n"


def _shown(*warning, **where):
    sys.stderr.write(warnings.formatwarning(*warning[:4]))


WITHOUT_TORCH = """
import sys
from distill.cli.main import main
sys.argv = ["distill", *sys.argv[1:]]
try:
    main()
finally:
    assert not {"torch", "numpy", "transformers"} & sys.modules.keys(), "imported in vain"
"""


EVERY_HELP = """
import sys
from distill.cli.main import app, main
names = [each.name or each.callback.__name__ for each in app.registered_commands]
for name in names:
    sys.argv = ["distill", name, "--help"]
    main()
print(*names)
found = {name.partition(".")[0] for name in sys.modules}
print(*sorted(found & {"torch", "numpy", "transformers", "datasets", "accelerate", "matplotlib", "sklearn", "pandas"}))
"""


def test_no_help_of_a_command_needs_torch():
    command = [sys.executable, "-c", EVERY_HELP]
    out = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    *_, names, imported = out.split("\n")[:-1]
    assert {"fit", "evaluate", "teach", "audit", "compare"} <= set(names.split())
    assert [f"Usage: distill {name} " in out for name in names.split()] == [True] * len(names.split())
    assert imported == ""


@pytest.mark.parametrize(
    ("arguments", "status", "shown"),
    [
        (("--help",), 0, "Usage: distill"),
        (("fit", "--help"), 0, "Usage: distill"),
        (("--version",), 0, "distill "),
        (("fit", "--lr", "fast"), 2, "; see distill"),
    ],
)
def test_help_and_usage_need_no_torch(arguments, status, shown):
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert "imported in vain" not in done.stderr
    assert done.returncode == status
    assert shown in done.stdout + done.stderr
