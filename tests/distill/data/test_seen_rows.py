"""Rows that were trained on stay known, whatever becomes of the data that they came from."""

import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification

import distill
from distill import KD, Alignment, DistillError, Labels
from distill.data.seen_rows import SeenRows, fingerprints, marks_of, seen_of
from distill.tasks import load
from interventions import Location, Rotation
from tests.distill.conftest import save_bert, sentences, write_csv
from tests.distill.tiny_models import QUIET, mlp
from tests.distill.wired import SUM

SHORT = {"steps": 1, "batch_size": 4, "console": QUIET}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"), classifier=True, layers=2)


def classifier(folder):
    model = BertForSequenceClassification.from_pretrained(folder)
    model.config.id2label, model.config.label2id = {0: "negative", 1: "positive"}, {"negative": 0, "positive": 1}
    return model


def fitted(how, teacher, student, data):
    """The result of a training on data, however it was trained."""
    schedule = distill.Schedule(steps=1, batch_size=4)
    if how == "fit":
        return distill.fit(teacher, student, {}, data, objective=KD(), **SHORT)
    if how == "teach":
        return distill.fit(None, student, None, data, objective=Labels(), **SHORT)
    if how == "chain":
        return distill.chain(
            [teacher, student], data=data, mapping={}, objective=KD(), schedule=schedule, console=QUIET
        )[0]
    if how == "align":
        mapping = {Location(0): Location(0, subspace=Rotation(4))}
        return distill.align(teacher, student, mapping, data, steps=1, batch_size=4, pairs=0, console=QUIET)
    return distill.mutual([teacher, student], data, schedule=schedule, console=QUIET)[1]


@pytest.mark.parametrize("how", ["fit", "teach", "chain", "mutual", "align"])
def test_a_file_that_changed_after_training_lets_nothing_through(how, tmp_path, folder):
    rows = sentences(40)
    path = write_csv(tmp_path / "x.csv", rows)
    teacher, student = classifier(folder), classifier(folder)
    trained, fresh = (
        load(data=path, tokenizer=_tokenizer(folder)).train,
        load(data=write_csv(tmp_path / "y.csv", sentences(40, seed=1)), tokenizer=_tokenizer(folder)).train,
    )
    result = fitted(how, teacher, student, path)
    write_csv(path, sentences(40, seed=2))
    assert result.seen.among(trained.table).all()
    new = ~result.seen.among(fresh.table)
    assert new.float().mean() > 0.8
    path.unlink()
    mapping = distill.layer_mapping(teacher, student, "full")
    with pytest.raises(DistillError, match=r"holds rows that were trained on, \d+ of the 32 \(first: row 0\)"):
        distill.interchange_accuracy(teacher, student, mapping, trained, exclude=result, pairs=4)
    other = fresh.take(new.nonzero()[:, 0])
    assert distill.interchange_accuracy(teacher, student, mapping, other, exclude=result, pairs=4).overlap == 0.0


def _tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_tensors_that_change_in_place_after_training_stay_known():
    data = {"inputs": torch.randn(8, 6), "labels": torch.zeros(8, dtype=torch.long)}
    before = data["inputs"].clone()
    result = distill.fit(mlp(), mlp(), {}, data, objective=KD(), **SHORT)
    data["inputs"].add_(1)
    assert result.seen.among({"inputs": before}).all()
    assert not result.seen.among(data).any()


TEXTS = [[5, 6, 7], [8, 9, 10, 11], [12, 13], [14, 15, 16, 17, 18], [5, 6], [9, 8, 7]]


def padded(width: int, side: str = "right", pad: int = 0, before: str = "") -> dict:
    """The texts as tensors, padded by a width, on a side, with a token."""
    fill = [[0] * (width - len(text)) for text in TEXTS]
    put = (lambda text, rest: text + rest) if side == "right" else (lambda text, rest: rest + text)
    ids = [put(text, [pad] * len(rest)) for text, rest in zip(TEXTS, fill, strict=True)]
    mask = [put([1] * len(text), rest) for text, rest in zip(TEXTS, fill, strict=True)]
    return {f"{before}input_ids": torch.tensor(ids), f"{before}attention_mask": torch.tensor(mask)}


RAGGED = {"input_ids": [torch.tensor(text) for text in TEXTS], "attention_mask": [torch.ones(len(t)) for t in TEXTS]}


