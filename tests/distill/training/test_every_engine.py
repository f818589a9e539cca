"""Every engine trains, saves, stops, fails and goes on with every kind of objective, and comes to the same end.

Engines are one process, two with the whole student in each (DDP), and two with a part of it in each (FSDP2).
"""

from functools import cache
from itertools import product

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.distill.training.several import OBJECTIVES, sums

ENGINES = {"one": ("ddp", 1), "ddp": ("ddp", 2), "fsdp": ("fsdp", 2)}
KINDS = ("kd", "diito", "in context", "fitnets", "crd")
OF_ROWS = ("kd", "fitnets")
"""Kinds that draw nothing for a row, whose sources, noise or negatives would be those of another process."""
STOPPED, FAILED = 3, 5


@pytest.fixture(scope="module")
def ended(groups, tmp_path_factory):
    """What comes of processes of an engine that train with a kind of objective, by engine, kind and situation.

    How each process ends, first with what happens to it and then started again; the folder; and the whole checkpoints
    in it after each.
    """

    @cache
    def end(engine, kind, situation):
        name, processes = ENGINES[engine]
        folder = tmp_path_factory.mktemp(f"{engine}-{kind}-{situation}".replace(" ", "-"))

        def fitted(**settings):
            return groups.run(
                "fitted", processes, engine=name, objective=kind, folder=str(folder), every=2, resume="auto", **settings
            )

        last, runs, whole = processes - 1, [], []
        troubles = {
            "whole": [None],
            "stop": [("SIGTERM", last, STOPPED), None],
            "fail": [("raise", last, FAILED), None],
        }
        for trouble in troubles[situation]:
            runs.append(fitted(trouble=trouble))
            whole.append([each.parent.name for each in sorted(folder.glob("checkpoints/*/complete"))])
        return runs, folder, whole

    return end


def value_of(found):
    """What the processes of a group return, which is one value."""
    assert [each.status for each in found] == [0] * len(found), found[0].output + found[-1].output
    assert all(each.value == found[0].value for each in found)
    return found[0].value


def close(value, kind):
    """The losses and weights of a training, up to rounding.

    Heads of CRD are of single precision. Its loss is a sum over negatives that starts as large as the first one: where
    it has become small it still has the rounding of the largest.
    """
    if kind != "crd":
        return pytest.approx(value["losses"] + value["weights"], rel=1e-8)
    rounding = 32 * torch.finfo(torch.float32).eps * max(value["losses"])
    losses = [pytest.approx(each, rel=1e-4, abs=rounding) for each in value["losses"]]
    return losses + [pytest.approx(each, rel=1e-4) for each in value["weights"]]


def cells(*situations):
    """All engines and kinds, each in one of some situations, which take turns; all but a few in the full tier alone.

    So every two of engine, kind and situation meet.
    """
    few = {("ddp", "diito"), ("fsdp", "in context"), ("one", "kd")}
    taken = [
        (engine, kind, situations[(i + j) % len(situations)])
        for (i, engine), (j, kind) in product(enumerate(ENGINES), enumerate(KINDS))
    ]
    return [pytest.param(*cell, marks=[] if cell[:2] in few else pytest.mark.full, id="-".join(cell)) for cell in taken]


@pytest.mark.parametrize(("engine", "kind", "situation"), cells("train"))
def test_train(ended, engine, kind, situation):
    found = value_of(ended(engine, kind, "whole")[0][0])
    assert len(found["losses"]) == 8
    other = "one" if kind in OF_ROWS else "ddp" if engine == "fsdp" else engine
    assert found["losses"] + found["weights"] == close(value_of(ended(other, kind, "whole")[0][0]), kind)


@pytest.mark.parametrize(("engine", "kind", "situation"), cells("save"))
def test_save(ended, engine, kind, situation):
    runs, folder, _ = ended(engine, kind, "whole")
    saved = AutoModelForSequenceClassification.from_pretrained(folder / "student")
    assert sums(saved) == pytest.approx(value_of(runs[0])["weights"], rel=1e-12)
    assert set(value_of(runs[0])["types"]) & {"DTensor", "FSDPBertForSequenceClassification"} == set()


@pytest.mark.parametrize(("engine", "kind", "situation"), cells("stop", "fail"))
def test_stop_and_fail(ended, engine, kind, situation):
    runs, _, whole = ended(engine, kind, situation)
    assert {each.status for each in runs[0]} == {1}, runs[0][0].output
    if situation == "stop":
        for each in runs[0]:
            assert each.error.startswith(f"Interrupted: stopped after step {STOPPED} of 8; the state is in")
    else:
        assert runs[0][-1].error == "OSError: the disk of this process is gone"
        assert all("the disk of this process is gone" in each.error for each in runs[0])
    assert whole[0][-1] == f"step-000000{STOPPED if situation == 'stop' else FAILED - 1}"


@pytest.mark.parametrize(("engine", "kind", "situation"), cells("stop", "fail"))
def test_resume(ended, engine, kind, situation):
    """Started again by the same command, to the bits of the run that nothing happened to."""
    again = value_of(ended(engine, kind, situation)[0][1])
    whole = value_of(ended(engine, kind, "whole")[0][0])
    assert again["weights"] == whole["weights"]
    assert again["losses"] == whole["losses"]


def test_all_kinds_are_there():
    assert set(KINDS) <= set(OBJECTIVES)
