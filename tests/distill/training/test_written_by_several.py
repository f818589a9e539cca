"""Rows that models write in a training of several processes: those of one process, also after a stop."""

import pytest

WAYS = [("student", 1.0), ("student", 0.5), ("teacher", 1.0), ("teacher", 0.5)]
PARTS = [pytest.param(*way, marks=pytest.mark.full if way[1] == 0.5 else []) for way in WAYS]


@pytest.fixture(scope="module")
def trained(groups, tmp_path_factory):
    """What the processes of a training return: alone, together, and together after they were stopped."""

    def train(by, share, processes, **settings):
        folder = settings.pop("folder", None) or str(tmp_path_factory.mktemp("run"))
        settings = {"engine": "ddp", **settings}
        return groups.run("written", processes, folder=folder, by=by, share=share, **settings)

    return train


def values(found):
    assert [each.status for each in found] == [0] * len(found), found[0].output + found[-1].output
    assert all(each.value["losses"] == found[0].value["losses"] for each in found)
    return found[0].value


@pytest.mark.parametrize(("by", "share"), PARTS)
def test_several_processes_write_what_one_does(trained, tmp_path, by, share):
    alone, together = trained(by, share, 1), trained(by, share, 2)
    one, two = values(alone), values(together)
    assert len(one["losses"]) == 6
    assert two["losses"] + two["weights"] == pytest.approx(one["losses"] + one["weights"], rel=1e-9)
    if (by, share) == ("teacher", 1.0):  # a trial and the two steps of the first epoch
        assert [each.value["calls"] for each in (*alone, *together)] == [3, 3, 3]
    stopped = trained(by, share, 2, folder=str(tmp_path), trouble=("SIGTERM", 1, 3))
    assert all(each.error.startswith("Interrupted: stopped after step 3 of 6") for each in stopped)
    resumed = trained(by, share, 2, folder=str(tmp_path), resume=True)
    assert values(resumed)["losses"] == two["losses"]
    assert values(resumed)["weights"] == two["weights"]
    if (by, share) == ("teacher", 1.0):
        assert [each.value["calls"] for each in resumed] == [1, 1]


def test_goes_on_in_another_number_of_processes(trained, tmp_path):
    trained("teacher", 1.0, 2, folder=str(tmp_path), trouble=("SIGTERM", 1, 3))
    one, resumed = (
        values(trained("teacher", 1.0, 1)),
        values(trained("teacher", 1.0, 1, folder=str(tmp_path), resume=True)),
    )
    assert resumed["losses"] == pytest.approx(one["losses"], rel=1e-9)
    assert resumed["calls"] == 1


@pytest.mark.parametrize(
    ("by", "share", "stops"),
    [("student", 0.5, False), *(pytest.param(*way, True, marks=pytest.mark.full) for way in WAYS)],
)
def test_divided_models_write_what_whole_ones_do(trained, tmp_path, by, share, stops):
    whole, divided = values(trained(by, share, 2)), values(trained(by, share, 2, engine="fsdp"))
    assert divided["losses"] + divided["weights"] == pytest.approx(whole["losses"] + whole["weights"], rel=1e-9)
    if not stops:
        return
    stopped = trained(by, share, 2, engine="fsdp", folder=str(tmp_path), trouble=("SIGTERM", 1, 3))
    assert all(each.error.startswith("Interrupted: stopped after step 3 of 6") for each in stopped)
    resumed = values(trained(by, share, 2, engine="fsdp", folder=str(tmp_path), resume=True))
    assert resumed["losses"] == divided["losses"]
    assert resumed["weights"] == divided["weights"]
