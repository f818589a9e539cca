import pytest
import torch
from accelerate import Accelerator

from distill import DistillError, fit
from distill.training.checkpoints import Checkpoints, Every
from tests.distill.tiny_models import QUIET, gpt2_lm, mlp, same, spread, vectors, weights


def prepared(folder, model=None, **settings):
    accelerator = Accelerator()
    model = mlp() if model is None else model
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    return model, optimizer, Checkpoints(folder, **settings), accelerator


def train(model, optimizer):
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_weights_and_optimizer_go_on_as_if_nothing_had_happened(tmp_path):
    model, optimizer, checkpoints, accelerator = prepared(tmp_path)
    assert checkpoints.begin(accelerator) == 0
    train(model, optimizer)
    assert checkpoints.save(1) == tmp_path / "step-0000001"
    train(model, optimizer)
    other, optimizer, checkpoints, accelerator = prepared(tmp_path, resume=True)
    assert checkpoints.begin(accelerator) == 1
    train(other, optimizer)
    assert same(weights(model), weights(other))


def test_the_newest_two_are_kept_by_number(tmp_path):
    *_, checkpoints, accelerator = prepared(tmp_path)
    checkpoints.begin(accelerator)
    assert checkpoints.last() is None
    for step in (5, 100, 9_999_999, 10_000_000):
        checkpoints.save(step)
        assert checkpoints.last().name == f"step-{step:07d}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10000000", "step-9999999"]


def test_saving_a_step_again_and_discarding_it(tmp_path):
    *_, checkpoints, accelerator = prepared(tmp_path)
    checkpoints.begin(accelerator)
    for step in (1, 2, 2):
        checkpoints.save(step)
    checkpoints.discard(2)
    checkpoints.discard(7)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000001"]


@pytest.mark.parametrize("content", [("log.jsonl",), ("log.jsonl", "state/part.safetensors")])
def test_a_checkpoint_of_which_a_part_arrived_is_none(content, tmp_path):
    """Not every file system moves a folder at once."""
    model, optimizer, checkpoints, accelerator = prepared(tmp_path)
    checkpoints.begin(accelerator)
    train(model, optimizer)
    kept = [checkpoints.save(1), checkpoints.save(2)]
    for name in content:
        (tmp_path / "step-0000003" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "step-0000003" / name).touch()
    *_, checkpoints, accelerator = prepared(tmp_path, resume=True)
    assert checkpoints.begin(accelerator) == 2
    assert all(each.is_dir() for each in kept)


def test_an_unfinished_checkpoint_is_none(tmp_path):
    *_, checkpoints, accelerator = prepared(tmp_path)
    checkpoints.begin(accelerator)
    (tmp_path / "unfinished").mkdir(parents=True)
    (tmp_path / "unfinished" / "rubbish").touch()
    assert checkpoints.last() is None
    saved = checkpoints.save(3)
    assert not (saved / "rubbish").exists()


def test_nothing_to_go_on_from(tmp_path):
    *_, checkpoints, accelerator = prepared(tmp_path, resume=True)
    with pytest.warns(UserWarning, match=r"holds no checkpoint: the run ended before its first, and starts anew"):
        assert checkpoints.begin(accelerator) == 0


def test_tied_weights(tmp_path):
    model, _, checkpoints, accelerator = prepared(tmp_path, gpt2_lm(2))
    checkpoints.begin(accelerator)
    checkpoints.save(1)
    other, _, checkpoints, accelerator = prepared(tmp_path, gpt2_lm(2), resume=True)
    assert not same(weights(model), weights(other))
    checkpoints.begin(accelerator)
    assert same(weights(model), weights(other))
    assert other.lm_head.weight is other.transformer.wte.weight


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (7, Every(steps=7)), ("7", Every(steps=7)), ("90 s", Every(seconds=90.0)), ("1 second", Every(seconds=1.0)),
        ("10 minutes", Every(seconds=600.0)), ("0.5min", Every(seconds=30.0)), ("2 hours", Every(seconds=7200.0)),
    ],
)  # fmt: skip
def test_steps_and_times(given, expected):
    assert Every.of(given) == expected


@pytest.mark.parametrize(
    "given", [0, -1, True, 2.5, None, "", "0 minutes", "many", "-3", "10 weeks", "minutes", "5 ss", "9" * 5000]
)
def test_what_is_no_interval(given):
    with pytest.raises(DistillError, match=r'is no interval .*every=200, or a time, every="10 minutes"'):
        Every.of(given)


def test_one_process_saves_by_the_clock(tmp_path):
    fit(spread(mlp()), spread(mlp(), 1), {}, vectors(), steps=5, batch_size=4, output_dir=tmp_path, console=QUIET,
        every="0.0001 s")  # fmt: skip
    assert sorted(each.name for each in (tmp_path / "checkpoints").iterdir()) == ["step-0000004", "step-0000005"]
