import pytest
import torch

from distill.interchange.random_vectors import Attended
from distill.teachers.cache import digest
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
