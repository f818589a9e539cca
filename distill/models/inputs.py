"""The inputs of a model: which columns of a batch it is called with, and which of its tokens are real."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from inspect import Parameter
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from distill.errors import DistillError
from distill.models.decoder_inputs import decoder_inputs, shifts_labels
from distill.models.modes import in_eval_mode
from distill.models.pad_tokens import pad_token_named, padded_as_known
from distill.models.token_positions import parameters_of, placed, starts
from interventions import architecture, keep_on_host

NEVER = frozenset({"labels", "special_tokens_mask", "mlm_labels"})
MASKED = "mlm_labels"
"""The column with the tokens that were masked in this step, −100 elsewhere."""
DECODERS = frozenset({"decoder_input_ids", "decoder_inputs_embeds"})
"""The columns that a decoder reads; without them its tokens may be made from the labels."""
TEACHERS = "teacher_"
"""The prefix of columns for the teacher only, if it reads other inputs than the student."""


@runtime_checkable
class Chooses(Protocol):
    """A model that chooses the columns that it is called with, as a model of several networks must."""

    def columns_of(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the columns of a batch that it is called with, by name."""
        ...


@runtime_checkable
class Serves(Protocol):
    """A teacher that answers requests, wherever it runs: a `Served`."""

    @property
    def network(self) -> nn.Module:
        """The torch model that answers, without weights if they are on another machine."""
        ...


@runtime_checkable
class Combined(Protocol):
    """A model that computes its answer from the answers of other models, whose outputs it reads itself."""

    @property
    def combines(self) -> tuple[nn.Module, ...]:
        """The other models, in order."""
        ...


def network_of(model: Any) -> nn.Module:
    """Return the torch model: the model itself, or that of a model of nnsight or of a served teacher."""
    if isinstance(model, nn.Module):
        return model
    return model.network if isinstance(model, Serves) else architecture(model).model


def inputs_of(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor] | tuple[Tensor]:
    """Return what a model is called with: the columns of a batch that its `forward` names, except labels.

    An encoder–decoder with labels and without `decoder_input_ids` gets the labels shifted by one, as it shifts them
    itself.

    Raises:
        DistillError: no column fits.
    """
    inner = innermost(model)
    if hasattr(inner, "columns_of") and isinstance(inner, Chooses):  # which looks at every method of a model
        return inner.columns_of(batch)
    parameters = parameters_of(inner)
    named = {name: batch[name] for name in parameters if name in batch and name not in NEVER}
    if named and not DECODERS & named.keys() and writes_labels(model, batch):
        named = {**decoder_inputs(inner, batch["labels"]), **named}
    if named:
        return in_dtype_of(model, placed(inner, padded_as_known(inner, named), batch))
    rest = [name for name in batch if name not in NEVER]
    if len(rest) == 1 and any(
        p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.VAR_POSITIONAL) for p in parameters.values()
    ):
        return in_dtype_of(model, (batch[rest[0]],))
    raise DistillError(
        f"{type(model).__name__}.forward takes {', '.join(parameters)} and the data has {', '.join(batch)}; "
        "rename a column, e.g. data={'inputs': x, 'labels': y}."
    )


def in_dtype_of(model: Any, inputs: Any) -> Any:
    """Return inputs with floating-point tensors in the dtype of the model's weights."""
    dtype = next((p.dtype for p in network_of(model).parameters() if p.is_floating_point() and p.itemsize > 1), None)

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    if dtype is None:
        return inputs
    if isinstance(inputs, Mapping):
        return {name: cast(value) for name, value in inputs.items()}
    return tuple(map(cast, inputs)) if isinstance(inputs, tuple) else cast(inputs)


