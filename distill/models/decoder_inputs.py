"""The inputs of a decoder that writes the labels: the labels shifted by one.

Models of transformers shift labels in their own `forward` if they get no `decoder_input_ids`. Here the same shift is
done before the call, so that the tokens of the decoder are a column of the batch.
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
# In the source of a forward: `shift_tokens_right(labels, self.config.pad_token_id, …)` or `self._shift_right(labels)`.
_FUNCTION = re.compile(r"(?<!\.)\b(shift_tokens_right)\(\s*labels,([\w\s.,]*)\)")
_METHOD = re.compile(r"self\.(_shift_right|shift_tokens_right|prepare_decoder_input_ids_from_labels)\(\s*labels\s*\)")
_OWN = "prepare_decoder_input_ids_from_labels"


def shifts_labels(model: nn.Module) -> bool:
    """Return whether a model is an encoder–decoder with a known way to make its decoder's tokens from labels."""
    kind: Any = type(model)
    return getattr(getattr(model, "config", None), "is_encoder_decoder", False) and _shift_of(kind) is not None


def decoder_inputs(model: nn.Module, labels: Int[Tensor, "batch token"]) -> dict[str, Tensor]:
    """Return the `decoder_input_ids` that a model makes from labels, and their mask if it makes one.

    Raises:
        DistillError: a configuration without a token for padding or for the start.
    """
    kind: Any = type(model)
    shift, config = _shift_of(kind), cast(Any, model.config)
    assert shift is not None
    try:
        made = {"decoder_input_ids": shift(model, labels.clone())}  # FSMT writes into its argument
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise DistillError(
            f"{type(model).__name__} cannot shift the labels for its decoder, as its configuration has pad_token_id="
            f"{_token(config, 'pad_token_id')} and decoder_start_token_id={_token(config, 'decoder_start_token_id')}; "
            "set both, e.g. model.config.decoder_start_token_id = tokenizer.bos_token_id, or give the data a column "
            "'decoder_input_ids'."
        ) from error
    model_type = getattr(config, "model_type", None)
    if model_type in ("encoder-decoder", "pix2struct"):  # these mask the padding of the shifted labels
        real = made["decoder_input_ids"].ne(config.pad_token_id)
        if model_type == "pix2struct":
            real[:, 0] = True
        made["decoder_attention_mask"] = real.to(labels.dtype)
    return made


@lru_cache(maxsize=256)
def _shift_of(kind: type) -> Shift | None:
    """Return the function by which models of a class shift labels: that of their forward, else their own method."""
    forward: Any = getattr(kind, "forward", None)
    if forward is None or "decoder_input_ids" not in inspect.signature(forward).parameters:
        return None
    try:
        source = inspect.getsource(inspect.unwrap(forward))
    except (OSError, TypeError):  # a class without source
        source = ""
    if (found := _FUNCTION.search(source)) is not None:
        function = inspect.unwrap(forward).__globals__[found[1]]
        paths = [path.strip().removeprefix("self.") for path in found[2].split(",") if path.strip()]
        return lambda model, labels: function(labels, *(attrgetter(path)(model) for path in paths))
    if (found := _METHOD.search(source)) is not None:
        name = found[1]
        return lambda model, labels: getattr(model, name)(labels)
    writes = hasattr(kind, _OWN) and hasattr(kind, "generate")  # classifiers inherit the method too
    return (lambda model, labels: getattr(model, _OWN)(labels)) if writes else None


def _token(config: Any, name: str) -> Any:
    return getattr(config, name, None)
