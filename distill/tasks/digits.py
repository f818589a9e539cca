"""Handwritten digits, with tests on the same distribution and on shifted and scaled images.

After Abnar, Dehghani, Zuidema 2020 (arXiv:2006.00555), section 5, who use MNIST and MNIST-C.
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample, pad

from distill.data.rows import Rows
from distill.data.task import Recipe, Task, seeded
from distill.networks import CNN
from distill.tasks.pvr import images_and_digits, split

CLASSES = tuple("0123456789")
BACKGROUND = -1.0
SCALE = 0.7
SHADES = " .:-=+*#%@"


def digits() -> Task:
    """Return the task of recognizing scikit-learn's 1,797 digits, 80 % of each for training, the others for tests.

    A row is `pixel_values` `[1, 8, 8]`, from −1 to 1, and its label. The test rows also come shifted, by 1 pixel along
    both axes, and scaled, to 0.7 of their size, in `tests`; see `shifted` and `scaled`.

    The digits are those of Alpaydin, Kaynak 1998 (UCI optical recognition of handwritten digits); the tests are those
    of Abnar, Dehghani, Zuidema 2020 (arXiv:2006.00555), section 5, on MNIST: `load("mnist")`.
    """
    images, labels = images_and_digits()
    train, test = split(labels)
    return digit_task("digits", (images[train], labels[train]), (images[test], labels[test]), pixels=1, steps=300)


def digit_task(
    name: str,
    train: tuple[Float[Tensor, "n side side"], Int[Tensor, " n"]],
    test: tuple[Float[Tensor, "m side side"], Int[Tensor, " m"]],
    *,
    pixels: int,
    steps: int,
) -> Task:
    """Return the task of recognizing digits, with tests on shifted and scaled images too.

    Args:
        name: the name of the task.
        train: images and digits.
        test: images and digits.
        pixels: the shift of the test images [pixel].
        steps: the number of steps in which its teacher is trained.
    """
    images, labels = test
    return Task(
        name=name,
        train=_rows(*train),
        test=_rows(images, labels),
        classes=CLASSES,
        network=network,
        recipe=Recipe(steps=steps, batch_size=64, lr=2e-3, warmup=0.1, weight_decay=0.01),
        description="Handwritten digits: which one does an image show, also where it is shifted or scaled?",
        show=_draw_text,
        tests={"shifted": _rows(shifted(images, pixels), labels), "scaled": _rows(scaled(images), labels)},
    )


def shifted(images: Float[Tensor, "n height width"], pixels: int, *, seed: int = 0) -> Float[Tensor, "n height width"]:
    """Return each image moved by so many pixels along both axes, to one of four corners, drawn by `seed`.

    Pixels that leave the image are lost, and background comes in. Mu, Gilmer 2019 (MNIST-C, arXiv:1906.02337):
    translate, of 1 to 5 pixels by severity.

    >>> shifted(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), 1, seed=3)
    tensor([[[ 4., -1.],
             [-1., -1.]]])
    """
    n, height, width = images.shape
    signs = torch.randint(2, (n, 2), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    framed = pad(images, (pixels,) * 4, value=BACKGROUND)
    down, across = (
        rearrange(torch.arange(size), "size -> 1 size") + pixels - rearrange(signs[:, axis] * pixels, "n -> n 1")
        for axis, size in ((0, height), (1, width))
    )
    each = rearrange(torch.arange(n), "n -> n 1 1")
    return framed[each, rearrange(down, "n height -> n height 1"), rearrange(across, "n width -> n 1 width")]


def scaled(images: Float[Tensor, "n height width"], size: float = SCALE) -> Float[Tensor, "n height width"]:
    """Return each image at `size` times its size about its center, by bilinear interpolation, on the background.

    Mu, Gilmer 2019 (MNIST-C, arXiv:1906.02337): scale, to 0.9, 0.8, 0.7, 0.6 or 0.5 by severity, 0.7 by default.

    >>> scaled(torch.ones(1, 4, 4), 0.5)
    tensor([[[-1., -1., -1., -1.],
             [-1.,  1.,  1., -1.],
             [-1.,  1.,  1., -1.],
             [-1., -1., -1., -1.]]])
    """
    theta = (torch.eye(2, 3) / size).expand(len(images), 2, 3)
    layers = rearrange(images - BACKGROUND, "n height width -> n 1 height width")  # outside is 0
    grid = affine_grid(theta, list(layers.shape), align_corners=False)
    drawn = grid_sample(layers, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return rearrange(drawn, "n 1 height width -> n height width") + BACKGROUND


def network(seed: int) -> nn.Module:
    """Return an untrained convolutional network."""
    return seeded(seed, CNN)


def _rows(images: Float[Tensor, "n side side"], labels: Int[Tensor, " n"]) -> Rows:
    return Rows({"pixel_values": rearrange(images, "n height width -> n 1 height width"), "labels": labels})


def _draw_text(row: dict[str, Tensor]) -> str:
    levels = ((row["pixel_values"][0] + 1) / 2 * (len(SHADES) - 1)).round().long()
    return "\n".join("".join(SHADES[level] for level in line) for line in levels.tolist())
