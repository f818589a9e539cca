"""What a grid shows: as text, as a table, as a picture."""

import pytest

from interventions import InterventionError
from interventions.analysis.sweeps import sweep
from interventions.metrics import probability
from tests.interventions.analysis.test_sweeps import BLOCKS, METRIC
from tests.interventions.tiny_models import batch, make


def grid_of(name="gpt2", **options):
    model, inputs, others = make(name), batch(name), batch(name, seed=2)
    return sweep(model, inputs, others, BLOCKS, **{"metric": METRIC, **options})


def test_largest_orders_by_the_change():
    grid = grid_of()
    cells = grid.largest(100)
    assert len(cells) == 15
    changes = [abs(value - float(grid.baseline.mean())) for _, _, value in cells]
    assert changes == pytest.approx(sorted(changes, reverse=True), abs=1e-6)
    assert cells[0][2] == float(grid.values[list(grid.locations).index(cells[0][0]), grid.positions.index(cells[0][1])])


def test_it_prints_as_a_table():
    lines = repr(grid_of()).splitlines()
    assert lines[0].startswith("logit difference: 3 locations × 5 positions, mean of 3 examples; of the base run ")
    assert lines[1].split() == ["0", "1", "2", "3", "4"]
    assert [line.split()[0] for line in lines[2:]] == ["block_output.0", "block_output.1", "block_output.2"]
    assert len({len(line) for line in lines[1:]}) == 1
    many = sweep(make("cnn"), batch("cnn"), batch("cnn", seed=2), "module:layer1", metric=METRIC)
    assert "…" in repr(many)
    assert len(repr(many).splitlines()) == 3


def test_it_is_a_table_of_pandas():
    grid = grid_of()
    table = grid.to_pandas()
    assert table.index.name == "location"
    assert table.columns.name == "position"
    assert table.loc["block_output.1", 3] == float(grid.values[1, 3])


def test_pandas_is_asked_for(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(InterventionError, match=r"pip install pandas"):
        grid_of().to_pandas()


def test_it_draws_itself():
    grid = grid_of(positions=[0, -1])
    axes = grid.plot(tokens=["▁The", "Ġend"]).axes
    assert [label.get_text() for label in axes[0].get_xticklabels()] == ["0 The", "-1 end"]
    assert axes[1].get_ylabel() == "logit difference"
    for each in (grid, grid_of(metric=probability(0))):  # no effect is white, whatever the metric
        norm = each.plot().axes[0].images[0].norm
        assert (norm.vmin + norm.vmax) / 2 == pytest.approx(float(each.baseline.mean()))
        assert axes[0].images[0].cmap(norm(float(each.baseline.mean())))[:3] == pytest.approx(
            (0.97, 0.97, 0.97), abs=0.02
        )
    assert "base64," in grid._repr_html_()
    with pytest.raises(InterventionError, match=r"1 tokens were given for 2 columns"):
        grid.plot(tokens=["The"])
