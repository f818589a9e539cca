"""Loading and saving of models, encoders and tokenizers, in folders and from the hub."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model as save_weights
from torch import nn

from distill.data.missing import IGNORED
from distill.data.seen_rows import SeenRows
from distill.data.task import Task
from distill.data.trained_on import save_split
from distill.errors import DistillError
from distill.models.preprocessors import preprocessors_of, save_preprocessors
from distill.storage.adapters import ADAPTERS, BASE, save_base
from distill.storage.files import MANIFEST, check_folder_whole, new_folder, save_into


@contextmanager
def hide_progress_bars() -> Iterator[None]:
    """Hide the progress bars of transformers inside a block."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def save_model(model: Any, folder: Path, preprocessors: Sequence[Any] = (), seen: SeenRows | None = None) -> None:
    """Save a model to a new folder, whole or not at all, with checksums: by `save_pretrained`, else only its weights.

    Args:
        model: the network.
        folder: the folder; an older one is replaced.
        preprocessors: the tokenizers and processors that make its inputs.
        seen: the rows that it was trained on, so that it is not measured on them.
    """
    with new_folder(folder) as partial:
        write_model(model, partial, preprocessors, seen, place=folder)


def write_model(
    model: Any, folder: Path, preprocessors: Sequence[Any] = (), seen: SeenRows | None = None, *, place: Path
) -> None:
    """Write the files of a model to an existing folder, which will lie at `place` in the end."""
    if hasattr(model, "save_pretrained"):
        with hide_progress_bars():
            model.save_pretrained(folder)
            save_base(model, folder, place)
    else:
        save_weights(model, str(folder / "model.safetensors"))
    save_preprocessors(preprocessors, folder, model)
    if seen is not None:
        seen.save(folder)


def load_classifier(name: str | Path) -> nn.Module:
    """Return a classifier saved by transformers, from a folder or by its name on the hub.

    Raises:
        DistillError: no model there, or one without a trained classifier.
    """
    kinds = _architectures(name, "teacher", "give a folder made by save_pretrained, e.g. by distill teach")
    kind = next((each for each in kinds if "Classification" in each), None)
    if kind is None and any(map(_writes, kinds)):
        raise DistillError(
            f"{str(name)!r} holds {kinds[0]}, a language model, which has no classifier; distil it on texts or chats: "
            "--task text or --task chat."
        )
    if kind is None:
        raise DistillError(
            f"{str(name)!r} holds {kinds[0] if kinds else 'a model'}, which has no classifier; fine-tune one first: "
            f"distill teach --task sst2 --from {name} --output teacher."
        )
    return _load(name, kind, "teacher")


def load_language_model(name: str | Path) -> nn.Module:
    """Return a causal language model saved by transformers, from a folder or by its name on the hub.

    Raises:
        DistillError: no model there, or one that does not write text.
    """
    kinds = _architectures(name, "teacher", "give a folder made by save_pretrained")
    kind = next(filter(_writes, kinds), None)
    if kind is None:
        raise DistillError(
            f"{str(name)!r} holds {kinds[0] if kinds else 'a model'}, which writes no text; give a causal language "
            "model, or leave --task text and --task chat to those."
        )
    return _load(name, kind, "teacher")