@pytest.mark.parametrize("before", ["", "decoder_", "teacher_"])
def test_a_row_is_itself_however_it_is_padded(before):
    forms = [padded(5), padded(9), padded(7, "left"), padded(7, pad=3), padded(6, "left", pad=1), RAGGED]
    forms = [{f"{before}{name}": column for name, column in form.items()} for form in forms]
    for one in forms:
        for other in forms:
            assert SeenRows.of(one).among(other).all()
            assert SeenRows.of(one).remembered().among(other).all()
            assert SeenRows(lambda table=one: [table]).among(other).all()
    changed = {name: column.clone() for name, column in forms[0].items()}
    changed[f"{before}input_ids"][:, 0] += 20
    assert not SeenRows.of(forms[-1]).among(changed).any()


def test_a_text_and_its_beginning_are_two_rows():
    seen = SeenRows.of({"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])})
    assert seen.among({"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 1]])}).sum() == 0
    assert seen.among({"input_ids": torch.tensor([[5, 6, 9]]), "attention_mask": torch.tensor([[1, 1, 0]])}).all()


def test_numbers_of_rows_are_no_part_of_them(folder):
    data = {**padded(6), "labels": [0, 1] * 3, "idx": list(range(6))}
    result = distill.fit(classifier(folder), classifier(folder), {}, data, objective=KD(), **SHORT)
    other = {
        **padded(8, "left"),
        "labels": [0, 1] * 3,
        "idx": list(range(100, 106)),
        "position_ids": padded(8)["input_ids"],
    }
    assert result.seen.among(distill.Rows.of(other).table).all()


def _turned():
    from tests.distill.alignment.test_align import turned

    return turned()


@pytest.mark.parametrize("sampled", [True, False])
def test_an_alignment_knows_its_rows_also_after_it_was_saved(sampled, tmp_path):
    data = None if sampled else SUM.sample(30, torch.Generator().manual_seed(0))
    network, mapping = _turned(), {"inner": Location(module="hidden", subspace=Rotation(1))}
    found = distill.align(SUM, network, mapping, data, steps=2, batch_size=8, pairs=0, console=QUIET)
    wanted = found.seen.among(SUM.sample(200, torch.Generator().manual_seed(5)))
    assert 0 < wanted.float().mean() < 1
    found.save(tmp_path / "a", network)
    loaded = Alignment.load(tmp_path / "a", network)
    assert torch.equal(loaded.seen.among(SUM.sample(200, torch.Generator().manual_seed(5))), wanted)
    if data is not None:
        data = {name: value.clone() for name, value in data.items()}
        with pytest.raises(DistillError, match="holds rows that were trained on"):
            distill.interchange_accuracy(SUM, network, loaded, data, exclude=loaded, pairs=20)
    for name in ("trained_on.safetensors", "manifest.json"):
        (tmp_path / "a" / name).unlink()  # as an earlier version saved it
    with pytest.raises(DistillError, match="does not know which rows it was trained on"):
        seen_of(Alignment.load(tmp_path / "a", network))


def test_what_is_remembered_is_what_is_made_anew():
    table = {
        "x": torch.randint(3, (50, 2)), "labels": torch.zeros(50), "y": [torch.arange(n % 3 + 1) for n in range(50)],
    }  # fmt: skip
    one, other = SeenRows.of(table), SeenRows(lambda: [table])
    probe = {"x": torch.randint(3, (40, 2)), "y": [torch.arange(n % 4 + 1) for n in range(40)]}
    for part in (probe, {"x": probe["x"]}, {"y": probe["y"]}):
        assert torch.equal(one.among(part), other.among(part))
        assert torch.equal(one.among(part), one.remembered().among(part))
        assert torch.equal(one.among(part), other.remembered().among(part))
    assert "labels" not in one.marks


def test_a_row_has_one_mark_in_whatever_company():
    ragged = [torch.arange(n % 5 + 1) for n in range(9000)]
    marks = marks_of(ragged)
    for number in (0, 4, 4095, 4096, 8999):
        assert marks_of([ragged[number]])[0] == marks[number]
        assert marks_of(ragged[number][None].float())[0] == marks[number]
    mixed = [torch.tensor([2**24 + 1]), torch.tensor([0.5])]
    assert marks_of(mixed)[0] == marks_of([mixed[0]])[0]
    assert len(np.unique(marks)) == 5
    assert len(set(fingerprints({"a": torch.arange(9000)}))) == 9000
