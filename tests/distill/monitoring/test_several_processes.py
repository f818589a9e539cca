"""Processes that train together evaluate, stop, fail and restore together, with the figures of one process alone."""

import pytest


def alike(groups, processes=2, case="watched", **settings):
    ended = groups.run(case, processes, **settings)
    assert [each.error for each in ended] == [""] * processes, ended[0].output + ended[-1].output
    assert all(each.value == ended[0].value for each in ended)
    return ended[0].value


@pytest.mark.parametrize(
    ("engine", "mapping"),
    [
        ("ddp", None),
        pytest.param("ddp", "full", marks=pytest.mark.full),
        pytest.param("fsdp", "full", marks=pytest.mark.full),
        ("fsdp", None),
    ],
)
def test_two_processes_find_what_one_finds(groups, engine, mapping, tmp_path):
    settings = {"mapping": mapping, "eval_every": 2, "save_best": "kl", "early_stopping": 2}
    alone = alike(groups, 1, engine="ddp", **settings)
    together = alike(groups, 2, engine=engine, folder=str(tmp_path / "run"), **settings)
    assert [each["step"] for each in together["history"]] == [each["step"] for each in alone["history"]]
    assert ("iia" in together["history"][0]) == (mapping is not None and engine == "ddp")
    if mapping is None:  # the draws of a step are those of each process
        for one, other in zip(alone["history"], together["history"], strict=True):
            assert other == pytest.approx(one, rel=1e-9)
        assert together["weights"] == pytest.approx(alone["weights"], rel=1e-7)
        assert (together["best"], together["stopped"]) == (alone["best"], alone["stopped"])


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_evaluations_change_nothing_and_a_callback_of_one_process_stops_both(groups, engine):
    plain = alike(groups, engine=engine)
    found = alike(groups, engine=engine, eval_every=1, stop=(1, 4))
    assert found["losses"] == plain["losses"][:4]
    assert (len(found["history"]), found["stopped"]) == (4, "a callback ended the training")


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp", marks=pytest.mark.full)])
def test_the_error_of_a_callback_in_one_process_is_raised_in_both_after_the_state_was_saved(groups, engine, tmp_path):
    whole = alike(groups, engine=engine, eval_every=2, save_best="kl")
    folder = str(tmp_path / "run")
    first, second = groups.run("watched", 2, engine=engine, folder=folder, eval_every=2, save_best="kl", fail=(1, 3))
    assert second.error == "OSError: the callback of this process failed"
    assert first.error == "DistillError: process 1 of 2 failed: OSError: the callback of this process failed"
    assert (tmp_path / "run" / "checkpoints" / "step-0000003" / "complete").is_file()
    assert alike(groups, engine=engine, folder=folder, eval_every=2, save_best="kl", resume=True) == whole


@pytest.mark.parametrize("settings", [{"save_best": "iia"}, pytest.param({}, marks=pytest.mark.full)])
def test_interchanges_of_variables_are_measured_while_weights_are_divided(groups, settings):
    whole, divided = (
        alike(groups, engine=engine, case="variables", eval_every=2, **settings) for engine in ("ddp", "fsdp")
    )
    assert [set(each) for each in divided["history"]] == [{"step", "accuracy", "iia"}] * 3
    assert divided["history"] == whole["history"]
    assert divided["losses"] + divided["weights"] == pytest.approx(whole["losses"] + whole["weights"], rel=1e-7)
    assert divided["best"] == whole["best"]
