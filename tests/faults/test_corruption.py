"""Every file that is written has a checksum: damage is one line that names the file, or what takes its place."""

import json
import random
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import distill
import interventions
from distill import KD, Alignment, DistillError, Served, fit
from distill.cli.fit_command import FitCommand
from distill.data.seen_rows import SeenRows
from distill.models.pretrained import load_classifier, save_model
from distill.storage.files import write_json
from distill.training.checkpoints import Checkpoints
from distill.training.run_folder import read_log
from interventions import Add, InterventionError, Location, Rotation
from tests.distill.conftest import save_bert
from tests.distill.tiny_models import QUIET, bert, mlp, spread, text, vectors
from tests.distill.wired import SUM, Wired
from tests.faults.damaging import damages

SETTINGS: dict[str, Any] = dict(steps=4, batch_size=4, lr=1e-2, console=QUIET, objective=KD())


@dataclass
class Kept:
    """Something that is written: how, and how it is read back as plain data that can be compared."""

    write: Callable[[Path], Any]
    read: Callable[[Path], Any]


def trained(folder: Path, resume: bool = False):
    student = spread(mlp(), 1)
    result = fit(spread(mlp()), student, None, vectors(), output_dir=folder, resume=resume, **SETTINGS)
    return plain(student.state_dict()), [record.loss for record in result.records]


def plain(value: Any) -> Any:
    """Tensors as lists of numbers."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {str(name): plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def saved(folder: Path):
    at = {Location(1): Add(torch.arange(16.0)), Location(2, subspace=rotation()): Add(torch.ones(2))}
    return interventions.save(folder, at, model=bert(3), positions=[0, 2])


def rotation():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Rotation(2, 16)


def loaded(folder: Path):
    found = interventions.load(folder, bert(3))
    return [(str(at), plain(op.value), at.subspace and plain(at.subspace.state_dict())) for at, op in found.at.items()]


def aligned(folder: Path):
    network = Wired()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = distill.align(SUM, network, {"inner": Location(module="hidden", subspace=Rotation(1))}, steps=2,
                              batch_size=8, pairs=20, console=QUIET)  # fmt: skip
    found.save(folder, network)


def alignment(folder: Path):
    found = Alignment.load(folder, Wired())
    states = plain(found["inner"][0].subspace.state_dict())
    return states, [record.loss for record in found.records], found.accuracy, found.seen.marks["a"].tolist()[:9]


def served(folder: Path):
    rows = text(4)
    inputs = {name: rows.batch(range(4))[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return Served(spread(bert(2)), cache=folder).run(inputs).logits.numpy().round(4).tolist()


def commanded(folder: Path):
    folder.mkdir()
    write_json(folder / "command.json", {"teacher": "t", "seed": 3, "source": {"task": "pvr"}, "timing": {"steps": 4},
                                         "interchanges": {"share": 0.5}})  # fmt: skip


def trained_on(folder: Path):
    folder.mkdir()
    SeenRows.of(vectors().table).save(folder)


def classifier(folder: Path):
    made = save_bert(folder.with_name("source"), classifier=True, layers=1)
    save_model(load_classifier(made), folder, (), SeenRows.of(vectors().table))


KEPT = {
    "a run": Kept(trained, partial(trained, resume=True)),
    "its log": Kept(trained, lambda folder: [record.loss for record in read_log(folder)]),
    "saved interventions": Kept(saved, loaded),
    "an alignment": Kept(aligned, alignment),
    "answers of a teacher": Kept(served, served),
    "a command": Kept(commanded, lambda folder: repr(FitCommand.read(folder))),
    "a classifier": Kept(classifier, lambda folder: plain(load_classifier(folder).state_dict())),
}


@dataclass
class Tally:
    tried: int = 0
    refused: int = 0
    replaced: int = 0
    same: int = 0


def reading(kept: Kept, folder: Path) -> tuple[Any, list[str], Exception | None]:
    """What is read, what was said, and the error."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            now, error = kept.read(folder), None
        except Exception as raised:
            now, error = None, raised
    return now, [str(each.message) for each in said if issubclass(each.category, UserWarning)], error


