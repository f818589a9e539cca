import json

import pytest
import torch

from distill import DistillError, layer_mapping
from distill.compat.neurons import neuron_pairs
from distill.interchange.mapping import Entry, as_mapping, depth, entries_of, mapping_of, parse_mapping
from interventions import InterventionError, Location
from tests.distill.tiny_models import CNN, bert, gpt2, mlp, t5, vit


def numbers(mapping):
    return [([place.layer for place in above], below.layer) for above, below in mapping.items()]


def blocks(count: int) -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.ModuleDict(
            {"layers": torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(2, 2)) for _ in range(count))}
        )
    )


FULL = {
    (12, 3): [([0, 1, 2, 3], 0), ([4, 5, 6, 7], 1), ([8, 9, 10, 11], 2)],
    (12, 6): [([2 * i, 2 * i + 1], i) for i in range(6)],
    (12, 9): [([0], 0), ([1], 1), ([2, 3], 2), ([4], 3), ([5], 4), ([6, 7], 5), ([8], 6), ([9], 7), ([10, 11], 8)],
    (6, 3): [([0, 1], 0), ([2, 3], 1), ([4, 5], 2)],
    (6, 4): [([0], 0), ([1, 2], 1), ([3], 2), ([4, 5], 3)],
    (5, 5): [([i], i) for i in range(5)],
    (4, 1): [([0, 1, 2, 3], 0)],
}
MIDDLE = {
    (12, 3): (6, 1),
    (12, 6): (6, 3),
    (12, 9): (6, 4),
    (6, 3): (3, 1),
    (6, 4): (3, 2),
    (5, 5): (2, 2),
    (4, 1): (2, 0),
}
LATE = {
    (12, 3): [(9, 0), (10, 1)],
    (12, 6): [(9, 3), (10, 4)],
    (12, 9): [(9, 6), (10, 7)],
    (6, 3): [(3, 0), (4, 1)],
    (6, 4): [(3, 1), (4, 2)],
    (5, 5): [(2, 2), (3, 3)],
    (12, 2): [(10, 0)],
}


@pytest.mark.parametrize("size", FULL)
def test_full_covers_every_teacher_layer_once_in_order(size):
    found = numbers(layer_mapping(blocks(size[0]), blocks(size[1])))
    assert found == FULL[size]
    assert [layer for above, _ in found for layer in above] == list(range(size[0]))


OF_THE_AUTHORS = {  # multiple_single_multilayer_layer_{3,6,9}.nm
    3: ["[0:4]", "[4:8]", "[8:12]"],
    6: ["[0:2]", "[2:4]", "[4:6]", "[6:8]", "[8:10]", "[10:12]"],
    9: ["[0:2]", "[2:4]", "[4:6]", "[6:7]", "[7:8]", "[8:9]", "[9:10]", "[10:11]", "[11:12]"],
}


@pytest.mark.parametrize("depth_of_student", OF_THE_AUTHORS)
def test_the_remainder_first_is_the_files_of_the_authors(depth_of_student, tmp_path):
    teacher, student = bert(12), bert(depth_of_student)
    entries = [
        {
            "teacher_variable_names": [f"$L:{above}$H:[0:12]$[0:64]"],
            "student_variable_names": [f"$L:{i}$H:[0:12]$[0:64]"],
        }
        for i, above in enumerate(OF_THE_AUTHORS[depth_of_student])
    ]
    (tmp_path / "full.nm").write_text(json.dumps({"interchange_variable_mappings": entries}))
    file = [
        ([place.layer for place in pair.teacher], pair.student[0].layer)
        for pair in neuron_pairs(str(tmp_path / "full.nm"), teacher, student)
    ]
    assert numbers(layer_mapping(teacher, student, remainder="first")) == file
    assert (numbers(layer_mapping(teacher, student)) == file) == (12 % depth_of_student == 0)


def test_only_full_has_a_remainder():
    for kind, remainder in (("full", "last"), ("middle", "first")):
        with pytest.raises(DistillError, match=r"only 'full' has one.*remainder='first'"):
            layer_mapping(blocks(12), blocks(9), kind, remainder=remainder)


@pytest.mark.parametrize("size", MIDDLE)
def test_middle(size):
    above, below = MIDDLE[size]
    assert numbers(layer_mapping(blocks(size[0]), blocks(size[1]), "middle")) == [([above], below)]


