"""What a search for a mapping gives: the grid, the choice, text, picture and table, by hand-made figures."""

import pytest
import torch

from distill import DistillError, MappingSearch, Outcome, Share
from distill.alignment.mapping_search import Cells, mapping_as_text
from interventions import Location

NOTHING = Outcome(None, None, None, None, None, None, None, 0, 100)


def cell(iia, effective, do_nothing=0.5):
    return Outcome(Share(iia, iia, iia, 100), 0.4, effective, do_nothing, 0.3, 0.1, None, 100, 0)


def cells(figures, site="block_output"):
    """Cells of (IIA, effective IIA) each, row by row; None is left out."""
    rows, columns = len(figures), len(figures[0])
    return Cells(
        tuple(Location(j, site) for j in range(rows)),
        tuple(Location(i, site) for i in range(columns)),
        tuple(NOTHING if each is None else cell(*each) for row in figures for each in row),
    )


PILOT = cells(
    [
        [(0.883, 0.70), (0.854, 0.67), (0.624, 0.13), (0.581, 0.1), (0.572, 0.1), None],
        [(0.598, 0.05), (0.669, 0.14), (0.924, 0.78), (0.950, 0.86), (0.952, 0.89), None],
        [None] * 6,
    ]
)


def test_the_best_place_of_the_teacher_is_that_of_the_greatest_effective_accuracy():
    found = MappingSearch({"block_output": PILOT})
    assert found.mapping == {(Location(0),): (Location(0),), (Location(4),): (Location(1),)}
    assert found.notes == (
        "block_output.2 of the student has no entry: each of its interchanges replaces all that an answer can see, or "
        "nothing that it can see.",
    )
    assert mapping_as_text(found.mapping) == "block_output.0~block_output.0 block_output.4~block_output.1"


@pytest.mark.parametrize(
    ("figures", "mapping"),
    [
        ([[(0.9, 0.8), (0.9, 0.8)], [(0.9, 0.8), (0.9, 0.8)]], {0: [0, 1]}),  # ties: the earlier one
        ([[(0.8, 0.5), (0.9, 0.5)]], {1: [0]}),  # of equal effective accuracies the greater accuracy
        ([[(0.5, 0.2), (0.5, 0.9)], [(0.5, 0.9), (0.5, 0.8)]], {1: [0, 1]}),  # crossed: .9 + .8 is above .2 + .8
        ([[None, (0.5, 0.5)], [(0.5, 0.9), None]], {1: [0]}),  # one of two has to go: the first choice that is best
        ([[(1.0, None), (0.5, 0.1)]], {1: [0]}),  # without effect nothing is known
    ],
)
def test_the_choice_is_monotone(figures, mapping):
    found = MappingSearch({"a": cells(figures)}).mapping
    expected = {(Location(i),): tuple(map(Location, side)) for i, side in mapping.items()}
    if figures[0][0] is None:  # both rows have one cell and these cross, so the better one stays
        expected = {(Location(0),): (Location(1),)}
    assert found == expected


def test_the_first_kind_decides_and_every_kind_has_its_own():
    mlp = cells([[(0.9, 0.1), (0.9, 0.9)]], "mlp_output")
    found = MappingSearch({"a": cells([[(0.9, 0.9), (0.9, 0.1)]]), "b": mlp})
    assert found.mapping == found.kinds["a"].mapping == {(Location(0),): (Location(0),)}
    assert found.kinds["b"].mapping == {(Location(1, "mlp_output"),): (Location(0, "mlp_output"),)}
    assert [len(axes.patches) for axes in found.plot().axes[:2]] == [1, 1]


def test_the_figures_at_the_mapping_stand_beside_those_of_the_controls():
    labels = cells([[(0.5, 0.25), (0.5, 0.5)], [(0.5, 0.5), (0.5, 0.75)]])
    found = MappingSearch({"a": cells([[(0.9, 0.8), (0.9, 0.1)], [(0.9, 0.1), (0.9, 0.9)]])}, {"labels": {"a": labels}})
    assert "effective IIA at the mapping, mean over its cells: student 0.850, labels 0.500" in str(found)


def test_without_effect_there_is_no_entry_and_a_note_says_why():
    found = MappingSearch({"a": cells([[(1.0, None)]])})
    assert found.mapping == {}
    assert found.notes == ("block_output.0 of the student has no entry: no interchange changes the teacher's answer.",)
    assert "mapping: none" in str(found)
    with pytest.raises(DistillError, match=r"none has the figure effective; draw another: plot\('iia'\)"):
        found.plot()
    assert found.plot("iia").axes


def test_text_picture_and_table_hold_every_figure():
    found = MappingSearch({"block_output": PILOT}, {"labels": {"block_output": PILOT}})
    text = str(found)
    assert "0.952 (0.89)*" in text
    assert "0.950 (0.86) " in text
    assert text.count("×") == 2 * (2 + 6)
    picture = found.plot()
    student, control = picture.axes[:2]
    assert [each.get_text() for each in student.texts].count("0.89") == 1
    assert len(student.patches) == 2
    assert len(control.patches) == 0
    assert len(student.lines) == 2 + 6
    table = found.to_pandas()
    assert table.loc["student", "block_output", "block_output.1", "block_output.4"]["effective_iia"] == 0.89
    assert len(table) == 2 * 18
    assert torch.equal(found.grid("iia", "block_output", "labels").nan_to_num(), found.grid("iia").nan_to_num())


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"figure": "efective"}, r"figure 'efective' was not searched \(did you mean 'effective'\?\)"),
        ({"kind": "heads"}, "kind 'heads' was not searched; choose of 'block_output'"),
        ({"control": "network"}, r"control 'network' was not searched; choose of none, as there are no controls"),
    ],
)
def test_a_name_that_was_not_searched_is_refused(given, problem):
    with pytest.raises(DistillError, match=problem):
        MappingSearch({"block_output": PILOT}).grid(**given)
