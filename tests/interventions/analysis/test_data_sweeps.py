"""The grid of a data set is that of one batch of all its examples; a checkpoint continues to the same grid."""

import os
import random
import resource
import signal
import time
from contextlib import contextmanager

import pytest
import torch
from torch.utils.data import DataLoader

from distill import Rows
from interventions import (
    Add,
    InterventionError,
    Location,
    Mean,
    Noise,
    Zero,
    kl,
    logit_difference,
    mean_of,
    normalized,
    probability,
    run,
    sweep,
)
from interventions.analysis.passes import Passes
from interventions.metrics import accuracy, agreement, log_probability
from tests.interventions.analysis.test_collect import forked
from tests.interventions.tiny_models import LAYERS, batch, make

BLOCKS = [Location(i) for i in range(LAYERS)]
PLACES = {
    "bert": ["embedding", *BLOCKS],
    "gpt2": [*BLOCKS, Location(1, "attention_heads", heads=1)],
    "llama": BLOCKS,
    "t5": [Location(1), Location(1, stack="encoder"), (Location(0), Location(0, stack="encoder"))],
    "vit": BLOCKS,
    "mlp": [Location(module="0")],
    "cnn": [Location(module="layer1.0")],
}
EXAMPLES = 11


def cut(inputs, rows):
    return {name: each[rows] for name, each in inputs.items()} if isinstance(inputs, dict) else inputs[rows]


def parts(inputs, size=4, examples=EXAMPLES):
    for start in range(0, examples, size):
        yield cut(inputs, slice(start, start + size))


def targets(seed=0, examples=EXAMPLES):
    return torch.randint(0, 3, (examples,), generator=torch.Generator().manual_seed(seed))


def assert_same(grid, whole, exactly=False):
    assert grid.positions == whole.positions
    assert grid.locations == whole.locations
    assert (grid.metric, grid.is_signed) == (whole.metric, whole.is_signed)
    for name in ("per_example", "baseline", "source"):
        one, other = getattr(grid, name), getattr(whole, name)
        assert (one is None) == (other is None), name
        if one is not None and exactly:
            assert torch.equal(one.nan_to_num(-7), other.nan_to_num(-7)), name
        elif one is not None:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6, equal_nan=True)


def settings(name):
    positions = None if name == "mlp" else "each"
    return {"at": PLACES[name], "metric": logit_difference(targets(), targets(1)), "positions": positions}


@pytest.mark.parametrize("name", PLACES)
def test_batches_are_the_whole_batch(name):
    """Rows, an iterable, and one batch of more rows than a pass may have."""
    model, base, source = make(name), batch(name, size=EXAMPLES), batch(name, seed=2, size=EXAMPLES)
    whole = sweep(model, base, source, **settings(name))
    assert whole.per_example.nan_to_num().std() > 1e-3
    assert_same(sweep(model, base, source, batch_size=4, **settings(name)), whole)
    assert_same(sweep(model, parts(base), parts(source), **settings(name)), whole)
    table = base if isinstance(base, dict) else {"inputs": base}
    others = source if isinstance(source, dict) else {"inputs": source}
    assert_same(sweep(model, Rows.of(table), Rows.of(others), batch_size=5, **settings(name)), whole)
    loaded = (DataLoader([cut(each, i) for i in range(EXAMPLES)], batch_size=3) for each in (base, source))
    assert_same(sweep(model, *loaded, **settings(name)), whole)


def padded(lengths, side, seed=1):
    """Token ids of several lengths, padded to the longest."""
    draw, width = torch.Generator().manual_seed(seed), max(lengths)
    ids, mask = torch.randint(1, 30, (len(lengths), width), generator=draw), torch.zeros(len(lengths), width).long()
    for row, length in enumerate(lengths):
        mask[row, slice(0, length) if side == "right" else slice(width - length, width)] = 1
    return {"input_ids": ids * mask, "attention_mask": mask}