def real_tokens(
    batch: Mapping[str, Tensor], rows: int, width: int, device: torch.device, *, column: str = "attention_mask"
) -> Bool[Tensor, "rows width"]:
    """Return which of `width` positions of each example are no padding, by its mask; all if the batch has no mask.

    Raises:
        DistillError: a mask of another width.
    """
    mask = batch.get(column)
    if mask is None or (mask.shape != (rows, width) and bool(mask.bool().all())):
        return torch.ones(rows, width, dtype=torch.bool, device=device)
    if mask.shape != (rows, width):
        raise DistillError(
            f"{column} has shape {list(mask.shape)} and the mapped locations have {width} positions; map locations "
            "of the token "
            "axis, or leave the mask out."
        )
    return mask.bool().to(device)


def mask_of(inputs: object) -> Tensor | None:
    """Return the mask of the tokens that are no padding, `[batch, token]`; None if the inputs have none."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def answer_mask(model: Any, batch: Mapping[str, Tensor]) -> Tensor | None:
    """Return which positions of a model's answers are no padding, `[batch, token]`, in its decoder if it has one."""
    if "decoder_input_ids" in batch:
        return mask_of({"attention_mask": batch.get("decoder_attention_mask")})
    return batch["labels"] != -100 if writes_labels(model, batch) else mask_of(batch)


