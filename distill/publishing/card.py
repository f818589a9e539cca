"""The model card of a student: from what it was distilled, how, on what, and how far it computes like its teacher.

A card is the README of a model on a hub (Mitchell et al. 2019, arXiv:1810.03993), with metadata for its search.
"""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from distill.evaluation.evaluate import Evaluation
from distill.storage.adapters import ADAPTERS
from distill.storage.files import write
from distill.training.fingerprints import environment

CARD = "README.md"
METRICS = {
    "accuracy": "accuracy",
    "micro_f1": "F1 of all labels (micro)",
    "macro_f1": "mean F1 of the labels (macro)",
    "exact_match": "rows with all labels right",
    "mse": "mean squared error",
    "pearson": "correlation with the labels (Pearson)",
    "spearman": "correlation of ranks (Spearman)",
    "perplexity": "perplexity",
    "teacher_perplexity": "perplexity of the teacher",
    "agreement": "agreement with the teacher",
    "kl": "KL(teacher ‖ student) [nats]",
    "iia": "interchange intervention accuracy (IIA)",
    "effective": "effective IIA",
    "error": "error under interchange",
}
"""The names of figures in a card."""


def write_card(folder: Path, **described: Any) -> Path:
    """Write the card of a saved student into its folder, and return the path; the arguments are those of `card_of`."""
    file = folder / CARD
    write(file, card_of(folder, **described))
    return file


def card_of(
    folder: Path,
    *,
    student: nn.Module,
    teacher: Any,
    evaluation: Evaluation,
    settings: Mapping[str, Any],
    steps: int,
    rows: int | None = None,
) -> str:
    """Return the text of the card of a student.

    Args:
        folder: where it is saved.
        student: the network.
        teacher: the network that it was distilled from; None where it was trained on labels alone.
        evaluation: on held-out rows.
        settings: of the training, as `FitResult.settings` has them.
        steps: how many steps it was trained for.
        rows: how many rows it was trained on; None where they are drawn.
    """
    base = name_of(teacher)
    parts = [
        f"# {folder.parent.name if folder.name == 'student' else folder.name}",
        _opening(student, teacher, base),
        "## Training",
        "\n".join(f"- {line}" for line in _training(settings, steps, rows)),
        "## Evaluation",
        _table(evaluation),
        "## Use",
        f"```python\n{_usage(folder, student)}\n```",
        f"Made with {', '.join(f'{name} {version}' for name, version in environment().items())}.",
    ]
    return f"---\n{_metadata(folder, student, base, evaluation)}\n---\n\n" + "\n\n".join(parts) + "\n"


def name_of(model: Any) -> str:
    """Return the name of a model on a hub, as "organisation/name"; an empty text for one that has none."""
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    return name if name.count("/") == 1 and not Path(name).exists() and name[0] not in "./~" else ""


def figures_of(evaluation: Evaluation) -> Iterator[tuple[str, str, float]]:
    """Yield the figures that were measured: key, text with its interval, and value."""
    shares = {name: getattr(evaluation, name) for name in ("accuracy", "exact_match", "agreement")}
    outcome = None if evaluation.interchange is None else evaluation.interchange.overall
    shares |= {} if outcome is None else {"iia": outcome.iia, "effective": outcome.effective}
    for name in METRICS:
        share, value = shares.get(name), evaluation.figures.get(name)
        if share is not None:
            yield name, str(share), share.value
        elif value is not None:
            yield name, f"{value:.4g}", value


def _opening(student: nn.Module, teacher: Any, base: str) -> str:
    size = sum(each.numel() for each in student.parameters())
    what = f"A {type(student).__name__} of {size:,} parameters"
    if teacher is None:
        return f"{what}, trained on labels."
    named = f"[{base}](https://huggingface.co/{base})" if base else f"a {type(teacher).__name__}"
    whole = sum(each.numel() for each in teacher.parameters()) if isinstance(teacher, nn.Module) else 0
    return f"{what}, distilled from {named}{f' of {whole:,}' if whole else ''}."


def _training(settings: Mapping[str, Any], steps: int, rows: int | None) -> Iterator[str]:
    """Yield what a student was trained on, and how."""
    schedule = settings.get("schedule", {})
    yield f"objectives: {', '.join(f'`{each}`' for each in settings.get('objective', ()))}"
    if entries := settings.get("mapping"):
        yield f"mapping, teacher ~ student: {', '.join(f'`{each}`' for each in entries)}"
    yield f"{steps:,} steps of {schedule.get('batch_size', '?')} rows" + (f" of {rows:,} in all" if rows else "")
    named = ("optimizer", "lr", "warmup", "decay", "weight_decay", "clip", "seed")
    yield ", ".join(f"{name} {schedule[name]}" for name in named if name in schedule)


def _table(evaluation: Evaluation) -> str:
    rows = [f"| {METRICS[name]} | {text} |" for name, text, _ in figures_of(evaluation)]
    if not rows:
        return f"Nothing was measured: {evaluation.note or 'no held-out data was given'}."
    intervals = "In brackets 95 % intervals." if "[" in "".join(rows) else ""
    return "\n".join(["| on held-out rows | |", "| --- | --- |", *rows, "", intervals]).rstrip()


def _usage(folder: Path, student: nn.Module) -> str:
    """Return the lines of code that load a student."""
    name = type(student).__name__
    if (folder / ADAPTERS).is_file():
        return f'from peft import AutoPeftModel\n\nmodel = AutoPeftModel.from_pretrained("{folder.name}")'
    if not hasattr(student, "save_pretrained"):
        load = 'safetensors.torch.load_model(model, "model.safetensors")'
        return f"import safetensors.torch\n\nmodel = {name}(…)\n{load}"
    lines = [f"from transformers import AutoTokenizer, {name}", "", f'model = {name}.from_pretrained("{folder.name}")']
    if any(folder.glob("tokenizer*")):
        return "\n".join([*lines, f'tokenizer = AutoTokenizer.from_pretrained("{folder.name}")'])
    return "\n".join(lines).replace("AutoTokenizer, ", "")


def _metadata(folder: Path, student: nn.Module, base: str, evaluation: Evaluation) -> str:
    """Return the metadata of a card as YAML."""
    from huggingface_hub import EvalResult, ModelCardData

    found = [(name, value) for name, _, value in figures_of(evaluation)]
    results = [
        EvalResult("distillation", "held-out", "held-out rows", name, value, metric_name=METRICS[name])
        for name, value in found
    ]
    library = "transformers" if hasattr(student, "save_pretrained") else "pytorch"
    settings: dict[str, Any] = {"eval_results": results, "model_name": folder.name} if results else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = ModelCardData(
            library_name="peft" if (folder / ADAPTERS).is_file() else library,
            base_model=base or None,
            tags=["distillation", "causal-abstraction"],
            metrics=[name for name, _ in found] or None,
            **settings,
        )
    return data.to_yaml()