def ragged(inputs, side):
    """The same examples as rows that are padded batch by batch."""
    ids = [row[real.bool()] for row, real in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    return Rows({"input_ids": ids, "attention_mask": [torch.ones_like(each) for each in ids]}, padding_side=side)


@pytest.mark.parametrize("positions", ["each", [0, -1, 5], {"two": [0, 1], "last": -1}])
@pytest.mark.parametrize("side", ["right", "left"])
def test_batches_of_other_lengths_are_the_whole_batch(side, positions):
    """Columns are those of the longest example of all; each batch is as wide as its own longest."""
    model, lengths = make("llama"), [2, 3, 2, 4, 6, 3, 9, 2]  # whose positions are relative, so padding may differ
    base, source = padded(lengths, side), padded(lengths, side, seed=2)
    answers = (targets(0, 8), targets(1, 8))
    given = {"at": BLOCKS, "positions": positions}
    whole = sweep(model, base, source, metric=logit_difference(*answers, mask=base["attention_mask"]), **given)
    rows = (ragged(base, side), ragged(source, side))
    for mask in (base["attention_mask"], None):  # cut and fitted, or that of the batch
        grid = sweep(model, *rows, batch_size=3, metric=logit_difference(*answers, mask=mask), **given)
        assert_same(grid, whole)
    metric = logit_difference(*answers, mask=base["attention_mask"])
    chunked = sweep(model, base, source, batch_size=3, metric=metric, **given)
    assert_same(chunked, whole)


def test_positions_of_each_example_are_cut():
    model, base, source = make("gpt2"), batch("gpt2", size=EXAMPLES), batch("gpt2", seed=2, size=EXAMPLES)
    draw = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 5, (EXAMPLES, 1), generator=draw)
    mask = torch.zeros(EXAMPLES, 5).bool()
    mask[torch.arange(EXAMPLES), torch.randint(0, 5, (EXAMPLES,), generator=draw)] = True
    lists = [[int(each)] for each in torch.randint(0, 5, (EXAMPLES,), generator=draw)]
    given = {
        "at": BLOCKS,
        "metric": logit_difference(0, 1),
        "positions": {"numbers": numbers, "mask": mask, "lists": lists, "one": 2},
        "source_positions": [lists, numbers, numbers, 1],
    }
    whole = sweep(model, base, source, **given)
    assert_same(sweep(model, parts(base), parts(source), **given), whole)
    assert_same(sweep(model, base, source, batch_size=2, **given), whole)


METRICS = {
    "probability": lambda base: probability(targets()),
    "log probability": lambda base: log_probability([[0, 1]] * EXAMPLES),
    "accuracy": lambda base: accuracy(targets().tolist()),
    "kl": lambda base: kl(base),
    "agreement": lambda base: agreement(base),
    "normalized": lambda base: normalized(
        logit_difference(targets(), 2), base.output.logits + 1, base.output.logits.flip(-1)
    ),
    "own": lambda base: lambda output: output.logits[:, -1, 0],
}  # fmt: skip


@pytest.mark.parametrize("name", METRICS)
def test_metrics_are_cut_along_with_the_rows(name):
    model, base, source = make("llama"), batch("llama", size=EXAMPLES), batch("llama", seed=2, size=EXAMPLES)
    metric = METRICS[name](run(model, base))
    whole = sweep(model, base, source, BLOCKS, metric=metric)
    assert_same(sweep(model, parts(base), parts(source), BLOCKS, metric=metric), whole)


class Own:
    """A metric of a user's own with a value for each example."""

    def __init__(self, values):
        self.values = values

    def take(self, rows):
        return Own(self.values[rows])

    def __call__(self, output):
        return output.logits[:, -1, 0] * self.values


def test_a_metric_of_ones_own_takes_its_rows():
    model, base = make("gpt2"), batch("gpt2", size=EXAMPLES)
    metric = Own(torch.arange(1.0, EXAMPLES + 1))
    whole = sweep(model, base, None, BLOCKS, metric=metric, op=Zero())
    assert_same(sweep(model, parts(base), None, BLOCKS, metric=metric, op=Zero()), whole)


@pytest.mark.parametrize("op", [Zero(), Add(torch.ones(16)), Mean(torch.ones(16)), lambda base, source, draw: -base])
def test_operators_are_those_of_the_whole_batch(op):
    model, base = make("gpt2"), batch("gpt2", size=EXAMPLES)
    given = {"at": BLOCKS, "metric": logit_difference(targets(), 0), "op": op}
    assert_same(sweep(model, parts(base), None, **given), sweep(model, base, None, **given))


def test_a_run_is_cut_and_so_is_a_counterfactual_source():
    model, base, source = make("gpt2"), batch("gpt2", size=EXAMPLES), batch("gpt2", seed=2, size=EXAMPLES)
    with torch.no_grad():
        runs = run(model, base), run(model, source, BLOCKS)
    whole = sweep(model, *runs, **settings("gpt2"))
    assert_same(sweep(model, *runs, batch_size=3, **settings("gpt2")), whole)


class Compares(torch.nn.Module):
    """Compares each example with all others, as CLIP does."""

    def __init__(self):
        super().__init__()
        self.part = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.part(x) @ x.T


def several(name="gpt2", **given):
    """A sweep over two batches."""
    base = batch(name, size=EXAMPLES)
    call = {"model": make(name), "base": parts(base), "source": parts(batch(name, seed=2, size=EXAMPLES)), "at": BLOCKS,
            "metric": logit_difference(0, 1)}  # fmt: skip
    return sweep(**{**call, **given})


def one_number(output):
    return output.logits.mean()


