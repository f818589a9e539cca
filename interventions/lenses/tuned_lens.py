"""Tuned lens: for each layer an affine translator of its state, trained so that the lens answers as the model does.

lensₗ = head(norm(hₗ + Aₗ hₗ + bₗ)), with A and b that minimize KL(model ‖ lensₗ) over the tokens of the data (Belrose
et al. 2023, arXiv:2303.08112, section 3). A and b begin at 0, where it is the logit lens.
"""

from collections.abc import Sequence
from pathlib import Path

import safetensors
import safetensors.torch
from jaxtyping import Float
from torch import Tensor, nn

from interventions.arguments import checked
from interventions.errors import InterventionError
from interventions.execution.run import Run
from interventions.locations import Location
from interventions.models.architectures import architecture
from interventions.precision import at_least_single


@checked
class TunedLens(nn.Module):
    """The translators of a tuned lens, one for each layer but the last; `fit_lens` trains them.

    Belrose et al. 2023 (arXiv:2303.08112), section 3.

    Args:
        layers: the locations whose states are translated, and the last one, in order, as texts.
        width: the width of the states.

    >>> import torch
    >>> lens = TunedLens(["block_input.0", "block_output.0"], 4)
    >>> torch.equal(lens(torch.ones(1, 4), 0), torch.ones(1, 4))  # it begins as the logit lens
    True
    """

    def __init__(self, layers: Sequence[str], width: int) -> None:
        super().__init__()
        self.layers, self.width = list(layers), width
        self.translators = nn.ModuleList()
        for _ in self.layers[:-1]:
            translator = nn.utils.skip_init(nn.Linear, width, width)
            for parameter in translator.parameters():
                nn.init.zeros_(parameter)
            self.translators.append(translator)

    def forward(self, state: Float[Tensor, "... width"], layer: int) -> Float[Tensor, "... width"]:
        """Return the translated state of a layer, in the dtype of the state; that of the last stays as it is."""
        if layer == len(self.translators):
            return state
        translator = self.translators[layer]
        return state + translator(state.to(next(translator.parameters()).dtype)).to(state.dtype)

    def check_fits(self, layers: tuple[Location, ...], done: Run) -> None:
        """Raise InterventionError for a model of other layers, or of another width."""
        width = done.activations[layers[0]].shape[-1]
        if list(map(str, layers)) != self.layers or width != self.width:
            raise InterventionError(
                f"the lens is of {len(self.layers)} layers, {self.layers[0]} to {self.layers[-1]}, of width "
                f"{self.width}, and this model has {len(layers)}, {layers[0]} to {layers[-1]}, of width {width}; fit "
                "one to it: fit_lens(model, batches)."
            )

    @checked
    def save(self, file: str | Path) -> Path:
        """Write the translators to a new file of safetensors, and return its path.

        Args:
            file: the file to create; its folder is created too.

        Raises:
            InterventionError: the file exists.
        """
        path = Path(file)
        if path.exists():
            raise InterventionError(f"{path} exists already; choose another file: lens.save('lens-2.safetensors').")
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        safetensors.torch.save_file(tensors, path, metadata={"layers": " ".join(self.layers), "width": str(self.width)})
        return path

    @classmethod
    @checked
    def load(cls, file: str | Path) -> "TunedLens":
        """Return the lens that `save` wrote.

        Args:
            file: the file.

        Raises:
            InterventionError: there is no such file, or it holds no lens.
        """
        try:
            with safetensors.safe_open(file, "pt") as opened:
                about = opened.metadata() or {}
            lens = cls(about["layers"].split(" "), int(about["width"]))
            lens.load_state_dict(safetensors.torch.load_file(file))
        except (OSError, KeyError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
            raise InterventionError(
                f"{file} holds no tuned lens ({type(error).__name__}); write one: fit_lens(model, batches).save(…)."
            ) from error
        return lens

    def extra_repr(self) -> str:
        return f"{self.layers[0]} to {self.layers[-1]}, width={self.width}"


def states_of(model: nn.Module, stack: str | None) -> tuple[Location, ...]:
    """Return the locations of the states before the first block and after each of them.

    Raises:
        InterventionError: a model without blocks, or without that stack.
    """
    count = len(architecture(model).stack_of(Location(0, stack=stack)).blocks)
    return (Location(0, "block_input", stack=stack), *(Location(layer, stack=stack) for layer in range(count)))


def check_one_width(layers: tuple[Location, ...], done: Run) -> None:
    """Raise InterventionError for a model whose blocks return states of different shapes."""
    shapes = {tuple(done.activations[layer].shape) for layer in layers}
    if len(shapes) > 1:
        raise InterventionError(
            f"the blocks of this model return states of {len(shapes)} shapes, such as {sorted(shapes)[:2]}, so none "
            "can stand for that of the last; a lens is of models whose blocks have one width: see describe(model)."
        )


def new_lens(layers: tuple[Location, ...], done: Run) -> TunedLens:
    """Return the lens that is the logit lens, for the states of a run, on their device, in single precision or more."""
    state = done.activations[layers[-1]]
    return TunedLens(list(map(str, layers)), state.shape[-1]).to(state.device, at_least_single(state.dtype))
