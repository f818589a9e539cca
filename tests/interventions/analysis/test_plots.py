"""Heat maps: what stands on them, how large they are, and that they touch nothing global."""

import subprocess
import sys

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import CenteredNorm

from interventions import InterventionError
from interventions.analysis.plots import Picture, heat_map

NAN = float("nan")


def shown(picture: Picture) -> list[str]:
    return [text.get_text() for text in picture.axes[0].texts]


def ticks(picture: Picture) -> tuple[list[str], list[str]]:
    axes = picture.axes[0]
    return [t.get_text() for t in axes.get_yticklabels()], [t.get_text() for t in axes.get_xticklabels()]


def test_it_says_what_is_where():
    picture = heat_map(
        torch.tensor([[1.0, -2.0, NAN]]), ["block_output.0"], [0, 1, -1], label="KL", column_label="token"
    )
    assert ticks(picture) == (["block_output.0"], ["0", "1", "-1"])
    assert picture.axes[0].get_xlabel() == "token"
    assert picture.axes[1].get_ylabel() == "KL"
    assert shown(picture) == ["1.00", "−2.00"]


def test_cells_without_a_number_are_crossed():
    picture = heat_map(torch.tensor([[1.0, NAN], [NAN, 2.0]]), "ab", "xy")
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in picture.axes[0].lines] == [(1, 0), (0, 1)]
    assert heat_map(torch.full((1, 2), NAN), "a", "xy")._repr_png_()


def test_the_centre_is_white():
    picture = heat_map(torch.tensor([[3.0, -1.0]]), "a", "xy", center=0.0)
    norm = picture.axes[0].images[0].norm
    assert isinstance(norm, CenteredNorm)
    assert (norm.vmin, norm.vmax) == (-3, 3)
    assert picture.axes[1].get_ylim() == (-1, 3)  # the colour bar shows what occurs
    assert heat_map(torch.tensor([[3.0, 5.0]]), "a", "xy").axes[0].images[0].norm.vmin == 3


@pytest.mark.parametrize("shape", [(1, 1), (1, 12), (12, 20), (48, 3), (40, 200)])
def test_it_grows_with_the_grid_up_to_a_size(shape):
    rows, columns = ([f"block_output.{i}" for i in range(shape[0])], list(range(shape[1])))
    picture = heat_map(torch.rand(shape), rows, columns, label="a")
    width, height = picture.get_size_inches()
    assert 1.5 < width < 20
    assert 1.5 < height < 20
    assert len(shown(picture)) == (0 if shape[1] == 200 else shape[0] * shape[1])
    assert len(ticks(picture)[1]) <= 100
    assert picture._repr_png_().startswith(b"\x89PNG")


def test_another_number_of_names_raises():
    with pytest.raises(InterventionError, match=r"1 row names and 3 column names were given for .* \[2, 3\]"):
        heat_map(torch.rand(2, 3), "a", "xyz")


def test_no_global_state_is_touched():
    code = (
        "import sys, torch; from interventions.analysis.plots import heat_map\n"
        "heat_map(torch.eye(2), 'ab', 'xy')._repr_png_(); "
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("shape", [(0, 0), (0, 2), (2, 0)])
def test_nothing_to_draw_is_said(shape):
    rows, columns = shape
    with pytest.raises(InterventionError, match=r"have no cell to draw; give at least one row and one column"):
        heat_map(torch.zeros(shape), list(range(rows)), list(range(columns)))


def test_numbers_that_round_to_zero_have_no_sign():
    assert shown(heat_map(torch.tensor([[-0.001, -0.006, -12.0]]), "a", "xyz")) == ["0.00", "−0.01", "−12"]


def test_texts_of_cells_and_cells_that_stay_blank():
    """Marks of tokenizers are spaces; what lies beyond a mask is white, without a number or a cross."""
    values = torch.tensor([[1.0, NAN], [3.0, 4.0]])
    picture = heat_map(values, "ab", "xy", texts=[["▁cat", "Ġdog"], ["\n", "x$y$"]])
    assert shown(picture) == [" cat", "↵", r"x\$y\$"]
    picture = heat_map(values, "ab", "xy", blank=torch.tensor([[False, True], [False, False]]))
    assert (shown(picture), len(picture.axes[0].lines), len(picture.axes[0].patches)) == (
        ["1.00", "3.00", "4.00"],
        0,
        1,
    )
    with pytest.raises(
        InterventionError, match=r"texts has rows of \[1\] texts, 2 in all, for values of shape \[2, 2\]"
    ):
        heat_map(values, "ab", "xy", texts=[["a"], ["b"]])
    with pytest.raises(InterventionError, match=r"blank has shape \[1, 1\] and the values \[2, 2\]"):
        heat_map(values, "ab", "xy", blank=torch.ones(1, 1).bool())


def test_a_long_label_stays_in_the_picture():
    picture = heat_map(torch.rand(2, 2), "ab", "xy", label="estimated log probability [nats] of the answer")
    box = picture.axes[1].yaxis.label.get_window_extent(FigureCanvasAgg(picture).get_renderer())
    assert box.y0 > 0
    assert box.y1 < picture.bbox.height