REFUSED = {
    "one number for a batch": ({"metric": one_number}, r"one number for a batch of 4 examples.*return \[4\]"),
    "too few targets": ({"metric": logit_difference([0] * 4, 1)}, r"entries for 4 examples, and example 7 of the data"),
    "too many targets": ({"metric": logit_difference([0] * 30, 1)}, r"entries for 30 examples and the data has 11"),
    "too few positions": ({"positions": [torch.zeros(4, 1).long()]}, r"positions has entries for 4 examples"),
    "no such token": ({"positions": [0, 77]}, r"positions=77 is a token of no example.*the longest"),
    "pooled sources": ({"op": Mean()}, r"Mean at block_output.0 pools all examples.*mean_of\(model, at, source\)"),
    "values for each example": (
        {"op": Add(torch.ones(4, 16)), "source": None},
        r"Add at block_output.0 holds value of shape \[4, 16\], one for each example.*\[16\]",
    ),
    "a source that is one batch": ({"source": batch("gpt2")}, r"base is a data set and the source is one dict"),
    "a base that is one batch": ({"base": batch("gpt2")}, r"the source is a data set and the base is one batch"),
    "fewer sources": ({"source": parts(batch("gpt2", size=8), examples=8)}, r"batch 2 of the base has 3 .*source 0"),
    "other sources": ({"source": parts(batch("gpt2", size=11), 3)}, r"batch 0 of the base has 4 examples .* source 3"),
    "more sources": ({"source": parts(batch("gpt2", size=15), 4, 15)}, r"batch 2 of the base has 3 .*source 4"),
    "no batches": ({"base": iter(()), "source": None, "op": Zero()}, r"the base has no batches.*no spent iterator"),
    "rows and batches": ({"base": Rows.of(batch("gpt2"))}, r"give both as rows, or both as batches"),
    "rows of two lengths": (
        {"base": Rows.of(batch("gpt2")), "source": Rows.of(batch("gpt2", size=4))},
        r"the base has 3 rows and the source 4",
    ),
    "answers that depend on others": (
        {"model": Compares().eval(), "base": torch.ones(6, 4), "source": None, "op": Zero(), "at": "module:part",
         "positions": None, "batch_size": 2, "metric": lambda output: output[:, 0]},
        r"batch_size=2 rows do not hold the 6 examples.*another shape.*batch_size=6",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_batches_cannot_have_is_refused_in_one_line(case):
    given, message = REFUSED[case]
    with pytest.raises(InterventionError, match=message) as error:
        several(**given)
    assert "\n" not in str(error.value)


def test_means_of_a_data_set_are_operators_of_its_sweep():
    model, base = make("gpt2"), batch("gpt2", size=EXAMPLES)
    ops = mean_of(model, BLOCKS, parts(base))
    given = {"at": BLOCKS, "metric": logit_difference(0, 1), "op": ops}
    assert_same(sweep(model, parts(base), None, **given), sweep(model, base, None, **given))


@contextmanager
def counted(model):
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


def test_a_batch_is_swept_in_as_many_passes_as_before():
    """Base, source, and one pass: no call more where nothing is cut and nothing kept."""
    model, base, source = make("gpt2"), batch("gpt2"), batch("gpt2", seed=2)
    with counted(model) as calls:
        sweep(model, base, source, Location(1), metric=logit_difference(0, 1))
    assert len(calls) == 3


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture
def dying(monkeypatch):
    """Let the process be killed, or stopped, when so many passes were measured."""

    def after(passes, how=signal.SIGKILL):
        measured, left = Passes._measured, [passes]

        def measure(self, part):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), how)
            yield from measured(self, part)

        monkeypatch.setattr(Passes, "_measured", measure)

    return after


CALLS = {
    "one batch": lambda **given: several(base=batch("gpt2"), source=batch("gpt2", seed=2), batch_size=3, **given),
    "chunks": lambda **given: several(
        base=batch("gpt2", size=7), source=batch("gpt2", seed=2, size=7), batch_size=3, **given
    ),
    "batches": lambda **given: several(batch_size=4, **given),
    "noise": lambda **given: several(
        source=None, op=Noise(0.5), generator=torch.Generator().manual_seed(3), batch_size=8, **given
    ),
}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("call", CALLS)
def test_a_killed_sweep_continues_to_the_same_bits(call, how, tmp_path, dying):
    whole = CALLS[call]()
    for passes in (1, 4):

        def work(passes=passes):
            dying(passes, how)
            CALLS[call](checkpoint=tmp_path / "a")

        assert forked(work) == (-9 if how == signal.SIGKILL else 1)
    assert_same(CALLS[call](checkpoint=tmp_path / "a"), whole, exactly=True)
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["cells.jsonl", "sweep.json"]
    again = CALLS[call](checkpoint=tmp_path / "a")
    assert_same(again, whole, exactly=True)