def decoder_masked(model: Any, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the batch with a mask of the decoder's tokens, if it writes the labels: those that are not −100."""
    if "decoder_attention_mask" in batch or not writes_labels(model, batch):
        return batch
    return {**batch, "decoder_attention_mask": (batch["labels"] != -100).long()}


def writes_labels(model: Any, batch: Mapping[str, Tensor]) -> bool:
    """Return whether a model is an encoder–decoder whose decoder writes the labels, `[batch, token]`."""
    labels = batch.get("labels")
    if DECODERS & batch.keys() or labels is None or labels.ndim != 2 or labels.is_floating_point():
        return False
    return shifts_labels(innermost(model))


def teachers(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the columns for the teacher: those named `teacher_…`, without the prefix, if it has its own inputs."""
    if not reads_apart(batch):
        return batch
    return {name.removeprefix(TEACHERS): column for name, column in batch.items() if name.startswith(TEACHERS)}


def reads_apart(columns: Iterable[str]) -> bool:
    """Return whether the teacher has its own inputs: a column `teacher_x` beside `x`."""
    names = set(columns)
    return any(name.startswith(TEACHERS) and name.removeprefix(TEACHERS) in names for name in names)


def students(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the columns for the student: all but the teacher's own."""
    return {name: column for name, column in batch.items() if not name.startswith(TEACHERS)}


def following(batch: Mapping[str, Tensor]) -> Tensor:
    """Return the token after each but the last, `[batch, token − 1]`, −100 for those that losses ignore.

    These are padding and the first token of the next document in a packed row.
    """
    tokens, mask = batch.get("labels", batch["input_ids"]), batch.get("attention_mask")
    if tokens.shape != batch["input_ids"].shape:
        tokens = batch["input_ids"]
    after = tokens[:, 1:]
    if "position_ids" in batch and batch["position_ids"].shape == tokens.shape:
        after = after.masked_fill(starts(batch)[:, 1:], -100)
    return after if mask is None else after.masked_fill(~(mask[:, 1:].bool() & mask[:, :-1].bool()), -100)


def vocabulary_of(model: Any) -> int | None:
    """Return the number of token ids of a model; None if it reads no tokens."""
    embeddings = getattr(network_of(model), "get_input_embeddings", lambda: None)
    try:
        table = embeddings()
    except NotImplementedError:
        return None
    return table.num_embeddings if isinstance(table, nn.Embedding) else None


def common_vocabulary(*models: Any) -> int | None:
    """Return the number of token ids that all of some models know; None if none of them reads tokens."""
    return min((size for each in models if (size := vocabulary_of(each)) is not None), default=None)


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return the batch on a device.

    Raises:
        DistillError: a column without values, on the device "meta".
    """
    empty = next((name for name, column in batch.items() if column.is_meta), None)
    if empty is not None and device.type != "meta":
        raise DistillError(
            f"the column {empty!r} is on the device 'meta', which holds no values, and the model on {str(device)!r}; "
            f"make it there: data[{empty!r}] = torch.randn({list(batch[empty].shape)}).to({str(device)!r})."
        )
    return {name: _moved(column, device) for name, column in batch.items()}


def _moved(column: Tensor, device: torch.device) -> Tensor:
    """Return a column on a device, with its copy on the host kept beside it; the move does not wait for the device."""
    is_pinned = device.type == "cuda" and column.is_cpu  # only from pinned memory it runs beside the computation
    moved = (column.pin_memory() if is_pinned else column).to(device, non_blocking=column.is_cpu)
    return keep_on_host(moved, column) if column.is_cpu and moved is not column else moved


def device_of(model: Any) -> torch.device:
    """Return the device of a model's first parameter; the CPU without parameters, or if it runs on another machine.

    A part whose weights accelerate keeps elsewhere until it runs is on the device where it then runs.
    """
    network = network_of(model)
    parameter = next(network.parameters(), None)
    if parameter is not None and parameter.is_meta and (runs_on := _execution_devices(network)):
        return runs_on[0]
    is_elsewhere = parameter is not None and parameter.is_meta and not isinstance(model, nn.Module)
    return torch.device("cpu") if parameter is None or is_elsewhere else parameter.device


def is_placed(model: Any) -> bool:
    """Return whether accelerate has placed the parts of a model (`device_map`, `cpu_offload`, …), and moves them."""
    return bool(_execution_devices(network_of(model)))


def _execution_devices(network: nn.Module) -> list[torch.device]:
    """Return the devices on which accelerate lets the parts of a model run, in order; an empty list without it."""
    hooks = [getattr(module, "_hf_hook", None) for module in network.modules()]
    single = [each for hook in hooks for each in getattr(hook, "hooks", (hook,))]
    devices = [getattr(each, "execution_device", None) for each in single]
    return [torch.device(each) for each in devices if each is not None]


def refuse_valueless(network: nn.Module, caller: str) -> None:
    """Raise DistillError for a network with a part on the device "meta", which holds no values."""
    tensors = (*network.named_parameters(), *network.named_buffers())
    empty = next((name for name, each in tensors if each.is_meta), None)
    if empty is not None:
        raise DistillError(
            f"{caller} needs the weights of this {type(network).__name__}, and {empty!r} is on the device 'meta', "
            "which holds no values; load them, or make them: model.to_empty(device='cpu')."
        )


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put a model in eval mode for a block, a classifier without a padding token with one; undo both after it."""
    with in_eval_mode(network_of(model)), pad_token_named(innermost(model)):
        yield


def uncompiled(model: Any) -> Any:
    """Return the model inside `torch.compile`, whose hooks fire; any other model is returned as it is."""
    inner = getattr(model, "_orig_mod", None) if isinstance(model, nn.Module) else None
    return inner if isinstance(inner, nn.Module) else model


@contextmanager
def compiled_in_place(*models: Any) -> Iterator[None]:
    """Let models made by `torch.compile(model)` run compiled in the block where the model inside of them is called.

    The hooks of that model fire, which those of `torch.compile(model)` never do, and run outside of compiled code.
    """
    compiled: list[nn.Module] = []
    try:
        for model in models:
            inner = uncompiled(model)
            if inner is not model and inner._compiled_call_impl is None and hasattr(model, "dynamo_ctx"):
                compiled.append(inner)
                inner._compiled_call_impl = model.dynamo_ctx(inner._call_impl)
        yield
    finally:
        for inner in compiled:
            vars(inner).pop("_compiled_call_impl", None)


def innermost(model: Any) -> nn.Module:
    """Return the model whose `forward` names its arguments, from inside adapters, compiled and parallel wrappers."""
    network: Any = uncompiled(network_of(model))
    if hasattr(network, "get_base_model"):
        return innermost(network.get_base_model())
    return innermost(network.module) if isinstance(getattr(network, "module", None), nn.Module) else network
