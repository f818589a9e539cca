"""Pointer-value retrieval on images of four digits, of which the first chooses the answer.

Zhang, Raghu, Kleinberg, Bengio 2021 (arXiv:2107.12580).
"""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from distill.data.rows import Rows
from distill.data.seeds import decided
from distill.data.task import Recipe, Task, seeded

TRAIN_ROWS, TEST_ROWS = 40_000, 4_000
CLASSES = tuple("0123456789")
# For each pointer digit the tile with the answer: 0 top left (the pointer), 1 top right, 2 and 3 below.
ANSWER_TILE = (1, 1, 1, 1, 2, 2, 2, 3, 3, 3)


def task() -> Task:
    """Return the task of pointer-value retrieval on scikit-learn's 8x8 handwritten digits.

    Of four tiles, the top-left one's digit chooses the tile whose digit is the answer: 0 to 3 choose the top right
    tile, 4 to 6 the bottom left, 7 to 9 the bottom right. A row is `pixel_values` `[1, 16, 16]`, in [-1, 1], and its
    label. Test rows are made of digit images that no training row contains.

    Zhang, Raghu, Kleinberg, Bengio 2021 (pointer value retrieval, arXiv:2107.12580); as a test of interchange
    interventions: Geiger et al. 2021 (arXiv:2112.00826).
    """
    images, digits = images_and_digits()
    train, test = split(digits)
    return Task(
        name="pvr",
        train=grids(images[train], digits[train], TRAIN_ROWS, seed=0),
        test=grids(images[test], digits[test], TEST_ROWS, seed=1),
        classes=CLASSES,
        network=network,
        recipe=Recipe(steps=600, batch_size=256, lr=2e-3, warmup=0.1, weight_decay=0.01),
        student=Recipe(steps=1000, batch_size=256, lr=2e-3, warmup=0.1, weight_decay=0.01),
        description="Pointer-value retrieval: of four digits, the top-left one says which other one is the answer.",
        show=_draw_text,
        clusters="digit images",
    )


def split(digits: Int[Tensor, " images"]) -> tuple[Int[Tensor, " train"], Int[Tensor, " test"]]:
    """Return the indices of the images for training (80 % of each digit) and for tests; always the same ones."""
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    by_digit = [order[digits[order] == digit] for digit in range(10)]
    kept = [len(indices) * 4 // 5 for indices in by_digit]
    train = torch.cat([indices[:count] for indices, count in zip(by_digit, kept, strict=True)])
    test = torch.cat([indices[count:] for indices, count in zip(by_digit, kept, strict=True)])
    return train, test


def grids(images: Float[Tensor, "images 8 8"], digits: Int[Tensor, " images"], rows: int, *, seed: int) -> Rows:
    """Draw `rows` grids of four images, with replacement, and the digit that each pointer chooses.

    The clusters of a row are its images.
    """
    tiles = torch.randint(len(images), (rows, 4), generator=torch.Generator().manual_seed(seed))
    pixels = rearrange(images[tiles], "rows (down across) height width -> rows 1 (down height) (across width)", down=2)
    return Rows({"pixel_values": pixels.contiguous(), "labels": answers(digits[tiles])}, clusters=tiles)


def answers(digits: Int[Tensor, "*rows 4"]) -> Int[Tensor, "*rows"]:
    """Return the digit in the tile that the first tile's digit points to.

    >>> answers(torch.tensor([[0, 7, 8, 9], [5, 7, 8, 9]]))
    tensor([7, 8])
    """
    tile = torch.tensor(ANSWER_TILE)[digits[..., 0]]
    return digits.gather(-1, tile.unsqueeze(-1)).squeeze(-1)


def network(seed: int) -> nn.Module:
    """Return an untrained vision transformer for which each tile is one token."""
    from transformers import ViTConfig, ViTForImageClassification

    settings: dict[str, Any] = dict(
        image_size=16,
        patch_size=8,
        num_channels=1,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: i for i, name in enumerate(CLASSES)},
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return seeded(seed, lambda: ViTForImageClassification(ViTConfig(**settings)))


def images_and_digits() -> tuple[Float[Tensor, "images 8 8"], Int[Tensor, " images"]]:
    """Return scikit-learn's 8×8 images of digits, from −1 to 1, and the digits that they show."""
    with decided(0):  # scikit-learn draws while it is imported
        from sklearn.datasets import load_digits

    bunch = load_digits()
    return torch.tensor(bunch.images, dtype=torch.float32) / 8 - 1, torch.tensor(bunch.target, dtype=torch.int64)


def _draw_text(row: dict[str, Tensor]) -> str:
    shades = " .:-=+*#%@"
    levels = ((row["pixel_values"][0] + 1) / 2 * (len(shades) - 1)).round().long()
    return "\n".join("".join(shades[level] for level in line) for line in levels.tolist())
