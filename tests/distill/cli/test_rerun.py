"""A run once more: the same students to the bit, and a word where they are not."""

import pytest
from safetensors.torch import load_file, save_file

from distill.storage.files import seal
from tests.distill.cli.test_main import FIT, distill, quick, teacher  # noqa: F401


def weights(folder):
    return (folder / "student" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--objective", "kd"], ["kd"]),
        pytest.param([], ["kd", "kd-equal-time", "diito", "augmented"], marks=pytest.mark.full),
    ],
)
def test_the_students_of_a_run_are_the_same_to_the_bit(options, names, teacher, csv, tmp_path):  # noqa: F811
    run, again = tmp_path / "run", tmp_path / "again"
    status, _out, err = distill("fit", "--data", csv, "--teacher", teacher, "--output", run, *FIT, *options)
    assert (status, err) == (0, "")
    status, out, err = distill("rerun", run, "--output", again)
    assert (status, err) == (0, "")
    assert out.count(f"the same to the bit as in {run}.") == len(names)
    assert all(weights(run / name) == weights(again / name) for name in names)
    assert (run / "run.toml").read_text() == (again / "run.toml").read_text()
    if not options:
        assert (again / "times.json").read_text() == (run / "times.json").read_text()


def test_a_student_that_differs_is_named_with_what_has_changed(teacher, csv, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    options = ["--objective", "kd", "--any-teacher"]  # the fifth that is held out changes with the data
    status, _out, err = distill("fit", "--data", csv, "--teacher", teacher, "--output", run, *FIT, *options)
    assert (status, err) == (0, "")
    file = run / "kd" / "student" / "model.safetensors"
    state = load_file(file)
    name = next(iter(state))
    save_file({**state, name: state[name] + 1e-6}, file, metadata={"format": "pt"})
    seal(file.parent)
    csv.write_text(csv.read_text() + csv.read_text().splitlines()[-1] + "\n")
    status, out, err = distill("rerun", run, "--output", tmp_path / "again")
    assert status == 0, err
    assert f"KD: other weights than in {run}: changed since then: data column" in out


@pytest.mark.parametrize(
    ("file", "message"), [(None, "holds no run of distill fit"), ("command.json", "is not finished")]
)
def test_what_is_no_finished_run_is_refused(file, message, tmp_path):
    if file:
        (tmp_path / file).write_text("{}")
    status, _out, err = distill("rerun", tmp_path)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err
