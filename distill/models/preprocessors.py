"""What turns raw data into a model's inputs, tokenizers and processors: found beside a model, and saved beside one."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.causal.model import CausalModel
from distill.data.task import Task
from distill.errors import DistillError
from distill.models.inputs import network_of, vocabulary_of
from interventions import shown

OF_TOKENIZERS = (
    "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model",
    "sentencepiece.bpe.model",
)  # fmt: skip
OF_OTHERS = {"image_processor_type": "AutoImageProcessor", "feature_extractor_type": "AutoFeatureExtractor"}
FAILURES = (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError)


def preprocessors_for(given: Any, task: Task | None, teacher: Any, student: Any) -> tuple[Any, ...]:
    """What is saved beside a student: what was given, else the tokenizer of the task, else what lies by the models.

    That of the teacher comes first, as both read the same inputs; where they know different tokens, only the student's
    own is of use.

    Args:
        given: a tokenizer, processor, image processor or feature extractor, or several; None is nothing.
        task: whose rows are trained on.
        teacher: a network or what asks one; None and causal models have none.
        student: the network.
    """
    if given is not None:
        return tuple(given) if isinstance(given, list | tuple) else (given,)
    if task is not None and task.tokenizer is not None:
        return (task.tokenizer,)
    models = [each for each in (teacher, student) if each is not None and not isinstance(each, CausalModel)]
    known = vocabulary_of(student)
    alike = [each for each in models if vocabulary_of(each) == known]
    return next((found for each in alike if (found := preprocessors_of(each))), ())


def preprocessors_of(model: Any) -> tuple[Any, ...]:
    """The tokenizer and processors that were saved where a transformers model was loaded from, none where it was not.

    A tokenizer without words does not count: transformers makes one up where none was saved.
    """
    name = getattr(getattr(network_of(model), "config", None), "_name_or_path", "")
    if not name:
        return ()
    told = {**_settings(name, "preprocessor_config.json"), **_settings(name, "processor_config.json")}
    kinds = [kind for setting, kind in OF_OTHERS.items() if setting in json.dumps(told)]
    if any(_file(name, file) for file in OF_TOKENIZERS):
        kinds.append("AutoTokenizer")
    if len(kinds) > 1 and (whole := _loaded("AutoProcessor", name)) is not None:
        return (whole,)
    return tuple(found for kind in kinds if (found := _loaded(kind, name)) is not None)


def given_preprocessors(tokenizer: Any) -> list[Any]:
    """One or several, as they are given to `fit`; None is none.

    Raises:
        DistillError: one that cannot be saved beside a student.
    """
    found = [each for each in (tokenizer if isinstance(tokenizer, list | tuple) else [tokenizer]) if each is not None]
    odd = next((each for each in found if isinstance(each, type) or not hasattr(each, "save_pretrained")), None)
    if odd is not None:
        raise DistillError(
            f"tokenizer={shown(odd)} is no tokenizer, image processor or feature extractor, as it has no "
            "save_pretrained; give one: tokenizer=AutoTokenizer.from_pretrained(name)."
        )
    return found


def tokenizer_among(preprocessors: Sequence[Any]) -> Any:
    """The tokenizer that one of them is or holds, None where there is none."""
    for each in preprocessors:
        if hasattr(each, "all_special_ids"):
            return each
        if hasattr(each, "tokenizer"):
            return each.tokenizer
    return None


def save_preprocessors(preprocessors: Sequence[Any], folder: Path, model: Any) -> None:
    """Save them beside a model; a tokenizer without a padding token is saved with that of the model."""
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    for each in preprocessors:
        tokenizer = tokenizer_among([each])
        if tokenizer is not None and tokenizer.pad_token is None and isinstance(pad, int) and 0 <= pad < len(tokenizer):
            each = copy.deepcopy(each)
            tokenizer_among([each]).pad_token = tokenizer.convert_ids_to_tokens(pad)
        each.save_pretrained(folder)


def _settings(name: str, file: str) -> dict[str, Any]:
    found = _file(name, file)
    return {} if found is None else json.loads(Path(found).read_text(encoding="utf-8"))


def _file(name: str, file: str) -> str | None:
    from transformers.utils.hub import cached_file

    try:
        return cached_file(
            name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )  # fmt: skip
    except FAILURES:
        return None


def _loaded(kind: str, name: str) -> Any:
    import transformers

    try:
        found = getattr(transformers, kind).from_pretrained(name, trust_remote_code=False)
    except FAILURES:
        return None
    tokenizer = tokenizer_among([found])
    return found if tokenizer is None or len(tokenizer) > len(tokenizer.all_special_ids) else None
