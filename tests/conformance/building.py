"""The tiny random model of a model type, and the inputs that it runs on."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from tests.conformance.inputs import batches
from tests.conformance.overrides import SPREADS
from tests.conformance.shrinking import tiny

TASKS = ("ForConditionalGeneration", "ForCausalLM", "ForMaskedLM", "ForImageClassification", "ForPreTraining")
LARGEST = 30_000_000


class CannotBuildError(Exception):
    """The type cannot be built, or run, without a network or a package; the text says why."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model to check and two batches of one shape for it."""

    model_type: str
    model: nn.Module
    base: dict[str, object]
    source: dict[str, object]

    @cached_property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @cached_property
    def modality(self) -> str:
        kinds = {
            "pixel": "vision",
            "input_f": "audio",
            "input_v": "audio",
            "past_values": "series",
            "input_ids": "text",
        }
        found = {kind for name in self.base for part, kind in kinds.items() if name.startswith(part)}
        return " + ".join(sorted(found)) or "other"


def subject(model_type: str) -> Subject:
    """The tiny model of `model_type` in eval mode, its weights spread wide enough that every layer matters.

    Raises:
        CannotBuildError: no class of the type can be built and run from a configuration alone.
    """
    errors = []
    for kind in classes(model_type):
        try:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = built(kind, model_type)
                base, source = batches(model)
        except Exception as error:
            errors.append(f"{kind.__name__}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        return Subject(model_type, model, base, source)
    raise CannotBuildError("; ".join(errors[:2]) or "no model class has this configuration")


def classes(model_type: str) -> Iterator[type]:
    """The classes to try: what AutoModel gives, then those of the modeling file with this configuration."""
    from transformers import PreTrainedModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    configuration = CONFIG_MAPPING[model_type]
    given = []
    if configuration in MODEL_MAPPING:
        try:
            found = MODEL_MAPPING[configuration]
        except ValueError:  # a name that transformers does not hold
            found = []
        given = list(found) if isinstance(found, tuple | list) else [found]
    try:
        module = importlib.import_module(configuration.__module__.replace("configuration_", "modeling_"))
    except ModuleNotFoundError:
        module = None
    own = [
        kind for kind in vars(module or object()).values()
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel) and kind.config_class is configuration
        and kind.__module__ == module.__name__ and "forward" in vars(kind) and kind not in given
    ] if module else []  # fmt: skip
    own.sort(key=lambda kind: next((i for i, task in enumerate(TASKS) if kind.__name__.endswith(task)), len(TASKS)))
    yield from [*given, *own]


def built(kind: type, model_type: str) -> nn.Module:
    config = tiny(model_type)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in kind(tiny(model_type)).parameters())
    if count > LARGEST:
        raise CannotBuildError(f"{count:,} parameters")
    model = kind(config).eval()
    for name, parameter in model.named_parameters():
        closed = "gate" in name and not parameter.any()  # before training some gates let nothing through
        if (parameter.ndim > 1 or closed) and parameter.is_floating_point():
            parameter.data.normal_(0, SPREADS.get(model_type, 0.3))
    for name, buffer in model.named_buffers():
        if "embed" in name.rpartition(".")[2] and buffer.is_floating_point():
            buffer.normal_()  # codebooks are zero before training
    return model


def tensors(value: object) -> list[Tensor]:
    """The floating-point tensors in an output, caches and recurrent states left out."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = [entry for key, entry in value.items() if "past" not in key and "cache" not in key and key != "state"]
    return [tensor for entry in value for tensor in tensors(entry)] if isinstance(value, tuple | list) else []


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of transformers, and with the draws of eval-mode models repeatable."""
    import warnings

    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.filterwarnings("ignore", module="transformers|torch")
            yield
    finally:
        logging.set_verbosity(verbosity)
