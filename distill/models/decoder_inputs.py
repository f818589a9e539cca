"""What the decoder of an encoder–decoder reads while it writes the labels: the labels shifted by one.

Models of transformers shift them in their own `forward` where they are given labels alone. Here it is done the same way
before the call, so that every place of the decoder has its tokens by name.
"""

import inspect
import re
from collections.abc import Callable
from functools import lru_cache
from operator import attrgetter
from typing import Any, cast

from jaxtyping import Int
from torch import Tensor, nn

from distill.errors import DistillError

Shift = Callable[[Any, Tensor], Tensor]
# In a forward: `shift_tokens_right(labels, self.config.pad_token_id, …)` or `self._shift_right(labels)`.
_FUNCTION = re.compile(r"(?<!\.)\b(shift_tokens_right)\(\s*labels,([\w\s.,]*)\)")
_METHOD = re.compile(r"self\.(_shift_right|shift_tokens_right|prepare_decoder_input_ids_from_labels)\(\s*labels\s*\)")
_OWN = "prepare_decoder_input_ids_from_labels"


def shifts_labels(model: nn.Module) -> bool:
    """Whether a model is an encoder–decoder that says how its decoder's tokens are made of labels."""
    kind: Any = type(model)
    return getattr(getattr(model, "config", None), "is_encoder_decoder", False) and _shift_of(kind) is not None


def decoder_inputs(model: nn.Module, labels: Int[Tensor, "batch token"]) -> dict[str, Tensor]:
    """The `decoder_input_ids` that `model` makes of labels itself, and the mask of them where it makes that too.

    Raises:
        DistillError: its configuration names no token for padding, or to start with.
    """
    kind: Any = type(model)
    shift, config = _shift_of(kind), cast(Any, model.config)
    assert shift is not None
    try:
        made = {"decoder_input_ids": shift(model, labels.clone())}  # FSMT's writes into what it is given
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise DistillError(
            f"{type(model).__name__} cannot shift the labels for its decoder, as its configuration has pad_token_id="
            f"{_token(config, 'pad_token_id')} and decoder_start_token_id={_token(config, 'decoder_start_token_id')}; "
            "set both, e.g. model.config.decoder_start_token_id = tokenizer.bos_token_id, or give the data a column "
            "'decoder_input_ids'."
        ) from error
    model_type = getattr(config, "model_type", None)
    if model_type in ("encoder-decoder", "pix2struct"):  # these hide the padding of what they shifted
        real = made["decoder_input_ids"].ne(config.pad_token_id)
        if model_type == "pix2struct":
            real[:, 0] = True
        made["decoder_attention_mask"] = real.to(labels.dtype)
    return made


@lru_cache(maxsize=256)
def _shift_of(kind: type) -> Shift | None:
    """How models of a class shift labels: as their forward does, else by their own method for that."""
    forward: Any = getattr(kind, "forward", None)
    if forward is None or "decoder_input_ids" not in inspect.signature(forward).parameters:
        return None
    try:
        source = inspect.getsource(inspect.unwrap(forward))
    except (OSError, TypeError):  # defined where no source is kept
        source = ""
    if (found := _FUNCTION.search(source)) is not None:
        function = inspect.unwrap(forward).__globals__[found[1]]
        paths = [path.strip().removeprefix("self.") for path in found[2].split(",") if path.strip()]
        return lambda model, labels: function(labels, *(attrgetter(path)(model) for path in paths))
    if (found := _METHOD.search(source)) is not None:
        name = found[1]
        return lambda model, labels: getattr(model, name)(labels)
    writes = hasattr(kind, _OWN) and hasattr(kind, "generate")  # classifiers inherit it as well
    return (lambda model, labels: getattr(model, _OWN)(labels)) if writes else None


def _token(config: Any, name: str) -> Any:
    return getattr(config, name, None)
