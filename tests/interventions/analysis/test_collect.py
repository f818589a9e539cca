"""Activations in a folder are those of memory, token by token; a killed call, or several, leave the same bytes."""

import errno
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.utils.data import DataLoader

from distill import Rows, linear_probe
from distill.evaluation.linear_probe import features
from interventions import PCA, Collected, InterventionError, Location, Rotation, SparseCoder, collect, run
from interventions.analysis import activation_shards, progress
from tests.interventions.tiny_models import TRANSFORMERS, batch, make, trace

COLLECT = sys.modules["interventions.analysis.collect"]
BLOCK = Location(1)
PLACES = {
    **{name: Location(1) for name in TRANSFORMERS},
    "cnn": Location(module="layer1.0"),
    "lstm": Location(module="lstm"),
    "mlp": Location(module="2"),
}


def lengths(count: int, most: int) -> list[int]:
    draw = random.Random(count)
    return [draw.randint(1, most) for _ in range(count)]


def text_rows(count: int, most: int = 9, side: str = "right") -> Rows:
    """Rows of token ids of several lengths, padded as they are read."""
    draw = torch.Generator().manual_seed(count)
    ids = [torch.randint(1, 30, (length,), generator=draw) for length in lengths(count, most)]
    table = {"input_ids": ids, "attention_mask": [torch.ones_like(each) for each in ids]}
    return Rows(table, padding_side=side)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def small_shards(monkeypatch, rows: int) -> None:
    monkeypatch.setattr(COLLECT, "ROWS_A_SHARD", rows)


@pytest.mark.parametrize("name", PLACES)
def test_what_is_collected_is_what_runs_read(name, tmp_path):
    model, place = make(name), PLACES[name]
    batches = [batch(name, seed=seed, size=size) for seed, size in ((1, 3), (2, 2))]
    before = trace(model)
    found = collect(model, batches, place, tmp_path / "a")
    assert trace(model) == before
    whole = found.batch(range(len(found)))
    with torch.no_grad():  # another kernel computes what autograd is to follow
        read = [run(model, each, place).vectors(place) for each in batches]
    expected = torch.cat([each if each.ndim == 2 else each.flatten(0, 1) for each in read])
    assert torch.equal(whole[str(place)], expected)
    assert whole["row"].tolist() == [row for row in range(5) for _ in range(len(expected) // 5)]
    assert ("position" in found.columns) == (read[0].ndim > 2)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("positions", [None, -1, [0, -1], slice(0, 1)])
def test_each_vector_is_found_again_by_row_and_position(positions, side, tmp_path):
    """Padding is never among them, on whichever side it is."""
    model, rows = make("llama"), text_rows(11, side=side)
    if positions == [0, -1]:
        longer = {name: [each for each in column if len(each) > 1] for name, column in rows.table.items()}
        rows = Rows(longer, padding_side=side)
    found = collect(model, rows, [BLOCK, Location(0, "query")], tmp_path / "a", positions=positions, batch_size=4)
    tokens = sum(len(each) for each in rows.table["input_ids"])
    assert len(found) == (tokens if positions is None else len(rows) * (2 if positions == [0, -1] else 1))
    for each in found:
        ids = rows.table["input_ids"][int(each["row"])]
        alone = run(model, {"input_ids": ids[None]}, BLOCK).vectors(BLOCK)[0].detach()
        assert torch.allclose(each["block_output.1"], alone[each["position"]], atol=1e-4)
        assert each["query.0"].shape == (4, 4)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, torch.float64, None])
def test_a_dtype_is_rounded_to_once(dtype, tmp_path):
    model, inputs = make("bert"), batch("bert")
    found = collect(model, [inputs], BLOCK, tmp_path / "a", dtype=dtype)
    rounded = torch.bfloat16 if dtype == "bfloat16" else dtype or torch.float32
    whole = found.batch(range(len(found)))["block_output.1"]
    assert torch.equal(whole, run(model, inputs, BLOCK).vectors(BLOCK).flatten(0, 1).detach().to(rounded))


def test_a_subspace_is_collected_in_its_coordinates(tmp_path):
    model, inputs = make("gpt2"), batch("gpt2")
    place = Location(1, subspace=Rotation(3, 16))
    found = collect(model, [inputs], place, tmp_path / "a")
    read = run(model, inputs, place).vectors(place).flatten(0, 1).detach()
    assert torch.equal(found.batch(range(len(found)))[str(place)], read)
    with pytest.raises(InterventionError, match="holds activations with subspaces="):
        collect(model, [inputs], Location(1, subspace=Rotation(3, 16, seed=1)), tmp_path / "a")


