"""A student that is its teacher with adapters: the teacher is the same model while they are switched off.

Adapters of peft lie inside the model that they are made for, so a teacher's weights need not be loaded twice. A verb
that takes several models calls `apart` or `teacher_and_student` with them before it uses them, as the base that is
given for the teacher would else answer with the adapters of the student.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from distill.errors import DistillError
from distill.models.inputs import innermost, uncompiled
from distill.models.modes import in_eval_mode

_SWITCH = "_disable_adapters"
_OWN = ("base_layer", "original_module")
"""The names under which a layer with adapters holds what was there before."""
_COPY = "give one of them a base of its own: copy.deepcopy(base), before adapters are added"


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

    def own_state(self) -> dict[str, Tensor]:
        """Return the weights and buffers of the model, without those of its adapters."""
        layers = [each for each in self.module.modules() if hasattr(each, _SWITCH)]
        adapters = {id(each) for layer in layers for each in _adapters_in(layer)}
        state = self.module.state_dict(keep_vars=True)
        return {name: value for name, value in state.items() if isinstance(value, Tensor) and id(value) not in adapters}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the model without its adapters."""
        with in_eval_mode(self.module), self.switched():
            return self.module(*args, **kwargs)

    @contextmanager
    def switched(self) -> Iterator[None]:
        """Switch the adapters off for a block; their gradients and flags stay as they are."""
        before = [(module, getattr(module, _SWITCH)) for module in _adapted(self.module)]
        try:
            for module, _ in before:
                setattr(module, _SWITCH, True)
            yield
        finally:
            for module, was_off in before:
                setattr(module, _SWITCH, was_off)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the weights of the model by name, without those of adapters: which teacher it is does not change."""
        own = {id(each) for module in _adapted(self.module) for each in _adapters_in(module)}
        names = {name for name, each in self.named_parameters(remove_duplicate=False) if id(each) in own}
        return {name: each for name, each in super().state_dict(*args, **kwargs).items() if name not in names}

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of the model."""
        return self.module.get_input_embeddings()  # type: ignore[operator]

    def get_output_embeddings(self) -> nn.Module:
        """Return the head of the model, which may be called by itself where no adapters are in it."""
        head = self.module.get_output_embeddings()  # type: ignore[operator]
        if head is None or _adapted(head):
            raise NotImplementedError("adapters in the head are switched off only while the model is called")
        return head


def teacher_and_student(teacher: Any, student: Any) -> tuple[Any, Any]:
    """Return both without `torch.compile`; a teacher inside of which the student's adapters are, without them.

    Raises:
        DistillError: as `apart`; the student is the base of the teacher's adapters.
    """
    found, learner = apart([teacher, student], ("the teacher", "the student"))
    if isinstance(learner, WithoutAdapters) and not isinstance(uncompiled(student), WithoutAdapters):
        raise DistillError(
            "the student is the base of the teacher's adapters, so that what one learns the other does too; "
            f"give the adapted model as student, or {_COPY}."
        )
    return found, learner


def apart(models: Sequence[Any], names: Sequence[str] | None = None) -> list[Any]:
    """Return models without `torch.compile`; one inside of which the adapters of another are, without them.

    Where the first is also another one of them, and has adapters, it is the teacher, which has none.

    Args:
        models: networks; what is none is returned as it is.
        names: of the models, for errors.

    Raises:
        DistillError: models with adapters of each other that no switch distinguishes; adapters that are merged into the
            weights, so that the base is not there any more; weights of the base that are trained.
    """
    models = [uncompiled(each) for each in models]
    names = [f"network {number}" for number in range(len(models))] if names is None else names
    without = dict[int, int]()
    for second in range(len(models)):
        for first in range(second):
            side = _base_among(models, first, second, names)
            if side is not None:
                without[side] = second if side == first else first
    for base, adapted in without.items():
        _check(models[base], names[base], names[adapted])
    return [WithoutAdapters(innermost(each)) if number in without else each for number, each in enumerate(models)]


def refuse_shared(models: Sequence[Any], caller: str, but: tuple[int, int] | None = None) -> None:
    """Raise DistillError for networks of a training of which two, other than those numbered `but`, share adapters."""
    for second in range(len(models)):
        for first in range(second):
            if (first, second) != but and _share(models[first], models[second]):
                raise DistillError(
                    f"networks {first} and {second} of {caller} have adapters on one base, so that each would compute "
                    f"with those of the other; {_COPY}."
                )


def _base_among(models: Sequence[Any], first: int, second: int, names: Sequence[str]) -> int | None:
    """Return which of two models is the base of the adapters of the other, by its number; None if neither is."""
    one, other = models[first], models[second]
    if isinstance(one, WithoutAdapters) or isinstance(other, WithoutAdapters) or not _share(one, other):
        return None
    side: int | None = None
    if isinstance(one, nn.Module) and isinstance(other, nn.Module) and innermost(one) is innermost(other):
        wrapped = [_adapters_of(each) for each in (one, other)]
        if wrapped[0] is wrapped[1]:  # the same network twice, of which the first of all is the teacher
            if first:
                return None
            side = first
        elif None in wrapped:
            side = (first, second)[wrapped.index(None)]
    if side is not None and not hasattr(models[side], "combines"):
        return side
    raise DistillError(
        f"{names[first]} ({type(one).__name__}) and {names[second]} ({type(other).__name__}) hold the same adapters, "
        f"so that they cannot be distinguished; give the base itself as teacher, or {_COPY}."
    )


def _share(one: Any, other: Any) -> bool:
    """Return whether two models have a layer with adapters in common, or are one model with prompts of peft."""
    if one is other and hasattr(one, "peft_config"):
        return True
    found = {id(each) for each in _adapted(_network(one))}
    return any(id(each) in found for each in _adapted(_network(other)))


def _network(model: Any) -> nn.Module | None:
    """Return the torch model, also of a served teacher or a model of nnsight; None of what has none."""
    if not isinstance(model, nn.Module):
        model = next((getattr(model, name) for name in ("_module", "network") if hasattr(model, name)), None)
    return model if isinstance(model, nn.Module) and not isinstance(model, WithoutAdapters) else None


def _adapted(model: nn.Module | None) -> list[nn.Module]:
    """Return the layers of a model that have adapters."""
    return [] if model is None else [each for each in model.modules() if hasattr(each, _SWITCH)]


def _adapters_of(model: Any) -> Any:
    """Return the model of peft that is, or is inside of, a model; None if it is not wrapped in one."""
    while isinstance(model, nn.Module):
        model = uncompiled(model)
        if hasattr(model, "get_base_model"):
            return model
        model = getattr(model, "module", None)
    return None


def _check(model: nn.Module, name: str, adapted: str) -> None:
    """Raise DistillError where the base of adapters is trained, or they are merged into it."""
    base = innermost(model)
    own = {id(each) for module in _adapted(base) for each in _adapters_in(module)}
    trained = next((path for path, each in base.named_parameters() if each.requires_grad and id(each) not in own), None)
    if trained is not None:
        raise DistillError(
            f"{adapted} is {name} with adapters, and trains {trained!r} too, which is {name}'s; freeze it: "
            "requires_grad_(False), LoraConfig(bias='none'), or give the student a base of its own: copy.deepcopy(…)."
        )
    if any(getattr(each, "merged", False) for each in _adapted(base)):
        raise DistillError(
            f"the adapters of {adapted} are merged into the weights of {name}; take them out: "
            "student.unmerge_adapter()."
        )


def _adapters_in(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of the adapters in a layer, without those that were there before."""
    for name, parameter in module.named_parameters():
        if not set(_OWN) & set(name.split(".")):
            yield parameter
