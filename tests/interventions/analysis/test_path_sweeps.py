"""Each cell of a grid of paths is a call of `path_patch`; the grid of a data set is that of one batch of all rows."""

import pytest
import torch

from distill import Rows
from interventions import InterventionError, Location, logit_difference, path_patch, run, sweep_paths
from interventions.analysis import path_sweeps
from tests.interventions.analysis.test_data_sweeps import EXAMPLES, assert_same, padded, parts, targets
from tests.interventions.tiny_models import LAYERS, batch, make

SENDERS = {
    "gpt2": [
        Location(0, "attention_heads", heads=0),
        Location(0, "attention_heads", heads=1),
        Location(0, "mlp_output"),
    ],
    "llama": [Location(0, "attention_output"), Location(0)],
    "bert": [Location(0, "attention_output"), Location(0, "mlp_output")],
}
RECEIVERS = [Location(LAYERS - 1, "query"), Location(LAYERS - 1, "value")]


def given(name):
    model = make(name).eval()
    return model, batch(name, size=EXAMPLES), batch(name, seed=2, size=EXAMPLES)


@pytest.mark.parametrize("name", ["gpt2", pytest.param("bert", marks=pytest.mark.full), "llama"])
def test_cells_are_path_patches_and_batches_are_the_whole_batch(name):
    model, base, source = given(name)
    metric = logit_difference(targets(), targets(1))
    how = {"metric": metric, "positions": [0, -1], "receiver_positions": -1}
    whole = sweep_paths(model, base, source, SENDERS[name], RECEIVERS, **how)
    mask = base.get("attention_mask")
    own = metric if mask is None else logit_difference(targets(), targets(1), mask=mask)
    for row, sender in enumerate(SENDERS[name]):
        for column, at in enumerate((0, -1)):
            done = path_patch(model, base, source, sender, RECEIVERS, positions=at, receiver_positions=-1)
            torch.testing.assert_close(whole.per_example[row, column], own(done.output).float(), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(whole.baseline, own(run(model, base).output).float(), rtol=1e-5, atol=2e-6)
    assert bool((whole.per_example != whole.baseline).any())
    for data in ((parts(base), parts(source)), (Rows(dict(base)), Rows(dict(source)))):
        assert_same(sweep_paths(model, *data, SENDERS[name], RECEIVERS, batch_size=4, **how), whole)
    assert_same(sweep_paths(model, base, source, SENDERS[name], RECEIVERS, batch_size=4, **how), whole)


def test_each_token_is_a_column_and_examples_without_it_are_none():
    lengths = [5, 3, 4, 5, 2, 5, 4, 3, 5, 5, 2]
    model, base, source = make("gpt2").eval(), padded(lengths, "right"), padded(lengths, "right", seed=2)
    how = {"metric": logit_difference(targets(), targets(1), mask=base["attention_mask"]), "positions": "each"}
    whole = sweep_paths(model, base, source, SENDERS["gpt2"][:1], RECEIVERS, **how)
    assert whole.per_example.isnan().any()
    assert_same(sweep_paths(model, parts(base), parts(source), SENDERS["gpt2"][:1], RECEIVERS, **how), whole)


def test_a_sweep_that_was_stopped_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    model, base, source = given("gpt2")
    data, metric = (Rows(dict(base)), Rows(dict(source))), logit_difference(targets(), targets(1))

    def swept(receivers=RECEIVERS, **more):
        return sweep_paths(model, *data, SENDERS["gpt2"], receivers, metric=metric, batch_size=4, **more)

    whole, patched, calls = swept(), path_sweeps.path_patch, []

    def stopping(*args, **settings):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return patched(*args, **settings)

    monkeypatch.setattr(path_sweeps, "path_patch", stopping)
    with pytest.raises(KeyboardInterrupt):
        swept(checkpoint=tmp_path / "a")
    again = swept(checkpoint=tmp_path / "a")
    assert len(calls) == 1 + 3 * len(SENDERS["gpt2"])  # the cell that was stopped, and each one once
    assert torch.equal(again.per_example, whole.per_example)
    with pytest.raises(InterventionError, match="keeps a sweep with another receivers"):
        swept(RECEIVERS[:1], checkpoint=tmp_path / "a")


def test_wrong_input_is_refused_in_one_line():
    model, base, source = given("gpt2")
    metric, sender = logit_difference(targets(), targets(1)), SENDERS["gpt2"][0]
    for senders, receivers, more, error in (
        ([(sender, Location(1))], RECEIVERS, {}, "names several locations, and paths begin at one"),
        (sender, [], {}, "no receiver was given"),
        (sender, RECEIVERS, {"batch_size": -1}, "batch_size=-1 holds no example"),
        (Location(LAYERS - 1), Location(0, "query"), {}, "does not come after the sender"),
        (sender, RECEIVERS, {"receiver_positions": [[0]] * EXAMPLES, "batch_size": 4}, "has tokens for each example"),
    ):
        with pytest.raises(InterventionError, match=error):
            sweep_paths(model, base, source, senders, receivers, metric=metric, **more)
