"""The accelerator of a training in half precision, and gradients with activations that are computed again."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from distill.errors import DistillError
from distill.models.inputs import innermost
from distill.processes import on_cpu
from distill.training.schedule import PRECISIONS

_OF_CHECKPOINTING = (
    "gradient_checkpointing", "_gradient_checkpointing_func", "_require_grads_hook", "_require_grads_hooks"
)  # fmt: skip
"""The attributes by which modules of transformers know that activations are computed again."""


@contextmanager
def accelerator_of(given: Accelerator | None, precision: str | None) -> Iterator[Accelerator]:
    """Yield the accelerator of a training: the given one, or one that computes in a precision.

    accelerate remembers the precision of the process by its first accelerator; that of before is back after the block.

    Args:
        given: that of the caller, if there is one.
        precision: as `Schedule` has it.

    Raises:
        DistillError: the given one has another precision, or this machine has none of it.
    """
    if precision is None or given is not None:
        if given is not None and precision is not None and given.mixed_precision != PRECISIONS[precision]:
            raise DistillError(
                f"Schedule(precision={precision!r}) and Accelerator(mixed_precision={given.mixed_precision!r}) differ; "
                f"say it once: Accelerator(mixed_precision={PRECISIONS[precision]!r})."
            )
        yield given or Accelerator(cpu=on_cpu())
        return
    shared: dict[str, Any] = AcceleratorState._shared_state
    before = dict(shared)
    shared.clear()
    try:
        try:
            made = Accelerator(cpu=on_cpu(), mixed_precision=PRECISIONS[precision])
        except ValueError as error:
            raise DistillError(
                f"precision={precision!r} cannot be computed here ({' '.join(str(error).split())}); use "
                "precision='bf16', or None."
            ) from error
        if precision == "fp16" and made.device.type == "cpu":
            raise DistillError(
                "precision='fp16' scales its gradients, which processors do not; use precision='bf16', or None."
            )
        yield made
    finally:
        shared.clear()
        shared.update(before)


@contextmanager
def computing_again(models: Iterable[nn.Module], *, wanted: bool) -> Iterator[None]:
    """Let models of transformers compute activations again in backward passes in the block, if that is wanted.

    Raises:
        DistillError: a model that cannot.
    """
    with ExitStack() as undo:
        for model in map(innermost, models if wanted else ()):
            if any(vars(each).get("gradient_checkpointing", False) for each in model.modules()):
                continue
            if not getattr(model, "supports_gradient_checkpointing", False):
                raise DistillError(
                    f"gradient_checkpointing=True is for models of transformers that support it, and "
                    f"{type(model).__name__} does not; leave it out, or compute a step in parts: accumulate=4."
                )
            undo.callback(_put_back, model, [(each, dict(_settings(each))) for each in model.modules()])
            _enable(model)
        yield


def _enable(model: Any) -> None:
    """Let a model of transformers compute activations again, which later versions call by another name."""
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def _settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of a module by which it computes activations again."""
    return ((name, vars(module)[name]) for name in _OF_CHECKPOINTING if name in vars(module))


def _put_back(model: Any, before: list[tuple[nn.Module, dict[str, Any]]]) -> None:
    """Let a model keep its activations again, and give its modules the attributes that they had."""
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()
    if not any("_require_grads_hooks" in settings for _, settings in before):
        model.disable_input_require_grads()  # which enabling put on, and disabling leaves
    for module, settings in before:
        for name in _OF_CHECKPOINTING:
            vars(module).pop(name, None)
        vars(module).update(settings)
