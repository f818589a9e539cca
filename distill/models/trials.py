"""Trial runs of a model on data: a failure becomes an error of one line with its cause, the value and the way out."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

import interventions
from distill.errors import DistillError
from distill.losses.chunked import LazyLogits
from distill.models.head import Heads, lazy_logits
from distill.models.inputs import DECODERS, NEVER, device_of, innermost, inputs_of, network_of, to_device, vocabulary_of
from distill.models.outputs import logits_if_any
from distill.models.pad_tokens import longest_input
from interventions import InterventionError, Run

_TRYING: ContextVar[bool] = ContextVar("trying", default=False)
LONGEST = 380  # of a line [characters]


@contextmanager
def tried(subject: str, model: Any = None, given: Any = None) -> Iterator[None]:
    """Translate any error inside a block into a DistillError of one line, with the error as its cause.

    Args:
        subject: the name of what is tried, e.g. "the teacher".
        model: the model that runs in the block, if it is one model.
        given: the inputs of the model, or the columns of the batch.

    Raises:
        DistillError: as above. The text of a DistillError or InterventionError stays.
    """
    before = _TRYING.set(True)
    try:
        yield
    except (DistillError, InterventionError) as error:
        if isinstance(error, DistillError) and "\n" not in str(error):
            raise
        raise DistillError(" ".join(str(error).split())) from error
    except Exception as error:
        raise DistillError(_describe(subject, model, given, error)) from error
    finally:
        _TRYING.reset(before)


def is_trial() -> bool:
    """Return whether a model runs for trial, inside a block of `tried`."""
    return _TRYING.get()


@contextmanager
def translated() -> Iterator[None]:
    """Translate an InterventionError inside a block into a DistillError of one line, with the error as its cause."""
    try:
        yield
    except InterventionError as error:
        raise DistillError(" ".join(str(error).split())) from error


def answer_of(
    name: str,
    model: Any,
    columns: Mapping[str, Tensor],
    run: Callable[..., Run] = interventions.run,
    *,
    needed: bool = True,
) -> Tensor | None:
    """Return the logits of a model on a batch.

    Args:
        name: the name of the model in errors, e.g. "the teacher".
        model: the model, in the mode that it is to be tried in.
        columns: the columns of the batch.
        run: the function that runs it.
        needed: whether it must have logits; if not, a model without logits gives None.

    Raises:
        DistillError: a model that has no logits, does not run on these columns, or gives no answer for each row.
    """

    def read(model: Any, given: Any) -> Tensor | None:
        ran = run(model, given, resumable=False)
        return ran.logits if needed else logits_if_any(ran)

    found = _tried_answer(name, model, columns, read)
    assert not isinstance(found, LazyLogits)
    return found


def lazy_answer_of(name: str, model: nn.Module, columns: Mapping[str, Tensor], heads: Heads) -> Tensor | LazyLogits:
    """Return what `answer_of` does; where the logits are large, to be made in parts.

    Args:
        name, model, columns: as for `answer_of`.
        heads: lets the run end before the head of the model.
    """

    def read(model: Any, given: Any) -> Tensor | LazyLogits:
        with heads.deferred([(model, given)]):
            ran = interventions.run(model, given, resumable=False)
            return lazy_logits(ran) or ran.logits

    found = _tried_answer(name, model, columns, read)
    assert found is not None
    return found


def _tried_answer(
    name: str, model: Any, columns: Mapping[str, Tensor], read: Callable[[Any, Any], Tensor | LazyLogits | None]
) -> Tensor | LazyLogits | None:
    """Return what a function reads of a model on a batch, after the checks of `answer_of`."""
    with tried(name):
        batch = to_device(columns, device_of(model))
        given = inputs_of(model, batch)
    # Inputs that are given by position get their names for the error.
    named = given if isinstance(given, Mapping) else {key: x for key, x in batch.items() if any(x is y for y in given)}
    with tried(name, model, named):
        logits = read(model, given)
    check_values(name, logits)
    check_rows(name, logits, len(next(iter(batch.values()))))
    return logits


def check_values(name: str, values: Any) -> None:
    """Raise DistillError for an answer on the device "meta", which has a shape and no values."""
    if isinstance(values, Tensor) and values.is_meta:
        raise DistillError(
            f"{name} lies on the meta device, so it gives shapes and no values; load its weights: "
            "model.to_empty(device='cpu') and model.load_state_dict(…)."
        )


def check_rows(name: str, answer: Any, rows: int) -> None:
    """Raise DistillError if a model does not give an answer for each row: it took the rows for something else."""
    if not isinstance(answer, Tensor | LazyLogits):
        return
    if answer.ndim < 2 or answer.shape[0] != rows:
        raise DistillError(
            f"{name} answers {list(answer.shape)} on {rows} rows, and [rows, classes] or [rows, token, classes] is "
            "needed; reshape it: answers=lambda output: output.reshape(rows, -1), or give the data an axis of "
            "channels: x[:, None]."
        )


def _describe(name: str, model: Any, given: Any, error: Exception) -> str:
    """Return an error as one line: what fails, on which inputs, why, and the way out."""
    named = _by_name(given)
    objective = _objective_of(error)
    subject = f"{objective} fails on {name}" if objective else f"{name} fails"
    if model is not None and not objective:
        subject = f"{name} ({type(network_of(model)).__name__}) fails"
    why = f"{type(error).__name__}: {_first_line(error)}"
    way_out = _way_out(model, named, error) or (
        "see the error above it; look at the batch of a step, e.g. distill.Rows.of(data).batch([0, 1])"
    )
    inputs = f" on {_show(named)}" if named else ""
    room = max(60, LONGEST - len(subject) - len(inputs) - len(way_out) - 6)
    return f"{subject}{inputs}: {_cut(why, room)}; {way_out}."


def _way_out(model: Any, given: Mapping[str, Tensor], error: Exception) -> str | None:
    """Return what to change, as code, if the cause is recognized."""
    labels = given.get("labels")
    if model is None:
        if labels is None or not isinstance(error, RuntimeError | ValueError | IndexError | TypeError):
            return None
        return _explain_labels(labels)
    network, given = innermost(model), {name: x for name, x in given.items() if name not in NEVER}
    checks = (
        _explain_tokens,
        _explain_positions,
        _explain_devices,
        _explain_dtypes,
        _explain_pictures,
        _explain_arguments,
        _explain_decoders,
    )
    return next((found for check in checks if (found := check(network, given, error)) is not None), None)


def _explain_tokens(network: nn.Module, given: Mapping[str, Tensor], error: Exception) -> str | None:
    size = vocabulary_of(network)
    if size is None:
        tables = [module.num_embeddings for module in network.modules() if isinstance(module, nn.Embedding)]
        size = tables[0] if tables else None
    for name, column in given.items():
        if size is None or not _is_whole(column) or not ("ids" in name or isinstance(error, IndexError)):
            continue
        if column.is_meta or name in ("attention_mask", "token_type_ids", "position_ids", "labels"):
            continue
        wrong = column[(column < 0) | (column >= size)]
        if len(wrong):
            return (
                f"{name!r} holds token {int(wrong[0])} and it knows 0 to {size - 1}; tokenize with its own tokenizer: "
                "AutoTokenizer.from_pretrained(…)"
            )
    return None


def _explain_positions(network: nn.Module, given: Mapping[str, Tensor], error: Exception) -> str | None:
    known = longest_input(network)
    widths = {name: column.shape[1] for name, column in given.items() if column.ndim == 2 and _is_whole(column)}
    if known is None or not widths:
        return None
    name, width = max(widths.items(), key=lambda item: item[1])
    if width <= known:
        return None
    return (
        f"{name!r} has {width} tokens and it has positions for {known}; cut them: tokenizer(texts, truncation=True, "
        f"max_length={known})"
    )


def _explain_devices(network: nn.Module, given: Mapping[str, Tensor], error: Exception) -> str | None:
    home = device_of(network)
    for name, column in given.items():
        if column.device != home:
            return f"{name!r} is on {column.device} and it on {home}; move it: data[{name!r}] = data[{name!r}].cpu()"
    devices = {parameter.device for parameter in network.parameters()}
    if len(devices) > 1:
        return f"its parameters are on {' and '.join(sorted(map(str, devices)))}; put it in one place: model.to('cpu')"
    return None


def _explain_dtypes(network: nn.Module, given: Mapping[str, Tensor], error: Exception) -> str | None:
    wanted = next((p.dtype for p in network.parameters() if p.is_floating_point()), None)
    reads_ids = any(isinstance(module, nn.Embedding) for module in network.modules())
    for name, column in given.items():
        if "mask" in name or wanted is None:
            continue
        way = f"data[{name!r}] = data[{name!r}]"
        floats = column.is_floating_point()
        if floats and column.dtype == torch.float32 and wanted in (torch.float16, torch.bfloat16):
            return f"{name!r} is {column.dtype} and its weights are {wanted}; give it single precision: model.float()"
        if floats and column.dtype != wanted:
            return f"{name!r} is {column.dtype} and its weights are {wanted}; {way}.to({wanted})"
        if not floats and column.dtype == torch.uint8 and (column.ndim > 2 or not reads_ids):
            return f"{name!r} is {column.dtype} and its weights are {wanted}; {way}.float() / 255"
        if not floats and not reads_ids:
            return f"{name!r} is {column.dtype} and its weights are {wanted}; {way}.to({wanted})"
        if floats and column.ndim == 2 and reads_ids and ("ids" in name or len(given) == 1):
            return f"{name!r} is {column.dtype} and token ids are whole numbers; {way}.long()"
    return None


def _explain_pictures(network: nn.Module, given: Mapping[str, Tensor], error: Exception) -> str | None:
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    name = next((name for name, x in given.items() if x.is_floating_point() and x.ndim in (3, 4)), None)
    if first is None or name is None:
        return None
    column, way = given[name], f"data[{name!r}] = data[{name!r}]"
    if column.ndim == 3:
        return f"{name!r} is [rows, height, width] and pictures have channels; {way}[:, None]"
    if column.shape[1] != first.in_channels and column.shape[-1] == first.in_channels:
        return f"{name!r} has its channels last and [rows, channels, height, width] is read; {way}.permute(0, 3, 1, 2)"
    if column.shape[1] != first.in_channels and column.shape[1] == 1:
        count = first.in_channels
        return f"{name!r} has 1 channel and it reads {count}; {way}.repeat(1, {count}, 1, 1)"
    return None


def _explain_arguments(network: nn.Module, given: Mapping[str, Tensor], error: Exception) -> str | None:
    missing = re.search(r"missing \d+ required \w+ arguments?: (.*)", str(error))
    if isinstance(error, TypeError) and missing is not None:
        names = re.findall(r"'(\w+)'", missing[1])
        return f"add a column for each argument without a default: data={{…, {names[0]!r}: …}}" if names else None
    parameters = signature(network.forward).parameters.values()
    needed = [p.name for p in parameters if p.default is Parameter.empty and p.kind is Parameter.POSITIONAL_OR_KEYWORD]
    lacking = [name for name in needed if name not in given]
    return f"add a column: data={{…, {lacking[0]!r}: …}}" if lacking and len(given) > 1 else None


def _explain_decoders(network: nn.Module, given: Mapping[str, Tensor], error: Exception) -> str | None:
    config = getattr(network, "config", None)
    if "<eos> token" in str(error):
        end = getattr(config, "eos_token_id", None)
        return f"it answers at the end token {end}, which each text must have; tokenize with it: tokenizer(texts)"
    if getattr(config, "is_encoder_decoder", False) and not DECODERS & given.keys():
        return (
            "this encoder–decoder has no inputs for its decoder; add what it writes, data={…, 'labels': …}, or "
            "what it reads, data={…, 'decoder_input_ids': …}"
        )
    return None


def _explain_labels(labels: Tensor) -> str:
    if labels.is_floating_point():
        return (
            f"the labels are {labels.dtype} {list(labels.shape)}; for classes give data['labels'].long(), for values "
            "a model of one output"
        )
    return f"the labels are {labels.dtype} {list(labels.shape)}; give a class a row, data['labels'] = […].long()"


def _is_whole(column: Tensor) -> bool:
    return not column.is_floating_point() and column.dtype != torch.bool


def _by_name(given: Any) -> dict[str, Tensor]:
    if isinstance(given, Mapping):
        return {name: column for name, column in given.items() if isinstance(column, Tensor)}
    columns: Sequence[Any] = given if isinstance(given, tuple | list) else (given,)
    return {f"input {number}": column for number, column in enumerate(columns) if isinstance(column, Tensor)}


def _show(named: Mapping[str, Tensor]) -> str:
    inputs = [f"{name} {list(x.shape)} {str(x.dtype).removeprefix('torch.')}" for name, x in named.items()]
    return _cut(", ".join(inputs), 120)


def _objective_of(error: BaseException) -> str | None:
    """Return the name of the objective in whose code an error was raised, if it was in one."""
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and hasattr(type(owner), "compares_runs"):
            return f"{type(owner).__name__}()"
        trace = trace.tb_next
    return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".;") if lines else "no message"


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1].rstrip()}…"