def forked(work: Callable[[], object], patience: float | None = None, how: int = signal.SIGKILL) -> int:
    """Return the status of a process that does the work; it is sent a signal after `patience` seconds."""
    child = os.fork()
    if not child:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    if patience is not None:
        time.sleep(patience)
        os.kill(child, how)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Deadly:
    """Rows whose process is killed, or stopped by Ctrl-C, when they are read so often."""

    def __init__(self, rows: Rows, left: int, how: int) -> None:
        self.rows, self.left, self.how = rows, left, how

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, numbers):
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), self.how)
        return self.rows.batch(numbers)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_three_times_is_the_same_bytes(how, tmp_path, monkeypatch):
    small_shards(monkeypatch, 10)
    model, rows = make("gpt2"), text_rows(60)
    settings = {"at": [BLOCK, Location(0, "mlp_activation")], "batch_size": 4, "dtype": torch.bfloat16}
    collect(model, rows, folder=tmp_path / "whole", **settings)
    ends = [
        forked(lambda n=n: collect(model, Deadly(rows, n, how), folder=tmp_path / "b", **settings)) for n in (5, 9, 14)
    ]
    assert ends == [-9 if how == signal.SIGKILL else 1] * 3
    there = len(list((tmp_path / "b").glob("0*")))
    assert 0 < there < len(list((tmp_path / "whole").glob("0*")))
    with pytest.raises(InterventionError, match=rf"not complete: {there} shards are there"):
        len(Collected.open(tmp_path / "b"))
    collect(model, rows, folder=tmp_path / "b", **settings)
    assert contents(tmp_path / "b") == contents(tmp_path / "whole")


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(1, 6))])
def test_killed_at_random_moments_is_the_same_bytes(seed, tmp_path, monkeypatch):
    small_shards(monkeypatch, 8)
    model, rows, draw = make("llama"), text_rows(200), random.Random(seed)
    began = time.monotonic()
    collect(model, rows, BLOCK, tmp_path / "whole", batch_size=4)
    whole = time.monotonic() - began
    for _ in range(3):
        forked(lambda: collect(model, rows, BLOCK, tmp_path / "b", batch_size=4), draw.uniform(0, whole))
    collect(model, rows, BLOCK, tmp_path / "b", batch_size=4)
    assert contents(tmp_path / "b") == contents(tmp_path / "whole")


@pytest.mark.parametrize("as_rows", [True, False])
def test_several_processes_write_what_one_does(as_rows, tmp_path, monkeypatch):
    small_shards(monkeypatch, 16)
    monkeypatch.setattr(COLLECT, "BATCH_SIZE", 4)  # batches of an iterable in a shard: 4
    model, rows = make("gpt2"), text_rows(40)
    data = (lambda: rows) if as_rows else (lambda: (rows.batch(range(n, n + 2)) for n in range(0, 40, 2)))
    collect(model, data(), BLOCK, tmp_path / "one", batch_size=4)
    for rank in (2, 0):
        collect(model, data(), BLOCK, tmp_path / "three", batch_size=4, process=(rank, 3))
    with pytest.raises(InterventionError, match="not complete"):
        len(Collected.open(tmp_path / "three"))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    collect(model, data(), BLOCK, tmp_path / "three", batch_size=4)
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