def attack(kind: str, tmp_path: Path, count: int, every: int) -> Tally:
    """Damage each file in each way; what is read must be refused in one line, or said and right, or the same."""
    kept, found, draw = KEPT[kind], Tally(), random.Random(kind)
    original = tmp_path / "original"
    kept.write(original)
    copy = tmp_path / "copy"
    shutil.copytree(original, copy)
    expected = kept.read(copy)
    shutil.rmtree(copy)
    files = sorted(path for path in original.rglob("*") if path.is_file())
    ways = [(file.relative_to(original), *way) for file in files for way in damages(file, count, draw)][::every]
    for file, name, damage in ways:
        shutil.copytree(original, copy)
        damage(copy / file)
        found.tried += 1
        told = f"{kind}: {file}: {name}"
        now, said, error = reading(kept, copy)
        if isinstance(error, DistillError | InterventionError):
            assert "\n" not in str(error), told
            assert str(copy) in str(error), told
            found.refused += 1
        else:
            assert error is None, f"{told} ends in {type(error).__name__}: {error}"
            assert now == expected, f"{told} is taken for good: {said}"
            named = any(str(copy) in message for message in said)
            found.replaced, found.same = found.replaced + named, found.same + (not named)
        shutil.rmtree(copy)
    return found


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(
        distill.training.run_folder, "Checkpoints", lambda folder, _, resume, keep: Checkpoints(folder, 2, resume, keep)
    )


FEW, MANY = {"a run": (1, 9)}, {"a run": (4, 2)}


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize(
    ("amounts", "usual", "least"), [(FEW, (1, 4), 2), pytest.param(MANY, (12, 1), 20, marks=pytest.mark.full)],
    ids=["little damage", "much damage"],
)  # fmt: skip
def test_damage_is_named_or_does_not_matter(kind, amounts, usual, least, tmp_path):
    found = attack(kind, tmp_path, *amounts.get(kind, usual))
    print(f"damage of {kind}: {found}; taken for good or ended in a traceback: 0")
    assert found.tried > least


def test_files_of_an_earlier_version_load_with_a_note(tmp_path):
    saved(tmp_path / "s")
    description = tmp_path / "s" / "interventions.json"
    told = json.loads(description.read_text())
    del told["checksums"]
    expected = loaded(tmp_path / "s")
    description.write_text(json.dumps(told))
    with pytest.warns(UserWarning, match="was written by an earlier version, without checksums, and is not checked"):
        assert loaded(tmp_path / "s") == expected
    aligned(tmp_path / "a")
    told = json.loads((tmp_path / "a/alignment.json").read_text())
    del told["checksum"]
    expected = alignment(tmp_path / "a")
    (tmp_path / "a/alignment.json").write_text(json.dumps(told))
    (tmp_path / "a/manifest.json").unlink()
    with pytest.warns(UserWarning, match="was written by an earlier version, without a checksum, and is not checked"):
        assert alignment(tmp_path / "a") == expected


def test_a_damaged_teacher_in_the_cache_is_trained_again(tmp_path, monkeypatch):
    from distill.teach import teacher_of
    from tests.distill.test_teach import task

    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    expected = plain(teacher_of(task(), console=QUIET).state_dict())
    [folder] = (tmp_path / "cache").iterdir()
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 4
    weights.write_bytes(bytes(content))
    with pytest.warns(UserWarning, match=r"model.safetensors is damaged .*; the teacher is trained again"):
        assert plain(teacher_of(task(), console=QUIET).state_dict()) == expected
    assert plain(teacher_of(task(), console=QUIET).state_dict()) == expected


def test_the_command_of_another_version_is_refused(tmp_path):
    tmp_path.joinpath("r").mkdir()
    write_json(tmp_path / "r/command.json", {"source": {"unknown": 1}, "timing": {}, "interchanges": {}})
    with pytest.raises(DistillError, match=r"command.json is none of this version's .*start the run anew"):
        FitCommand.read(tmp_path / "r")
    assert isinstance(FitCommand.of({"source": {}, "timing": {}, "interchanges": {}}), FitCommand)
