"""Pointer-value retrieval as a causal model: the first of four digits chooses which other one is the answer.

    answer = digit of the tile that `pointer` chooses: 0–3 top right, 4–6 bottom left, 7–9 bottom right

Zhang, Raghu, Kleinberg, Bengio 2021 (arXiv:2107.12580); Geiger et al. 2021 (arXiv:2112.00826).
"""

from functools import cache
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from distill.causal.model import CausalModel
from distill.errors import DistillError, checked
from distill.tasks.pvr import ANSWER_TILE, images_and_digits, split

TILES = ("pointer", "top_right", "bottom_left", "bottom_right")


@checked
def pointer_values(
    images: Float[Tensor, "images height width"] | None = None,
    digits: Int[Tensor, " labels"] | None = None,
    *,
    part: Literal["train", "test"] | None = "train",
) -> CausalModel:
    """Return the causal model of four images of digits, of which `pointer` (top left) chooses the answer.

    The inputs are the numbers of the images, so that an input decides all pixels of its tile: test examples hold out
    images rather than digits. The digit of each tile and the answer are computed. A network is fed `pixel_values`,
    `[batch, 1, 2 · height, 2 · width]`.

    Args:
        images: scikit-learn's 8x8 digits by default, as in the task `pvr`.
        digits: the digits that the images show, 0 to 9.
        part: `"train"` draws from 80 % of the images of each digit, `"test"` from the others; always the same ones.
            None draws from all of them, for images that are split already: `pointer_values(*mnist(folder, "test"),
            part=None)`.

    Zhang, Raghu, Kleinberg, Bengio 2021 (arXiv:2107.12580); Geiger et al. 2021 (arXiv:2112.00826).

    Raises:
        DistillError: images without digits, or another number of them.
    """
    if images is None and digits is None:
        images, digits = images_and_digits()
    if images is None or digits is None or len(images) != len(digits):
        found = [None if each is None else len(each) for each in (images, digits)]
        raise DistillError(
            f"pointer_values was given {found[0]} images and {found[1]} digits; give one digit an image."
        )
    chosen = torch.arange(len(digits)) if part is None else split(digits)[("train", "test").index(part)]
    images_on, digits_on, tile_on = cache(images.to), cache(digits.to), cache(torch.tensor(ANSWER_TILE).to)

    def digit(image: Tensor) -> Tensor:
        return digits_on(image.device)[image]

    def answer(pointer: Tensor, top_right: Tensor, bottom_left: Tensor, bottom_right: Tensor) -> Tensor:
        tiles = torch.stack([pointer, top_right, bottom_left, bottom_right], 1)
        return tiles.gather(1, tile_on(pointer.device)[pointer][:, None])[:, 0]

    def encode(values: dict[str, Tensor]) -> dict[str, Tensor]:
        tiles = torch.stack([images_on(image.device)[image] for image in values.values()], 1)
        pattern = "batch (down across) height width -> batch 1 (down height) (across width)"
        return {"pixel_values": rearrange(tiles, pattern, down=2)}

    return CausalModel(
        inputs={f"{tile}_image": chosen for tile in TILES},
        mechanisms={
            "pointer": lambda pointer_image: digit(pointer_image),
            "top_right": lambda top_right_image: digit(top_right_image),
            "bottom_left": lambda bottom_left_image: digit(bottom_left_image),
            "bottom_right": lambda bottom_right_image: digit(bottom_right_image),
            "answer": answer,
        },
        output="answer",
        encode=encode,
        domains=dict.fromkeys((*TILES, "answer"), range(10)),
    )
