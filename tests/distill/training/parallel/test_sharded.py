"""Networks that were sharded are whole afterwards: in the hands of the caller, and on the disk."""

import pytest
import transformers

ADAM = 1e-8
"""How far weights may differ: Adam divides gradients of 1e-17, those of the biases of keys, by their own size."""


def test_a_student_is_whole_in_hand_and_on_disk(groups, tmp_path):
    values = {}
    for engine in ("ddp", "fsdp"):
        ended = groups.run("fitted", engine=engine, folder=str(tmp_path / engine), objective="diito")
        assert [each.status for each in ended] == [0, 0], ended[0].output
        assert ended[0].value == ended[1].value
        values[engine] = ended[0].value
    assert values["fsdp"]["types"] == values["ddp"]["types"]
    assert values["fsdp"]["losses"] == pytest.approx(values["ddp"]["losses"], rel=1e-12)
    assert values["fsdp"]["weights"] == pytest.approx(values["ddp"]["weights"], rel=ADAM)
    kind = transformers.AutoModelForSequenceClassification
    saved = kind.from_pretrained(tmp_path / "fsdp" / "student", dtype="auto")
    squares = [float(weight.double().square().sum()) for weight in saved.state_dict().values()]
    assert squares == values["fsdp"]["weights"]


def test_a_student_and_a_sharded_teacher_can_be_trained_with_again(groups):
    whole, parts = (groups.run("again", engine=engine, teacher_from=0) for engine in ("ddp", "fsdp"))
    assert [each.status for each in (*whole, *parts)] == [0] * 4, parts[0].output
    expected, found = whole[0].value, parts[0].value
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-12)
    assert found["weights"] == pytest.approx(expected["weights"], rel=ADAM)
    assert found["types"] == expected["types"]
    assert all(each.value[name] for each in parts for name in ("teacher", "hooks", "parameters"))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("rows", "BSS() runs the student as often as its rows say"),
        ("number", "along their first axis, and trained.classifier.scale is a single number without one"),
        ("types", "FSDP shards weights of one type, and the student and what its objectives train hold torch.float64"),
    ],
)
def test_what_shards_cannot_train_is_refused(groups, kind, text):
    for ended in groups.run("refused", kind=kind):
        assert text in ended.error
