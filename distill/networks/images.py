"""Networks for images: a convolutional one, which shares its weights over positions, and one that is fully connected.

CNN: z = W mean over positions (block_L ∘ … ∘ block_1)(x), block = 3×3 convolution, batch norm, ReLU, 2×2 max pooling,
dropout. MLP: z = W (block_L ∘ … ∘ block_1)(x), block = linear layer, batch norm, ReLU, dropout.

Abnar, Dehghani, Zuidema 2020 (arXiv:2006.00555), section 5.
"""

from collections.abc import Sequence
from itertools import pairwise

from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from distill.errors import DistillError, checked
from distill.networks.sizes import check_images, check_sizes
from interventions import renamed


@renamed(colours="colors")
@checked
class CNN(nn.Module):
    """Blocks of 3×3 convolution, batch norm, ReLU, 2×2 max pooling and dropout; the mean over places; a linear layer.

    Images may be of any height and width from 2 to the power of the number of blocks on; `layer` i is block i.

    Abnar, Dehghani, Zuidema 2020 (arXiv:2006.00555), section 5, for the parts; the widths are this project's own.

    Args:
        channels: the width of each block.
        classes: the number of classes.
        dropout: the share of the activations that is dropped.
        colors: the channels of the images.

    Raises:
        DistillError: images that are too small for that many poolings, or of another number of channels.
    """

    def __init__(
        self, channels: Sequence[int] = (32, 64, 64), classes: int = 10, *, dropout: float = 0.1, colors: int = 1
    ) -> None:
        super().__init__()
        check_sizes("CNN", dropout, classes=classes, colors=colors)
        widths = _check_widths([colors, *channels], "channels=(32, 64, 64)")
        self.colors = colors
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(wide, next_wide, 3, padding=1),
                nn.BatchNorm2d(next_wide),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Dropout(dropout),
            )
            for wide, next_wide in pairwise(widths)
        )
        self.classifier = nn.Linear(widths[-1], classes)

    @checked
    def forward(self, pixel_values: Float[Tensor, "batch colors height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits."""
        check_images(pixel_values, self.classifier.weight)
        colors = self.colors
        if pixel_values.shape[1] != colors:
            raise DistillError(
                f"images {list(pixel_values.shape)} have {pixel_values.shape[1]} colors and this CNN takes {colors}; "
                f"make it CNN(colors={pixel_values.shape[1]})."
            )
        if min(pixel_values.shape[2:]) < 2 ** len(self.blocks):
            raise DistillError(
                f"images of {pixel_values.shape[2]} × {pixel_values.shape[3]} pixels are too small for a CNN of "
                f"{len(self.blocks)} blocks, each of which halves them; use fewer: channels=(32, 64)."
            )
        maps = pixel_values
        for block in self.blocks:
            maps = block(maps)
        return self.classifier(reduce(maps, "batch channels height width -> batch channels", "mean"))


@checked
class MLP(nn.Module):
    """Blocks of linear layer, batch norm, ReLU and dropout on the flat image; a linear layer.

    Abnar, Dehghani, Zuidema 2020 (arXiv:2006.00555), section 5: 784-512-128-32-10 for MNIST. `layer` i is block i.

    Args:
        inputs: the number of pixels of an image, 64 for 8×8.
        hidden: the width of each block.
        classes: the number of classes.
        dropout: the share of the activations that is dropped.

    Raises:
        DistillError: images of another number of pixels.
    """

    def __init__(
        self, inputs: int = 784, hidden: Sequence[int] = (512, 128, 32), classes: int = 10, *, dropout: float = 0.1
    ) -> None:
        super().__init__()
        check_sizes("MLP", dropout, classes=classes, inputs=inputs)
        widths = _check_widths([inputs, *hidden], "hidden=(512, 128, 32)")
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(wide, next_wide), nn.BatchNorm1d(next_wide), nn.ReLU(), nn.Dropout(dropout))
            for wide, next_wide in pairwise(widths)
        )
        self.inputs = inputs
        self.classifier = nn.Linear(widths[-1], classes)

    @checked
    def forward(self, pixel_values: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """Return the logits."""
        check_images(pixel_values, self.classifier.weight)
        flat = rearrange(pixel_values, "batch ... -> batch (...)")
        if flat.shape[1] != self.inputs:
            raise DistillError(
                f"images of {list(pixel_values.shape[1:])} have {flat.shape[1]} pixels and this MLP takes "
                f"{self.inputs}; make it MLP(inputs={flat.shape[1]})."
            )
        for block in self.blocks:
            flat = block(flat)
        return self.classifier(flat)


def _check_widths(widths: list[int], example: str) -> list[int]:
    """Return the widths of the input and of all blocks, or raise DistillError if they make no network."""
    if len(widths) < 2 or min(widths) < 1:
        raise DistillError(f"widths {widths[1:]} after {widths[0]} inputs make no network; use e.g. {example}.")
    return widths
