"""The language models of Causal-Distill: a teacher by name, a student by its configuration and a state dict."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill.errors import DistillError

POSITIONS = {"roberta": "roberta.embeddings.position_embeddings", "gpt2": "transformer.wpe"}
TOKEN_TYPES = {"roberta": "roberta.embeddings.token_type_embeddings"}
NEW_HEAD = ("vocab_transform.", "vocab_layer_norm.")
"""The parameters of DistilBERT that extract_distilbert.py takes from the teacher only where a flag says so."""


def load_language_model(name: str, kind: str, *, masked: bool, cache: str | None = None) -> nn.Module:
    """Load a language model in eval mode.

    Args:
        name: a folder, or a name on the hub.
        kind: the kind of model that it must be: bert, roberta or gpt2.
        masked: a masked language model, else a causal one.
        cache: the folder of downloads from the hub.

    Raises:
        DistillError: nothing there, or a model of another kind.
    """
    import transformers

    auto: Any = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    try:
        model: Any = auto.from_pretrained(name, cache_dir=cache, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DistillError(
            f"--teacher_name {name} cannot be loaded: {str(error).splitlines()[0]}; give a folder made by "
            "save_pretrained, or a name on the hub."
        ) from error
    if model.config.model_type != kind:
        raise DistillError(
            f"--teacher_name {name} is a {model.config.model_type}, and --teacher_type {kind} was given; correct one."
        )
    return model.eval()


def new_student(path: Path, kind: str, *, masked: bool, seed: int) -> nn.Module:
    """Make a student with new weights.

    Args:
        path: the JSON of its configuration.
        kind: distilbert, roberta or gpt2.
        masked: a masked language model, else a causal one.
        seed: of its weights.

    Raises:
        DistillError: a configuration that cannot be read.
    """
    import transformers

    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        others = {name: value for name, value in fields.items() if name != "model_type"}
        config = transformers.AutoConfig.for_model(kind, **others)
    except (OSError, ValueError, TypeError) as error:
        raise DistillError(f"--student_config {path} cannot be read: {error}; give a file of JSON.") from None
    auto: Any = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return auto.from_config(config)


def load_weights(student: nn.Module, path: Path) -> None:
    """Load a state dict into a student; that of DistilBERT may lack the parameters of its head that BERT has not.

    Raises:
        DistillError: a file that is none, or that is of another model.
    """
    from safetensors.torch import load_file

    try:
        weights: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        found = student.load_state_dict(weights, strict=False)
    except Exception as error:  # torch raises a dozen unrelated types for files that hold no state dict
        raise DistillError(
            f"--student_pretrained_weights {path} cannot be loaded: {' '.join(str(error).split())[:200]}; make it with "
            "scripts/extract_distilbert.py and as many layers as --student_config has."
        ) from None
    known = dict(student.named_parameters())
    missing = [name for name in found.missing_keys if name in known and not name.startswith(NEW_HEAD)]
    if missing or found.unexpected_keys:
        what = f"lacks {missing[0]}" if missing else f"has {found.unexpected_keys[0]}, which the student has not"
        raise DistillError(
            f"--student_pretrained_weights {path} {what}; make it with as many layers as --student_config has."
        )


def freeze(student: Any, *, positions: bool, token_types: bool) -> None:
    """Freeze the position or token type embeddings, in models for which the original does."""
    kind = student.config.model_type
    for is_frozen, path in ((positions, POSITIONS), (token_types, TOKEN_TYPES)):
        if is_frozen and kind in path:
            student.get_submodule(path[kind]).requires_grad_(False)


def check_alike(teacher: Any, student: Any) -> None:
    """Raise DistillError where teacher and student differ in vocabulary, width or longest input."""
    for name in ("vocab_size", "hidden_size", "max_position_embeddings"):
        one, other = getattr(teacher.config, name), getattr(student.config, name)
        if one != other:
            raise DistillError(
                f"the teacher has {name} {one} and the student {other}; make --student_config say the same."
            )


def max_length_of(model: Any, tokenizer: Any) -> int:
    """Return the number of tokens that both read at most; RoBERTa numbers positions from after its padding token."""
    config = model.config
    skipped = config.pad_token_id + 1 if config.model_type == "roberta" else 0
    return min(tokenizer.model_max_length, config.max_position_embeddings - skipped)
