import time

import pytest
import torch

from distill.errors import DistillError
from distill.interchange.random_vectors import Attended
from distill.teachers.cache import Cache, digest
from interventions import (
    PCA,
    Add,
    BoundlessRotation,
    Interpolate,
    Location,
    Mask,
    Mixup,
    Noise,
    Rotation,
    SparseCoder,
    Swap,
    Zero,
)

MIXED = Mixup(0.5, normal=torch.ones(2))


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (Location(3), "d48ec7fae50c6a9c3c6557cf19df08b26f6042ba"),
        (Location(1, dims=range(4)), "364c43aa06d9d275cb0277ec62f8dc6ce51b8e5e"),
        ({Location(1): Swap()}, "97f3f1a93d3b2ec487f52be6c76de419cb0fdfa3"),
        (
            {Location(2, site="attention_pattern"): Attended(MIXED)},
            "714082821b90c8ec9fd0a7feec5bda204c0dddfa",
        ),
        (MIXED, "b7ba840399b67a157ffb047305b70fb7657e0fcd"),
        (Noise(0.1), "7e730eb794e52ecc8a6faf8dd3c494b0ffc96288"),
        (Zero(), "aabbc1d4be20f9a24fec1b9391c5e8ac62d08ffb"),
        (Add(torch.ones(2)), "c27ab7a0d6815ee36d9e8eeaac5e6e260efd494b"),
        (Interpolate(0.5), "dfcb1f223ceb36e9c7e1036feec6e47b21d152e5"),
    ],
    ids=lambda part: type(part).__name__,
)
def test_what_was_kept_is_found_by_later_versions(part, expected):
    assert digest(part) == expected


def test_keys_name_the_files_of_subspaces():
    kinds = (Rotation, BoundlessRotation, PCA, Mask, SparseCoder)
    names = ("rotations", "rotations", "pca", "masks", "sparse")
    assert [kind.__module__ for kind in kinds] == [f"interventions.subspaces.{name}" for name in names]


def largest(samples: int, tokens: int, classes: int):
    """Yield the 50 largest logits of samples, in single precision."""
    draw = torch.Generator().manual_seed(0)
    for number in range(samples):
        values = torch.randn(tokens, 50, generator=draw).mul(2).add(9).sort(-1, descending=True).values
        indices = torch.randint(classes, (tokens, 50), dtype=torch.int32, generator=draw)
        level = torch.randn(tokens, 1, generator=draw)
        kept = {"values": values, "indices": indices, "level": level, "classes": torch.tensor(classes)}
        yield f"samples/{digest(number)}", kept


@pytest.mark.parametrize("samples", [500, pytest.param(10_000, marks=pytest.mark.full)])
def test_many_samples_are_few_files_of_few_bytes_that_are_opened_at_once(samples, tmp_path):
    tokens, folder = 32, tmp_path / "answers"
    cache, entries = Cache(folder, {"model": "m"}), dict[str, dict[str, torch.Tensor]]()
    for key, kept in largest(samples, tokens, 128_256):
        entries[key] = kept
        if len(entries) == 100:
            cache.put_all(entries)
            entries.clear()
    files = [each for each in folder.iterdir() if each.is_file()]
    assert len(files) <= 4  # its description, a shard, its index, the lock of the shard
    assert sum(each.stat().st_size for each in files) <= 300 * samples * tokens
    began = time.process_time()
    again = Cache(folder, {"model": "m"})
    assert again.count("samples") == samples
    assert time.process_time() - began <= samples / 10_000
    for key, kept in list(largest(120, tokens, 128_256))[::40]:
        found = again.get(key)
        assert found is not None
        assert all(torch.equal(found[name], kept[name]) and found[name].dtype == kept[name].dtype for name in kept)


def test_facts_that_one_side_does_not_know_are_not_compared(tmp_path):
    folder = tmp_path / "answers"
    Cache(folder, {"model": "m", "tokenizer": "a"})
    Cache(folder, {"model": "m"})
    Cache(folder, {"model": "m", "tokenizer": None})
    with pytest.raises(DistillError, match="with tokenizer='a', and this one has tokenizer='b'"):
        Cache(folder, {"model": "m", "tokenizer": "b"})
    with pytest.raises(DistillError, match="with model='m', and this one has model=None"):
        Cache(folder, {"tokenizer": "a"})
