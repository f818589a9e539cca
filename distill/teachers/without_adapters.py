"""A student that is its teacher with adapters: the teacher is the same model while they are switched off.

Adapters of peft lie inside the model that they are made for, so a teacher's weights need not be loaded twice.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from distill.errors import DistillError
from distill.models.inputs import innermost, uncompiled
from distill.models.modes import in_eval_mode

_SWITCH = "_disable_adapters"
_OWN = ("base_layer", "original_module")
"""The names under which a layer with adapters holds what was there before."""


class WithoutAdapters(nn.Module):
    """A model whose adapters are switched off, in eval mode, while it is called; it shares all weights with it.

    Args:
        module: the model inside of which the adapters are.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    @property
    def config(self) -> Any:
        """The configuration of the model."""
        return self.module.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the model without its adapters."""
        with in_eval_mode(self.module), _switched_off(self.module):
            return self.module(*args, **kwargs)


def teacher_and_student(teacher: Any, student: Any) -> tuple[Any, Any]:
    """Return both without `torch.compile`; a teacher inside of which the student's adapters are, without them.

    Raises:
        DistillError: adapters that are merged into the weights, so that the teacher is not there any more.
    """
    teacher, student = uncompiled(teacher), uncompiled(student)
    networks = isinstance(teacher, nn.Module) and isinstance(student, nn.Module)
    if not networks or isinstance(teacher, WithoutAdapters):
        return teacher, student
    base = innermost(teacher)
    adapted = [each for each in base.modules() if hasattr(each, _SWITCH)]
    prompted = hasattr(student, "peft_config") and teacher is student
    if innermost(student) is not base or not (adapted or prompted):
        return teacher, student
    own = {id(each) for module in adapted for each in _adapters_in(module)}
    trained = next((name for name, each in base.named_parameters() if each.requires_grad and id(each) not in own), None)
    if trained is not None:
        raise DistillError(
            f"the student is its teacher with adapters, and trains {trained!r} too, which is the teacher's; freeze it: "
            "requires_grad_(False), LoraConfig(bias='none'), or give the student a base of its own: copy.deepcopy(…)."
        )
    if any(getattr(each, "merged", False) for each in adapted):
        raise DistillError(
            "the student's adapters are merged into the weights of its teacher; take them out: "
            "student.unmerge_adapter()."
        )
    return WithoutAdapters(base), student


def _adapters_in(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of the adapters in a layer, without those that were there before."""
    for name, parameter in module.named_parameters():
        if not set(_OWN) & set(name.split(".")):
            yield parameter


@contextmanager
def _switched_off(model: nn.Module) -> Iterator[None]:
    """Switch the adapters in a model off for a block; their gradients and flags stay as they are."""
    before = [(module, getattr(module, _SWITCH)) for module in model.modules() if hasattr(module, _SWITCH)]
    try:
        for module, _ in before:
            setattr(module, _SWITCH, True)
        yield
    finally:
        for module, was_off in before:
            setattr(module, _SWITCH, was_off)
