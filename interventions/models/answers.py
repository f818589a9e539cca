"""Find the logits in the output of a model, by rule or as the user states it (`answers=`).

>>> import torch
>>> logits_of((torch.zeros(2, 3), None)).shape  # as nanoGPT: (logits, loss)
torch.Size([2, 3])
>>> logits_of({"mean": torch.zeros(2, 3), "scale": torch.ones(2, 3)}, "mean").shape
torch.Size([2, 3])
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from interventions.arguments import checked, is_whole
from interventions.endings import setting
from interventions.errors import InterventionError
from interventions.names import shown

Answers = str | int | Callable[[Any], Tensor]
"""How the logits are found in an output: name or index of a part, or a function from the output to a tensor."""


class UnknownAnswer(InterventionError):
    """The error for an output in which several parts, or none, may be the logits."""


_NO_ANSWERS = ("hidden", "embedding", "pooler", "features")  # in names of the outputs of models without a head

_rules: ContextVar[Mapping[nn.Module, Answers] | None] = ContextVar("_rules", default=None)


@checked
@contextmanager
def answering(model: nn.Module, answers: Any) -> Iterator[None]:
    """Take the part `answers` of every output of `model` for its logits, inside the block and in this thread.

    None changes nothing.

    Raises:
        InterventionError: `answers` is no name, number or function.

    >>> import torch
    >>> from interventions import run
    >>> net = nn.LSTM(2, 3)
    >>> with answering(net, lambda output: output[0]):
    ...     run(net, torch.zeros(4, 2)).logits.shape
    torch.Size([4, 3])
    """
    if answers is None:
        yield
        return
    with setting(_rules, {**(_rules.get() or {}), model: rule_in(answers)}):
        yield


def rule_of(model: object) -> Answers | None:
    """Return how `answering` finds the logits of a model; None outside of such a block."""
    return (_rules.get() or {}).get(model) if isinstance(model, nn.Module) else None


def rule_in(answers: object) -> Any:
    """Return `answers` itself, if it is a name, an index or a function.

    Raises:
        InterventionError: it is no name, number or function.
    """
    if not (is_whole(answers) or isinstance(answers, str) or callable(answers)):
        raise InterventionError(
            f"answers={_short(answers)} does not say what of an output is the answer; give a name, an index or a "
            "function: answers='logits', answers=0 or answers=lambda output: output[0]."
        )
    return answers


def logits_of(output: object, answers: Any = None) -> Tensor:
    """Return the logits in the output of a model.

    A tensor is the logits themselves. In a mapping, a dataclass or a named tuple they are the part `logits`, else the
    only part that is neither scalar nor None, as in (logits, loss).

    Args:
        output: what a model returned.
        answers: the name of the part, its index, or a function of the output; None follows the rule above.

    Raises:
        InterventionError: there is no such part, or (UnknownAnswer) the rule finds none or several.
    """
    if answers is not None:
        return _take_part(output, rule_in(answers))
    if isinstance(output, Tensor):
        return output
    parts = dict(_parts(output))
    logits = parts.get("logits", getattr(output, "logits", None))
    if isinstance(logits, Tensor):
        return logits
    tensors = {name: part for name, part in parts.items() if part is not None and not _is_scalar(part)}
    if len(tensors) == 1:
        ((name, part),) = tensors.items()
        if isinstance(part, Tensor) and not any(word in str(name) for word in _NO_ANSWERS):
            return part
    raise UnknownAnswer(f"which part of a {_describe(output)} is the answer is not known; {_suggest(parts)}.")


@checked
def unanswered(logits: Float[Tensor, "*batch classes"]) -> Bool[Tensor, "*batch"]:
    """Return which rows of logits hold no answer: NaN or +∞ in one class, or −∞ in all of them.

    −∞ in some classes alone masks these out.

    >>> import torch
    >>> unanswered(torch.tensor([[0.0, 1.0], [0.0, -torch.inf], [0.0, torch.nan]])).tolist()
    [False, False, True]
    """
    if logits.layout != torch.strided:
        raise InterventionError(f"{shown(logits)} ({logits.layout}) holds no logits that can be looked at; densify it.")
    return logits.isnan().any(-1) | logits.isposinf().any(-1) | logits.isneginf().all(-1)


def _take_part(output: Any, answers: Answers) -> Tensor:
    """Return the part of an output that `answers` names or computes."""
    found: Any = None
    if isinstance(answers, str | int):
        parts = dict(_parts(output))
        if isinstance(answers, int) and (not isinstance(output, Mapping) or hasattr(output, "to_tuple")):
            kept = (part for part in parts.values() if part is not None or not hasattr(output, "to_tuple"))
            parts = dict(enumerate(kept))
            answers = answers + len(parts) if answers < 0 else answers
        if isinstance(output, Tensor):
            raise InterventionError(
                f"answers={answers!r} asks for a part of an output that is a {_describe(output)}, the answer itself; "
                "leave it out, for one model of several by None: answers=(0, None)."
            )
        found = parts.get(answers, getattr(output, answers, None) if isinstance(answers, str) else None)
        if found is None:
            raise InterventionError(
                f"answers={answers!r} names no part of a {_describe(output)}; {_suggest(dict(_parts(output)))}."
            )
    else:
        try:
            found = answers(output)
        except Exception as error:
            raise InterventionError(
                f"answers, a function, fails on a {_describe(output)}: {type(error).__name__}: "
                f"{str(error).strip().splitlines()[0] if str(error).strip() else ''}; give one from this output to a "
                "tensor: answers=lambda output: output[0]."
            ) from error
    if not isinstance(found, Tensor):
        raise InterventionError(
            f"answers={_short(answers)} gives {_kind(found)} of a {_describe(output)}, which is no tensor; "
            f"{_suggest(dict(_parts(output)))}."
        )
    return found


def _parts(output: Any) -> Iterator[tuple[str | int, Any]]:
    """Yield the parts of an output with their names, or with their indices where they have none."""
    if isinstance(output, Mapping):
        yield from output.items()
    elif is_dataclass(output) and not isinstance(output, type):
        yield from ((each.name, getattr(output, each.name)) for each in fields(output))
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        yield from zip(output._fields, output, strict=True)
    elif isinstance(output, tuple | list):
        yield from enumerate(output)


def _is_scalar(part: object) -> bool:
    return isinstance(part, bool | int | float) or (isinstance(part, Tensor) and not part.ndim)


def _suggest(parts: Mapping[str | int, Any]) -> str:
    """Return the advice of an error text: how to name a part, by the example of the first tensor."""
    name = next((name for name, part in parts.items() if isinstance(part, Tensor) and part.ndim), None)
    example = "lambda output: …" if name is None else repr(name)
    more = "" if name is None else ", or a function: answers=lambda output: …"
    return f"say which: answers={example}{more}"


def _describe(output: object) -> str:
    """Return the type and the parts of an output in few words."""
    name = type(output).__name__
    if isinstance(output, Tensor):
        return f"{name} {list(output.shape)}"
    parts = [f"{key}: {_kind(part)}" for key, part in _parts(output) if part is not None]
    listed = ", ".join(parts[:6]) + (", …" if len(parts) > 6 else "")
    return f"{name} ({listed})"[:200] if parts else f"{name}"


def _kind(part: object) -> str:
    return str(list(part.shape)) if isinstance(part, Tensor) else type(part).__name__


def _short(value: object) -> str:
    return repr(value)[:60].replace("\n", " ")
