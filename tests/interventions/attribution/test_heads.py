"""The heads of a model as rows: as many as each attention has, and a picture of layers × heads."""

import pytest
import torch

from interventions import InterventionError, Location, Zero, attribution_patch, heads, logit_difference, run, sweep
from tests.interventions.tiny_models import LAYERS, TRANSFORMERS, batch, make

METRIC = logit_difference(0, 1)


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("site", ["attention_heads", "key"])
def test_each_head_is_named_once(name, site):
    model = make(name)
    found = heads(model, site)
    done = run(model, batch(name), list(dict.fromkeys(at.whole for at in found.values())))
    for layer in range(LAYERS):
        mine = [at.heads[0] for at in found.values() if at.layer == layer]
        assert mine == list(range(done.vectors(Location(layer, site)).shape[-2]))
    assert list(found)[-1] == f"{LAYERS - 1}.{mine[-1]}"
    assert heads(make("t5"), stack="encoder")["1.1"] == Location(1, "attention_heads", heads=1, stack="encoder")


def test_a_grid_of_heads_is_shown_by_layer():
    model, inputs = make("llama"), batch("llama")
    grid = sweep(model, inputs, None, heads(model), metric=METRIC, op=Zero(), positions=[0, -1])
    shown = grid.by_head(-1)
    assert shown.values.shape == (LAYERS, 4)
    assert torch.equal(shown.values.flatten(), grid.values[:, 1])
    assert shown.positions == (0, 1, 2, 3)
    assert list(shown.locations) == [f"attention_heads.{layer}" for layer in range(LAYERS)]
    assert shown.plot().axes[0].get_xlabel() == "head"
    assert shown.to_pandas().columns.name == "head"
    some = {key: at for key, at in heads(model).items() if key != "1.2"}
    holes = attribution_patch(model, inputs, batch("llama", seed=2), some, METRIC, positions=None).by_head()
    assert holes.values.isnan().nonzero().tolist() == [[1, 2]]
    with pytest.raises(InterventionError, match=r"position=None is no column of this grid, which has 0, -1"):
        grid.by_head()
    with pytest.raises(InterventionError, match=r"the row block_output.1 is not one head; sweep the heads one by one"):
        sweep(model, inputs, None, [Location(1)], metric=METRIC, op=Zero(), positions=None).by_head()


def test_what_has_no_heads_is_refused():
    with pytest.raises(InterventionError, match=r"site='mlp_output' has no heads; the sites with heads are"):
        heads(make("gpt2"), "mlp_output")
    with pytest.raises(InterventionError, match=r"needs blocks and this Sequential has none"):
        heads(make("mlp"))
