"""Options in a file: read as defaults, refused where they are none, and written back beside a run."""

import inspect
import re
import tomllib
from dataclasses import fields
from textwrap import dedent

import pytest

from distill.cli.fit_command import GROUPS, FitCommand
from distill.cli.options import flags
from distill.cli.options.config import RUN, SEPARATORS, as_toml
from distill.cli.options.groups import DataOptions, InterchangeOptions, ScheduleOptions
from distill.training.schedule import Schedule
from tests.distill.cli.test_main import distill

GROUPS_OF_FLAGS = (
    flags.RowFlags, flags.ClusterFlags, flags.PackingFlags, flags.StudentFlags, flags.LanguageFlags,
    flags.ScheduleFlags, flags.MonitorFlags,
)  # fmt: skip
FILES = {
    "a.toml": """
        steps = 7
        lr = 1e-3
        seeds = [3, 4]
        [data]
        data = 'x.csv'
        any-teacher = true
        [more.deep]
        share = 0.5
        """,
    "a.yaml": """
        steps: 7
        lr: 1e-3
        seeds: [3, 4]
        label:
        data:
          data: x.csv
          any-teacher: true
        more: {share: 0.5}
        """,
    "a.json": '{"steps": 7, "lr": 1e-3, "seeds": [3, 4], "data": "x.csv", "any_teacher": true, "share": 0.5}',
}


@pytest.fixture
def started(monkeypatch):
    """The commands that `distill fit` would carry out."""
    found = []
    monkeypatch.setattr("distill.cli.fit.run_or_resume", lambda command, *_, **__: found.append(command))
    return found


@pytest.mark.parametrize("name", FILES)
def test_options_of_a_file_are_those_of_the_call(name, tmp_path, started):
    (tmp_path / name).write_text(dedent(FILES[name]))
    call = ["--steps", 7, "--lr", "1e-3", "--seeds", 3, 4, "--data", "x.csv", "--any-teacher", "--share", 0.5]
    assert distill("fit", "--config", tmp_path / name) == distill("fit", *call) == (0, "", "")
    assert started[0] == started[1]
    assert started[0] == FitCommand(
        DataOptions(data="x.csv"), ScheduleOptions(steps=7, lr=1e-3), InterchangeOptions(share=0.5),
        seeds=(3, 4), any_teacher=True, every="200",
    )  # fmt: skip


def test_one_value_of_an_option_that_takes_several_is_a_list_of_it(tmp_path, started):
    (tmp_path / "a.toml").write_text('seeds = 3\ntrack = "tensorboard"\n')
    assert distill("fit", "--config", tmp_path / "a.toml")[0] == 0
    assert (started[0].seeds, started[0].monitored.track) == ((3,), ("tensorboard",))


@pytest.mark.parametrize("name", SEPARATORS)
@pytest.mark.parametrize("values", [["kd"], ["kd", "diito"], ["c", "a", "b"]])
def test_a_list_for_an_option_of_several_names_is_these(name, values, tmp_path, started):
    (tmp_path / "a.toml").write_text(f"{name} = {values}\n")
    assert distill("fit", "--config", tmp_path / "a.toml") == distill("fit", f"--{name}", SEPARATORS[name].join(values))
    assert started[:1] == started[1:]


def test_options_whose_help_says_commas_take_lists_of_a_file():
    annotations = {name: each for group in GROUPS_OF_FLAGS for name, each in inspect.get_annotations(group).items()}
    helps = {name: each.__metadata__[0].help for name, each in annotations.items() if hasattr(each, "__metadata__")}
    assert {name for name, text in helps.items() if "commas" in text} <= set(SEPARATORS)


def test_a_table_of_yaml_may_merge_another(tmp_path, started):
    (tmp_path / "b.yaml").write_text("more:\n  <<: {steps: 7}\n  <<: {lr: 0.5}\n")
    assert distill("fit", "--config", tmp_path / "b.yaml")[0] == 0
    assert started[0].timing == ScheduleOptions(steps=7, lr=0.5)