def test_what_killed_processes_left_is_removed(tmp_path):
    """Files that were being written, or locked, when a process was killed."""
    model, rows = make("gpt2"), text_rows(8)
    collect(model, rows, BLOCK, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "a")
    for name in (".index.json.0.partial", ".complete.json.0.partial", ".00000.lock", ".00000.partial/0.safetensors"):
        (tmp_path / "a" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_text("half")
    collect(model, rows, BLOCK, tmp_path / "a")
    assert contents(tmp_path / "a") == contents(tmp_path / "whole")


def test_two_processes_at_the_same_shards_do_no_harm(tmp_path, monkeypatch):
    small_shards(monkeypatch, 8)
    model, rows = make("gpt2"), text_rows(64)
    collect(model, rows, BLOCK, tmp_path / "one", batch_size=4)
    children = []
    for _ in range(2):
        children.append(os.fork())
        if not children[-1]:
            try:
                collect(model, rows, BLOCK, tmp_path / "both", batch_size=4)
                os._exit(0)
            except BaseException:
                os._exit(1)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    collect(model, rows, BLOCK, tmp_path / "both", batch_size=4)
    assert contents(tmp_path / "both") == contents(tmp_path / "one")


def test_what_is_complete_is_not_run_again(tmp_path):
    model, rows, calls = make("gpt2"), text_rows(20), []
    collect(model, rows, BLOCK, tmp_path / "a")
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    collect(model, rows, BLOCK, tmp_path / "a")
    handle.remove()
    assert not calls


CHANGES = {
    "model": (lambda: (make("gpt2", seed=1), text_rows(12)), {}, "of another model"),
    "weights": (lambda: (make("gpt2").bfloat16(), text_rows(12)), {}, "of another model"),
    "data": (lambda: (make("gpt2"), text_rows(13)), {}, "of another data"),
    "rows": (lambda: (make("gpt2"), changed(text_rows(12))), {}, r"of other data: some of the rows up to 11"),
    "positions": (None, {"positions": -1}, r"positions='None', and positions='-1'"),
    "dtype": (None, {"dtype": torch.bfloat16}, r"dtype=None, and dtype='bfloat16'"),
    "batch size": (None, {"batch_size": 3}, r"batch_size=4, and batch_size=3"),
    "places": (None, {"at": Location(2)}, r"at=\['block_output.1'\], and at=\['block_output.2'\]"),
}


def changed(rows: Rows) -> Rows:
    """The same rows but for the last token of the last."""
    ids = [each.clone() for each in rows.table["input_ids"]]
    ids[-1][-1] += 1
    return Rows({**rows.table, "input_ids": ids})


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_of_something_else_is_refused(change, tmp_path):
    make_other, settings, message = CHANGES[change]
    given = {"at": BLOCK, "batch_size": 4}
    collect(make("gpt2"), text_rows(12), folder=tmp_path / "a", **given)
    before = contents(tmp_path / "a")
    model, rows = make_other() if make_other else (make("gpt2"), text_rows(12))
    with pytest.raises(InterventionError, match=message + ".*choose another folder") as error:
        collect(model, rows, folder=tmp_path / "a", **{**given, **settings})
    assert "\n" not in str(error.value)
    assert contents(tmp_path / "a") == before


class Unlike(torch.nn.Module):
    """Its second part is as wide as there are rows."""

    def __init__(self) -> None:
        super().__init__()
        self.part = torch.nn.Identity()

    def forward(self, x):
        return self.part(x[:, : len(x)])


REFUSED = {
    "no place": (lambda: (make("gpt2"), [batch("gpt2")], "block_output.9", {}), r"out of range|has 3 layers"),
    "patterns": (lambda: (make("gpt2"), [batch("gpt2")], "attention_pattern.1", {}), r"wide as each.*attention_heads"),
    "other tokens": (
        lambda: (make("t5"), [batch("t5")], ["block_output.1", "encoder/block_output.1"], {}),
        r"12 vectors in this batch and encoder/block_output.1 has 15.*folder of its own",
    ),
    "no places": (lambda: (make("gpt2"), [batch("gpt2")], [], {}), r"names no location"),
    "no batches": (lambda: (make("gpt2"), [], BLOCK, {}), r"no batches.*no spent iterator"),
    "train mode": (lambda: (make("gpt2").train(), [batch("gpt2")], BLOCK, {}), r"train mode"),
    "positions beyond a row": (lambda: (make("gpt2"), [batch("gpt2")], BLOCK, {"positions": 7}), r"positions=7 names"),
    "a dtype": (lambda: (make("gpt2"), [batch("gpt2")], BLOCK, {"dtype": torch.int8}), r"dtype=torch.int8 is not"),
    "too large": (
        lambda: (make("mlp"), [1e6 * batch("mlp")], "module:0", {"dtype": torch.float16}),
        r"more than dtype=torch.float16 can hold.*bfloat16",
    ),
    "a process": (lambda: (make("gpt2"), [batch("gpt2")], BLOCK, {"process": (2, 2)}), r"\(2, 2\) is none of 2"),
    "widths": (
        lambda: (Unlike().eval(), [torch.ones(2, 4), torch.ones(3, 4)], "module:part", {}),
        r"module:part has vectors of float32 \[3\] in the rows 2 to 4, and float32 \[2\] before",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_collected_is_refused_in_one_line(case, tmp_path):
    make_case, message = REFUSED[case]
    model, data, at, settings = make_case()
    with pytest.raises(InterventionError, match=message) as error:
        collect(model, data, at, tmp_path / "a", **settings)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_folders_that_cannot_be_written(tmp_path, monkeypatch):
    model, rows = make("gpt2"), text_rows(8)
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("")
    for folder, message in (
        ("file", "cannot be written"),
        ("file/a", "cannot be written"),
        ("other", "holds other files"),
    ):
        with pytest.raises(InterventionError, match=message):
            collect(model, rows, BLOCK, tmp_path / folder)
    with pytest.raises(InterventionError, match=r"holds no activations: there is no index.json"):
        Collected.open(tmp_path / "other")

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    small_shards(monkeypatch, 4)
    ends = activation_shards.ShardWriter.end
    calls: list[int] = []
    monkeypatch.setattr(
        activation_shards.ShardWriter,
        "end",
        lambda *args: full() if calls.append(1) or len(calls) > 1 else ends(*args),
    )
    with pytest.raises(
        InterventionError, match=r"No space left on device; .*call collect again: what is written stays"
    ):
        collect(model, rows, BLOCK, tmp_path / "a", batch_size=4)
    assert [file.name for file in (tmp_path / "a").glob("0*")] == ["00000"]
    assert not list((tmp_path / "a").glob(".*"))
    monkeypatch.setattr(activation_shards.ShardWriter, "end", ends)
    assert len(collect(model, rows, BLOCK, tmp_path / "a", batch_size=4)) == sum(map(len, rows.table["input_ids"]))


def test_errors_of_the_data_are_those_of_the_data(tmp_path):
    def reads():
        yield batch("gpt2")
        raise FileNotFoundError(errno.ENOENT, "no such file", "elsewhere.txt")

    with pytest.raises(FileNotFoundError, match="elsewhere"):
        collect(make("gpt2"), reads(), BLOCK, tmp_path / "a")
    assert not list((tmp_path / "a").glob(".*"))


def test_a_damaged_shard_is_found(tmp_path):
    found = collect(make("gpt2"), text_rows(8), BLOCK, tmp_path / "a")
    file = tmp_path / "a/00000/0.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(InterventionError, match=r"00000 is damaged .*collect again"):
        found.batch([0])
    shutil.rmtree(tmp_path / "a/00000")
    (tmp_path / "a/complete.json").unlink()
    assert collect(make("gpt2"), text_rows(8), BLOCK, tmp_path / "a").batch([0])["row"].tolist() == [0]


@pytest.mark.parametrize("name", ["0.safetensors", "1.safetensors", "tokens.safetensors"])
def test_one_changed_bit_of_a_shard_is_found_when_it_is_first_read(name, tmp_path, monkeypatch):
    small_shards(monkeypatch, 6)
    places = [BLOCK, Location(0)]
    found = collect(make("gpt2"), text_rows(12), places, tmp_path / "a", batch_size=3)
    file = tmp_path / "a/00001" / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    found.batch([0])  # of another shard
    with pytest.raises(InterventionError, match=rf"00001 is damaged \(the bytes of {name} are not .*collect again"):
        found.batch([len(found) - 1])
    content[-1] ^= 1
    file.write_bytes(content)
    assert found.batch([len(found) - 1])["row"].tolist() == [11]
    file.unlink()
    with pytest.raises(InterventionError, match="00001 is damaged .*No such file"):
        type(found)(tmp_path / "a").batch([len(found) - 1])


def test_shards_of_an_earlier_version_have_no_checksums_and_are_read(tmp_path):
    found = collect(make("gpt2"), text_rows(4), BLOCK, tmp_path / "a")
    facts = tmp_path / "a/00000/shard.json"
    before = json.loads(facts.read_text())
    assert before.pop("crc32")
    facts.write_text(json.dumps(before))
    assert found.batch([0])["row"].tolist() == [0]


def test_rows_of_vectors_are_read_in_any_order(tmp_path, monkeypatch):
    small_shards(monkeypatch, 6)
    found = collect(make("gpt2"), text_rows(30), BLOCK, tmp_path / "a", batch_size=3)
    whole = found.batch(range(len(found)))
    chosen = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    for name, column in found.batch(chosen).items():
        assert torch.equal(column, whole[name][chosen])
    assert torch.equal(found.batch([-1, 0])["row"], whole["row"][[-1, 0]])
    ordered = torch.cat([each["row"] for each in found.batches(7)])
    assert torch.equal(ordered, whole["row"])
    shuffled = [each["block_output.1"] for each in found.batches(7, generator=torch.Generator().manual_seed(0))]
    assert torch.equal(torch.cat(shuffled), whole["block_output.1"][chosen])
    some = torch.cat([each["row"] for each in found.batches(2, order=[5, 3, 1])])
    assert torch.equal(some, whole["row"][[5, 3, 1]])
    copy = pickle.loads(pickle.dumps(found))
    loaded = next(iter(DataLoader(copy, batch_size=4)))
    assert torch.equal(loaded["block_output.1"], whole["block_output.1"][:4])
    assert found.batch([])["block_output.1"].shape == (0, 16)
    for wrong in ([len(found)], [0.5], "a", [True]):
        with pytest.raises(InterventionError, match=r"is not among the \d+ that were|are chosen by whole numbers"):
            found.batch(wrong)


def test_it_says_what_it_holds(tmp_path):
    found = collect(make("gpt2"), text_rows(8), BLOCK, tmp_path / "a", dtype=torch.float16)
    assert repr(found) == (f"Collected('{tmp_path}/a': {len(found)} vectors of 8 rows; block_output.1 float16 [16])")
    known = Collected.open(tmp_path / "a").to_dict()
    assert known["columns"] == {"block_output.1": {"file": "0.safetensors", "shape": [16], "dtype": "float16"}}
    assert known["rows"] == len(found)
    assert known["settings"]["at"] == ["block_output.1"]


def test_a_probe_and_components_fitted_from_a_folder_are_those_from_memory(tmp_path):
    """The vectors are the same, and so is what is fitted to them; a sparse coder reads them batch by batch."""
    model, place = make("bert"), BLOCK
    draw = torch.Generator().manual_seed(0)
    sets = []
    for name, count in (("train", 60), ("test", 40)):
        rows = Rows({**batch("bert", seed=count, size=count), "labels": torch.randint(0, 2, (count,), generator=draw)})
        found = collect(model, rows, place, tmp_path / name, positions=-1, batch_size=128)
        stored = found.batch(range(len(found)))["block_output.1"]
        assert torch.equal(stored, features(model, rows, place, pool="last"))
        sets.append((rows, Rows({"inputs": stored, "labels": rows.table["labels"]})))
    (train, stored), (test, stored_test) = sets
    probed = linear_probe(model, train, test, at=place, pool="last")
    assert linear_probe(torch.nn.Sequential(torch.nn.Identity()), stored, stored_test, at="module:0") == probed
    memory = PCA.fit(features(model, train, place, pool="last"), 3)
    assert torch.equal(PCA.fit(stored.table["inputs"], 3).components, memory.components)
    dictionary = torch.randn(16, 24, generator=draw)
    coder = SparseCoder(lambda x: (x @ dictionary).relu(), lambda z: z @ dictionary.T)
    found = Collected.open(tmp_path / "train")
    codes = torch.cat([coder.coordinates(each["block_output.1"]) for each in found.batches(7)])
    assert torch.allclose(codes, coder.coordinates(stored.table["inputs"]), atol=1e-5)


def test_progress_is_shown_where_it_takes_long(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    for shown in (True, False):
        console = Console(file=io.StringIO(), force_terminal=True, quiet=not shown)
        collect(make("mlp"), [batch("mlp")] * 3, "module:0", tmp_path / str(shown), console=console)
        assert ("collect" in console.file.getvalue()) is shown


class Many:
    """Texts that are made when they are read, so that they take no memory themselves."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def batch(self, numbers):
        ids = torch.stack([(torch.arange(64) * (number + 7)) % 29 + 1 for number in numbers])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.full)])
def test_memory_holds_a_batch_and_not_the_data(count, tmp_path):
    """10,000 texts of 64 tokens at two locations are 80 MB; the process grows by far less."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=64)).eval()

    def grown() -> float:
        def peak() -> int:
            return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])

        collect(model, Many(64), [Location(0), BLOCK], tmp_path / "first")
        Path("/proc/self/clear_refs").write_text("5")
        before = peak()
        collect(model, Many(count), [Location(0), BLOCK], tmp_path / "many")
        return (peak() - before) / 1024

    read, write = os.pipe()
    assert forked(lambda: os.write(write, str(grown()).encode())) == 0
    assert float(os.read(read, 100)) < 16
    assert len(Collected.open(tmp_path / "many")) == 64 * count
