"""Tokenizers and processors, which turn raw data into a model's inputs: finding and saving them beside a model."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.causal.model import CausalModel
from distill.data.task import Task
from distill.errors import DistillError
from distill.models.inputs import Serves, network_of, vocabulary_of
from interventions import shown

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model",
    "sentencepiece.bpe.model",
)  # fmt: skip
KINDS = {"image_processor_type": "AutoImageProcessor", "feature_extractor_type": "AutoFeatureExtractor"}
FAILURES = (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError)


def preprocessors_for(given: Any, task: Task | None, teacher: Any, student: Any) -> tuple[Any, ...]:
    """Return the preprocessors to save beside a student: the given ones, else the task's, else those of the models.

    The teacher's come first, as both models read the same inputs; if their vocabularies differ, only the student's own
    are used.

    Args:
        given: a tokenizer, processor, image processor or feature extractor, or several; None is nothing.
        task: the task whose rows are trained on.
        teacher: a network or a served teacher; None and causal models have no preprocessors.
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
    """Return the tokenizer and processors that lie beside the files that a transformers model was loaded from.

    A tokenizer without words does not count: transformers makes one up if none was saved. Of a teacher behind an
    address it is the tokenizer that it was given.
    """
    if isinstance(model, Serves) and (reads := getattr(model, "tokenizer", None)) is not None:
        return (reads,)
    name = getattr(getattr(network_of(model), "config", None), "_name_or_path", "")
    if not name:
        return ()
    settings = {**_settings(name, "preprocessor_config.json"), **_settings(name, "processor_config.json")}
    kinds = [kind for setting, kind in KINDS.items() if setting in json.dumps(settings)]
    if any(_file(name, file) for file in TOKENIZER_FILES):
        kinds.append("AutoTokenizer")
    if len(kinds) > 1 and (whole := _load("AutoProcessor", name)) is not None:
        return (whole,)
    return tuple(found for kind in kinds if (found := _load(kind, name)) is not None)


def given_preprocessors(tokenizer: Any) -> list[Any]:
    """Return the preprocessors that were given to `fit`, one or several, as a list; None is none.

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
    """Return the tokenizer among preprocessors, or inside one of them; None if there is none."""
    for each in preprocessors:
        if hasattr(each, "all_special_ids"):
            return each
        if hasattr(each, "tokenizer"):
            return each.tokenizer
    return None


def save_preprocessors(preprocessors: Sequence[Any], folder: Path, model: Any) -> None:
    """Save preprocessors beside a model; a tokenizer without a padding token is saved with that of the model."""
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


def _load(kind: str, name: str) -> Any:
    import transformers

    try:
        found = getattr(transformers, kind).from_pretrained(name, trust_remote_code=False)
    except FAILURES:
        return None
    tokenizer = tokenizer_among([found])
    return found if tokenizer is None or len(tokenizer) > len(tokenizer.all_special_ids) else None
