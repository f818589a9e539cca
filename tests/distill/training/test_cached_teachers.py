"""Several processes share a cache of their teacher's answers: each row is answered once, by whichever has it first."""

import pytest

ENGINES = ["ddp", pytest.param("fsdp", marks=pytest.mark.full)]


def values(found):
    assert [each.status for each in found] == [0] * len(found), found[0].output + found[-1].output
    assert all(each.value["losses"] == found[0].value["losses"] for each in found)
    return [each.value for each in found]


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_that_another_process_has_had_are_not_answered_again(groups, engine, tmp_path):
    """15 rows in steps of 8: two steps an epoch, whose rows change places between the processes."""
    live = values(groups.run("kept", 2, engine=engine))
    kept = values(groups.run("kept", 2, engine=engine, cache=str(tmp_path / "answers")))
    again = values(groups.run("kept", 2, engine=engine, cache=str(tmp_path / "answers")))
    for one, other, last in zip(live, kept, again, strict=True):
        assert one["calls"][2] - one["calls"][1] == 2
        assert other["calls"][2] == other["calls"][1]
        assert last["calls"] == [0, 0, 0]
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-9)
        assert other["weights"] == pytest.approx(one["weights"], rel=1e-9)
        assert other["losses"][:2] == one["losses"][:2]
        assert last["losses"] == other["losses"]
    shards = list((tmp_path / "answers").glob("samples-*.shard"))
    assert len(shards) == 2


@pytest.mark.parametrize("engine", ENGINES)
def test_interchanges_of_a_cached_teacher_are_those_of_the_live_one(groups, engine, tmp_path):
    live = values(groups.run("kept", 2, engine=engine, objective="diito"))
    kept = values(groups.run("kept", 2, engine=engine, objective="diito", cache=str(tmp_path / "answers")))
    assert kept[0]["losses"] == pytest.approx(live[0]["losses"], rel=1e-9)
    assert kept[0]["weights"] == pytest.approx(live[0]["weights"], rel=1e-9)