@pytest.mark.parametrize("size", LATE)
def test_late_and_single(size):
    late = [([above], below) for above, below in LATE[size]]
    assert numbers(layer_mapping(blocks(size[0]), blocks(size[1]), "late")) == late
    assert numbers(layer_mapping(blocks(size[0]), blocks(size[1]), "single")) == late[-1:]


@pytest.mark.parametrize("kind", ["late", "single"])
def test_one_layer_has_none_below_the_last(kind):
    with pytest.raises(DistillError, match="needs a block below the last one.*mapping='full'"):
        layer_mapping(blocks(4), blocks(1), kind)


def test_an_unknown_kind_and_a_deeper_student():
    with pytest.raises(DistillError, match=r"'early' does not exist: choose one of full, middle, late, single"):
        layer_mapping(blocks(4), blocks(2), "early")
    with pytest.raises(DistillError, match=r"for distill\.fit .* alone.*search_mapping\(teacher, student, data\)"):
        layer_mapping(blocks(4), blocks(2), "search")
    with pytest.raises(DistillError, match=r"student has 4 layers and the teacher 2.*Location\(1\)"):
        layer_mapping(blocks(2), blocks(4))
    with pytest.raises(DistillError, match="layers cannot be counted.*Location\\(module="):
        layer_mapping(mlp(), mlp())


@pytest.mark.parametrize(("make", "count"), [(bert, 4), (vit, 3), (gpt2, 2), (t5, 5)])
def test_depth(make, count):
    assert depth(make(layers=count)) == count


def test_depth_of_named_blocks():
    from collections import OrderedDict

    block = torch.nn.Sequential(torch.nn.Linear(2, 2))
    named = torch.nn.Sequential(OrderedDict(first=block, second=torch.nn.Sequential(torch.nn.Linear(2, 2))))
    model = torch.nn.ModuleDict({"body": named})
    assert depth(model) == 2


def test_a_dict_may_map_one_to_many_by_location_or_text():
    pairs = entries_of(
        {(Location(2), "block_output.3"): Location(1), Location(-1): (Location(0), "embedding")}, bert(), bert(2)
    )
    assert pairs == (
        Entry((Location(2), Location(3)), (Location(1),)),
        Entry((Location(-1),), (Location(0), Location(site="embedding"))),
    )
    assert str(pairs[0]) == "block_output.2 + block_output.3 ↔ block_output.1"
    assert entries_of(as_mapping(pairs), bert(), bert(2)) == pairs


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({}, "names no entry"),
        ({(): Location(0)}, "a side of the mapping is empty"),
        ({Location(0): ()}, "a side of the mapping is empty"),
        ({(Location(3), Location(-1)): Location(0)}, "names a place of the teacher twice"),
        ({Location(0): (Location(1), Location(-1))}, "names a place of the student twice"),
    ],
)
def test_bad_mappings(mapping, message):
    with pytest.raises(DistillError, match=message):
        entries_of(mapping, bert(4), bert(2))


@pytest.mark.parametrize("mapping", [{Location(4): Location(0)}, {Location(0): Location(2)}])
def test_a_layer_that_does_not_exist(mapping):
    with pytest.raises(InterventionError, match=r"out of range: this 'bert' model has \d layers"):
        entries_of(mapping, bert(4), bert(2))


def test_two_parts_of_one_place_are_two_places():
    parts = {(Location(1, dims=range(4)), Location(1, dims=range(4, 8))): Location(0)}
    assert len(entries_of(parts, bert(), bert(2))[0].teacher) == 2


def test_a_mapping_as_text():
    text = "block_output.2+block_output.3~block_output.1 module:conv1~module:conv2@input"
    parsed = parse_mapping(text)
    assert list(parsed.items()) == [
        ((Location(2), Location(3)), (Location(1),)),
        ((Location(module="conv1"),), (Location(module="conv2", io="input"),)),
    ]
    assert mapping_of("block_output.1~block_output.0", bert(), bert(2)) == {(Location(1),): (Location(0),)}
    assert mapping_of("middle", bert(), bert(2)) == layer_mapping(bert(), bert(2), "middle")
    given = {Location(module="conv1"): Location(module="conv2")}
    assert mapping_of(given, CNN(), CNN()) is given


@pytest.mark.parametrize("text", ["block_output.1", "a~b~c", "block_output.1~block_output.0 full"])
def test_text_that_is_no_mapping(text):
    with pytest.raises(DistillError, match=r"neither one of full, middle, late, single nor entries"):
        parse_mapping(text)
