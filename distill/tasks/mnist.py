"""MNIST, the handwritten digits, from a folder or from the Hugging Face hub."""

from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.data.task import Task
from distill.errors import DistillError, checked
from distill.tasks.digits import digit_task

FILE = "mnist.npz"


@checked
def mnist(
    folder: str | Path | None = None, split: Literal["train", "test"] = "train"
) -> tuple[Float[Tensor, "images 28 28"], Int[Tensor, " images"]]:
    """Return the images of MNIST, from −1 to 1, and the digits they show: 60,000 for training, 10,000 for tests.

    Args:
        folder: holds mnist.npz, with x_train, y_train, x_test and y_test of uint8; None is the Hugging Face hub.
        split: `"train"` or `"test"`, as they were published.

    LeCun, Bottou, Bengio, Haffner 1998 (doi:10.1109/5.726791).

    Raises:
        DistillError: a folder or a hub that does not give the data.
    """
    images, digits = _hub(split) if folder is None else _file(Path(folder), split)
    if images.dtype != np.uint8 or images.shape != (len(digits), 28, 28) or digits.ndim != 1:
        raise DistillError(
            f"MNIST's {split} split holds {images.dtype} {list(images.shape)} for {list(digits.shape)} digits; give "
            f"a {FILE} of uint8 images [n, 28, 28] and digits [n]."
        )
    return torch.tensor(images).float() / 127.5 - 1, torch.tensor(digits, dtype=torch.int64)


@checked
def mnist_digits(folder: str | Path | None = None) -> Task:
    """Return the task of recognizing the digits of MNIST, 60,000 rows for training and 10,000 for tests.

    A row is `pixel_values` `[1, 28, 28]`, from −1 to 1, and its label. The test rows also come shifted, by 3 pixels
    along both axes, and scaled, to 0.7 of their size, in `tests`: translate and scale at severity 3 in MNIST-C;
    see `shifted` and `scaled` in `distill.tasks.digits`.

    LeCun, Bottou, Bengio, Haffner 1998 (doi:10.1109/5.726791); Mu, Gilmer 2019 (MNIST-C, arXiv:1906.02337).

    Args:
        folder: as for `mnist`.

    Raises:
        DistillError: a folder or a hub that does not give the data.
    """
    return digit_task("mnist", mnist(folder, "train"), mnist(folder, "test"), pixels=3, steps=1000)


def _file(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    path, names = folder / FILE, (f"x_{split}", f"y_{split}")
    if not path.is_file():
        raise DistillError(f"{folder} has no {FILE}; give a folder that holds it, as mnist('data/mnist').")
    try:
        with np.load(path) as arrays:
            return arrays[names[0]], arrays[names[1]]
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise DistillError(
            f"{path} does not give {' and '.join(names)}: {type(error).__name__}; give a folder with a {FILE} of "
            "x_train, y_train, x_test, y_test, as mnist('data/mnist')."
        ) from error


def _hub(split: str) -> tuple[np.ndarray, np.ndarray]:
    import datasets

    # Offline, down, or blocked: the hub's client raises errors of a dozen unrelated types, and the way out is the same.
    try:
        loaded: Any = datasets.load_dataset("ylecun/mnist", split=split)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise DistillError(
            f"MNIST cannot be loaded from the Hugging Face hub: {type(error).__name__}: {reason}; pass a folder with "
            f"{FILE}, as mnist('data/mnist')."
        ) from error
    rows = loaded.with_format("numpy")[:]
    return np.asarray(rows["image"]), np.asarray(rows["label"])
