"""A stream in a training of several processes: the rows of a step are those of one process, also after a stop."""

import pytest


def value_of(found):
    assert [each.status for each in found] == [0] * len(found), found[0].output + found[-1].output
    assert all(each.value == found[0].value for each in found)
    return found[0].value


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp", marks=pytest.mark.full)])
def test_two_processes_read_a_stream_as_one(groups, engine, tmp_path):
    one = value_of(groups.run("streamed", 1, engine="ddp", folder=str(tmp_path / "one")))
    two = value_of(groups.run("streamed", 2, engine=engine, folder=str(tmp_path / "two")))
    assert len(one["losses"]) == 6
    assert two["losses"] + two["weights"] == pytest.approx(one["losses"] + one["weights"], rel=1e-9)
    folder = str(tmp_path / "stopped")
    stopped = groups.run("streamed", 2, engine=engine, folder=folder, trouble=("SIGTERM", 1, 3))
    assert all(each.error.startswith("Interrupted: stopped after step 3 of 6") for each in stopped)
    resumed = value_of(groups.run("streamed", 2, engine=engine, folder=folder, resume=True))
    assert (resumed["losses"], resumed["weights"]) == (two["losses"], two["weights"])