@pytest.mark.parametrize("before", [True, False])
def test_an_option_of_the_call_wins(before, tmp_path, started):
    (tmp_path / "a.toml").write_text("steps = 7\nlr = 0.5\n")
    config, call = ["--config", tmp_path / "a.toml"], ["--steps", 9]
    assert distill("fit", *(config + call if before else call + config))[0] == 0
    assert started[0].timing == ScheduleOptions(steps=9, lr=0.5)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "stepz = 7", r"sets 'stepz', which is no option of distill fit; did you mean 'steps'\?"),
        (
            "a.toml",
            "resume = 'r'",
            r"'resume', which belongs to the call alone: distill fit --config \S+a.toml --resume …",
        ),
        ("a.toml", "steps = 1\n[b]\nsteps = 2", r"sets 'steps' twice"),
        ("a.toml", "max-length = 1\nmax_length = 2", r"sets 'max_length' twice, as max-length and as max_length"),
        ("a.yaml", "steps: 1\nlr: 2\nsteps: 1", r"cannot be parsed: 'steps' is set twice"),
        ("a.yaml", "more: {lr: 1, steps: 1, lr: 2}", r"cannot be parsed: 'lr' is set twice"),
        ("a.json", '{"more": {"lr": 1, "steps": 1, "lr": 2}}', r"cannot be parsed: 'lr' is set twice"),
        ("a.toml", "steps = [1, 2]", r"sets steps = \[1, 2\], and steps takes one value"),
        ("a.yaml", "teacher: [a, b]", r'sets teacher = \["a", "b"\], and teacher takes one value'),
        (
            "a.yaml",
            "objective: [kd, 'diito,dkd']",
            r"a list with 'diito,dkd', and an entry is a text without ','",
        ),
        ("a.toml", "objective = ['kd', 1]", r"a list with 1, and an entry is a text"),
        ("a.toml", "steps = ", r"cannot be parsed: .*write an option a line"),
        ("a.yaml", "- steps", r"holds a list and no options"),
        ("a.yaml", "steps: [", r"cannot be parsed"),
        ("a.ini", "steps = 1", r"\.ini is none of \.toml"),
        ("a.toml", "steps = 'many'", r"Invalid value for '--steps'"),
        ("a.toml", "steps = true", r"sets steps = true, and steps takes a value"),
        ("a.toml", "eval-pairs = 0", r"pairs=0"),
    ],
)
def test_a_file_that_cannot_be_is_refused_in_one_line(name, text, message, tmp_path, started):
    (tmp_path / name).write_text(text)
    status, out, err = distill("fit", "--config", tmp_path / name)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert re.search(message, err)
    assert not started


@pytest.mark.parametrize("option", ["prompt-tokens", "max-new-tokens"])
def test_options_of_writing_need_a_student_that_writes(option, started):
    status, out, err = distill("fit", f"--{option}", 6)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"--{option} 6 is about text that the student writes" in err
    assert distill("fit", f"--{option}", 6, "--on-policy", 0.5)[0] == 0
    assert len(started) == 1


def test_a_missing_file_is_refused(tmp_path):
    status, _out, err = distill("fit", "--config", tmp_path / "no.toml")
    assert (status, err.count("\n")) == (2, 1)
    assert "cannot be read: No such file" in err


@pytest.mark.parametrize("text", ["plain", 'a "quoted" \\ text', "ü 😀 \u007f \x01 \n\t", ""])
def test_what_is_written_is_read(text):
    options = {"text": text, "lr": 1e-30, "share": 0.1 + 0.2, "seeds": (1, 2), "any_teacher": False, "steps": 3}
    assert tomllib.loads(as_toml(options)) == {**options, "seeds": [1, 2]}


def test_a_command_written_is_the_command_read(tmp_path, started):
    command = FitCommand(
        DataOptions(data='x "y".csv', classes="a,b"), ScheduleOptions(lr=3e-5), InterchangeOptions("late", "noise"),
        seeds=(5, 6), teacher="t", every="10 minutes",
    )  # fmt: skip
    command.write(tmp_path)
    assert distill("fit", "--config", tmp_path / RUN) == (0, "", "")
    assert started == [command]


def test_defaults_of_options_are_those_of_the_settings():
    told = {name: getattr(group, name) for group in GROUPS_OF_FLAGS for name in inspect.get_annotations(group)}
    assert FitCommand.of_options(told) == FitCommand()
    settings = {each.name for group in GROUPS.values() for each in fields(group)}
    assert settings <= told.keys()


def test_every_setting_of_a_schedule_is_an_option():
    assert {each.name for each in fields(ScheduleOptions)} == {each.name for each in fields(Schedule)} - {"seed"}