def _writes(kind: str) -> bool:
    """Return whether models of a class of transformers write text token by token."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def load_model(name: str | Path) -> nn.Module:
    """Return a model of any kind that was saved by transformers, or by peft as adapters, by its folder or name.

    Raises:
        DistillError: no model there, or one whose class transformers does not have.
    """
    if (Path(name) / ADAPTERS).is_file():
        return _load_adapted(Path(name))
    kinds = _architectures(name, "model", "give a folder made by save_pretrained")
    if not kinds:
        raise DistillError(
            f"model {str(name)!r} names no class in its config.json; save it again: model.save_pretrained(…)."
        )
    return _load(name, kinds[0], "model")


def _architectures(name: str | Path, what: str, way_out: str) -> Sequence[str]:
    """Return the names of the classes that a saved model is of."""
    import transformers

    check_folder_whole(
        Path(name), f"make it again, or, if you have changed it yourself, delete {Path(name) / MANIFEST}"
    )
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DistillError(f"{what} {str(name)!r} cannot be loaded: {_first_line(error)}; {way_out}.") from error
    return config.architectures or ()


def _load(name: str | Path, kind: str, what: str) -> nn.Module:
    """Return a saved model of a class of transformers, in eval mode."""
    import transformers

    loader = getattr(transformers, kind, None)
    if loader is None:
        raise DistillError(
            f"{what} {str(name)!r} is a {kind}, which transformers {transformers.__version__} does not have; load it "
            "with its own code, and call distill.audit(original, compressed, data) in Python."
        )
    try:
        with hide_progress_bars():
            return loader.from_pretrained(name).eval()
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise DistillError(f"{what} {str(name)!r} cannot be loaded: {_first_line(error)}.") from error


def _load_adapted(folder: Path) -> nn.Module:
    """Return a model with the adapters of peft in a folder, on the model that they were trained on."""
    try:
        import peft
    except ImportError as error:
        raise DistillError(f"{folder} holds adapters of peft, which is not installed: pip install peft.") from error
    try:
        base = json.loads((folder / ADAPTERS).read_text(encoding="utf-8")).get("base_model_name_or_path")
        base = folder / BASE if (folder / BASE).is_dir() else base  # the folder may have been moved
    except ValueError as error:
        raise DistillError(f"{folder / ADAPTERS} is no JSON: {_first_line(error)}; save the adapters again.") from error
    if not base:
        raise DistillError(
            f"{folder / ADAPTERS} does not say which model the adapters belong to; merge them, "
            "model.merge_and_unload().save_pretrained(…), or write base_model_name_or_path into it."
        )
    try:
        return peft.PeftModel.from_pretrained(load_model(base), folder).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise DistillError(f"model {str(folder)!r} cannot be loaded: {_first_line(error)}.") from error


def new_classifier(encoder: str | Path, task: Task, seed: int = 0) -> nn.Module:
    """Return an encoder with a new, untrained head for the classes of a task, its several labels or its real values.

    Raises:
        DistillError: an encoder that cannot be loaded.
    """
    import transformers

    kinds = {"pixel_values": transformers.AutoModelForImageClassification}
    kind = next(
        (k for column, k in kinds.items() if column in task.train.columns),
        transformers.AutoModelForSequenceClassification,
    )
    labels = dict(enumerate(task.classes))
    sizes: dict[str, Any] = {"id2label": labels, "label2id": {name: i for i, name in labels.items()}}
    values = task.train.table.get("labels")
    if not labels and isinstance(values, torch.Tensor):
        several = values.ndim > 1 and bool(((values == IGNORED) | (values == 0) | (values == 1)).all())
        problem = "multi_label_classification" if several else "regression"
        sizes = {"num_labels": values[0].numel(), "problem_type": problem}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return kind.from_pretrained(encoder, **sizes, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DistillError(
            f"encoder {str(encoder)!r} cannot be loaded: {_first_line(error)}; give a folder or a name on the hub."
        ) from error


def load_tokenizer(name: str | Path) -> Any:
    """Return the tokenizer saved beside a model.

    Raises:
        DistillError: no tokenizer there, or one without words.
    """
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise DistillError(
            f"no tokenizer is saved with {str(name)!r}: {_first_line(error)}; save it there: "
            "tokenizer.save_pretrained(…)."
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # made from the configuration, without its file of words
        raise DistillError(
            f"no tokenizer is saved with {str(name)!r}: it would have no words; save it there: "
            "tokenizer.save_pretrained(…)."
        )
    return tokenizer


def save_teacher(
    teacher: nn.Module, tokenizer: Any, folder: Path, seen: SeenRows | None = None, split_seed: int | None = None
) -> None:
    """Save a teacher for `load_classifier(folder)`, with its tokenizer or the preprocessors that it was loaded with.

    Other files in the folder, e.g. a log of the training, stay.

    Args:
        teacher: the network.
        tokenizer: its tokenizer; None saves the preprocessors that lie beside the model it was loaded from.
        folder: the folder.
        seen: the rows that it was trained on.
        split_seed: the seed by which the test rows were held out.
    """
    with save_into(folder) as partial:
        write_model(
            teacher, partial, preprocessors_of(teacher) if tokenizer is None else (tokenizer,), seen, place=folder
        )
        if split_seed is not None:
            save_split(partial, split_seed)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