@pytest.mark.parametrize("left", [100, 700, 3000])
def test_a_sweep_whose_file_cannot_grow_says_so_and_goes_on_from_what_is_kept(left, tmp_path):
    """Also one that ended while it wrote its settings, or was killed there."""
    call, folder = CALLS["batches"], tmp_path / "a"
    whole = call()

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (left, left))
        with pytest.raises(InterventionError, match=r"cannot be written: File too large; .*call sweep again"):
            call(checkpoint=folder)

    assert forked(work) == 0
    (folder / ".sweep.json.partial").write_text("{")
    assert_same(call(checkpoint=folder), whole, exactly=True)


def test_a_finished_sweep_runs_nothing_again(tmp_path):
    model, inputs = make("gpt2"), batch("gpt2", size=EXAMPLES)
    call = {"source": None, "op": Zero(), "at": BLOCKS, "metric": logit_difference(0, 1), "checkpoint": tmp_path / "a"}
    first = sweep(model, parts(inputs), **call)
    with counted(model) as calls:
        assert_same(sweep(model, parts(inputs), **call), first, exactly=True)
    assert not calls


def test_what_was_measured_is_not_measured_again(tmp_path, dying):
    """After 4 of 15 passes, 11 are left, and the base runs once more."""
    model = make("gpt2")
    call = {"base": batch("gpt2"), "source": None, "op": Zero(), "at": BLOCKS, "metric": logit_difference(0, 1),
            "batch_size": 3, "checkpoint": tmp_path / "a"}  # fmt: skip

    def work():
        dying(4)
        sweep(model, **call)

    assert forked(work) == -9
    with counted(model) as calls:
        sweep(model, **call)
    assert len(calls) == 1 + 11


def test_a_torn_line_is_cut_off(tmp_path):
    first = several(checkpoint=tmp_path / "a")
    file = tmp_path / "a/cells.jsonl"
    content = file.read_bytes()
    for end in (len(content) - 1, len(content) // 2, len(content) // 3):
        file.write_bytes(content[:end])
        assert_same(several(checkpoint=tmp_path / "a"), first, exactly=True)
        assert file.read_bytes() == content


OTHERS = {
    "model": {"model": make("gpt2", seed=1)},
    "locations": {"at": BLOCKS[:2]},
    "metric": {"metric": logit_difference(0, 2)},
    "operators": {"op": Zero(), "source": None},
    "positions": {"positions": [0, 1]},
    "batch_size": {"batch_size": 7},
    "data": {"base": parts(batch("gpt2", seed=9, size=EXAMPLES))},
}


@pytest.mark.parametrize("other", OTHERS)
def test_the_checkpoint_of_another_sweep_is_refused(other, tmp_path):
    several(checkpoint=tmp_path / "a")
    given = OTHERS[other]
    message = "over other data: batch 0" if other == "data" else f"keeps a sweep with another {other}"
    with pytest.raises(InterventionError, match=f"{message}.*choose another folder") as error:
        several(checkpoint=tmp_path / "a", **given)
    assert "\n" not in str(error.value)


def test_folders_that_hold_no_checkpoint(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InterventionError, match="holds other files than the checkpoint of a sweep"):
        several(checkpoint=tmp_path)
    with pytest.raises(InterventionError, match=r"thesis.tex cannot be written: .*call sweep again"):
        several(checkpoint=tmp_path / "thesis.tex")
    with pytest.raises(InterventionError, match=r"keeps the state of the generator.*pass generator="):
        several(checkpoint=tmp_path / "a", source=None, op=Noise(0.5))


def test_two_sweeps_do_not_share_a_checkpoint(tmp_path):
    def again():
        for inputs in parts(batch("gpt2", size=EXAMPLES)):
            with pytest.raises(InterventionError, match="is in use by another sweep"):
                several(checkpoint=tmp_path / "a")
            yield inputs

    several(base=again(), checkpoint=tmp_path / "a")


@pytest.mark.parametrize("cells", [120, pytest.param(10_000, marks=pytest.mark.full)])
def test_many_cells_killed_at_random_moments_are_the_same_grid(cells, tmp_path):
    """Killed twice and stopped by Ctrl-C once, at random moments."""
    model, draw = make("gpt2"), random.Random(cells)
    places = {f"row {n}": Location(n % LAYERS, dims=[n % 16]) for n in range(cells // 5)}

    def work(**given):
        return several(model=model, base=batch("gpt2"), source=batch("gpt2", seed=2), at=places, **given)

    began = time.monotonic()
    whole = work()
    took = time.monotonic() - began
    assert whole.per_example.numel() == 3 * cells
    for how in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
        forked(lambda: work(checkpoint=tmp_path / "a"), draw.uniform(0.1, 0.6) * took, how)
    assert_same(work(checkpoint=tmp_path / "a"), whole, exactly=True)
