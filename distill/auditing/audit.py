"""`audit`: a compressed model against its original, without training: is it the same computation, and where not."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.alignment.search_mapping import search_mapping
from distill.auditing.answers import Models, compare
from distill.auditing.behaviour import behaviour_of
from distill.auditing.controls import Controls
from distill.auditing.differences import Naming, Slices, differences_of, sliced_by
from distill.auditing.interchanges import KINDS, interchanges_of
from distill.auditing.layers import Layers, layers_of
from distill.auditing.page import save_page
from distill.auditing.parts import Depth, Part, measure_parts
from distill.auditing.reading import COMPRESSED, ORIGINAL, Reading, reading_of
from distill.auditing.result import Audit
from distill.data.files import read, rows_of
from distill.data.rows import Rows
from distill.data.seeds import seed_of
from distill.data.task import Task
from distill.errors import DistillError, checked
from distill.evaluation.controls import ANOTHER
from distill.evaluation.measurement import check_pairs
from distill.interchange.kinds import Kind, kinds_of
from distill.interchange.mapping import layer_mapping
from distill.models.class_names import check_alike, real_names
from distill.models.inputs import refuse_valueless, vocabulary_of
from distill.models.numbering import numbered_as
from distill.models.outputs import answered, same_answers
from distill.models.reinitialized import reinitialized
from distill.models.trials import translated
from distill.tasks.loading import held_out, task_of
from distill.tasks.named import length_for, tokenizer_of
from distill.teachers.without_adapters import apart
from distill.training.run_folder import refuse_used
from interventions import InterventionError, shown


@checked
def audit(
    original: nn.Module,
    compressed: nn.Module,
    data: Any,
    *,
    mapping: Any = None,
    slices: Slices = None,
    kinds: Any = None,
    examples: int = 256,
    pairs: int = 500,
    seed: Any = 0,
    batch_size: int = 32,
    answers: Any = None,
    output_dir: str | Path | None = None,
) -> Audit:
    """Compare a compressed model with its original, without training: answers, where they differ, and which parts do.

    Any two models that read the same inputs and answer in the same way: quantized, pruned, merged, fine-tuned,
    distilled, with dropped layers. Classifiers, token classifiers, language models, encoder–decoders, models of images,
    regressions and models that embed.

    Every part of the compressed model (embedding, head, attention, feed-forward part, block) runs on what the original
    computes before it, and takes the place of the original's part alone; the divergence of the answers is exactly 0 for
    a part that computes the same, so that a change is found where it is and nowhere else. That is the sensitivity of
    ZeroQ (Cai et al. 2020, arXiv:2001.00281, section 3). How both respond to interchanges of two rows is measured by
    `interchange_accuracy` (Geiger et al. 2021, arXiv:2106.02997, section 3), which alone would not see a part that
    decides few answers. Beside both stand two controls: the original against itself, and an untrained network.

    Args:
        original, compressed: torch models, also quantized by torch or with adapters of peft.
        data: a Task or the name of one (its test rows), a file of texts (all of its rows), or rows in any form that
            `Rows.of` takes. Labels are not needed.
        mapping: {block of the original: block of the compressed model}, as numbers or locations. By default block i
            stands for block i; where depths differ, each for the one whose weights are most alike, and if none are, for
            the one that `search_mapping` finds; where it finds none, as "full" of `layer_mapping`. "search" searches in
            any case.
        slices: a column of the data by which the rows are sliced, or a value for each row, or {name: values}.
        kinds: the kinds of interchange, {name: `Kind`} or `"usual"`, as for `interchange_accuracy`; by default spans of
            tokens and the answering token of blocks, attention heads, and the outputs of feed-forward parts. {} or []
            measures none.
        examples: how many rows, drawn by the seed, the parts are exchanged on.
        pairs: how many pairs of rows are interchanged at each place.
        seed: of rows, pairs, intervals and the untrained network.
        batch_size: rows of a forward.
        answers: which part of a model's output is its answer, as for `fit`.
        output_dir: a new folder for the page `report.html`, which answers first and needs no other file, and for
            `result.json`; None writes nothing.

    Raises:
        DistillError: models with other classes, vocabularies or kinds of answers; a compressed model that cannot be run
            with the same inputs; a mapping or a column that does not exist.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> data = {"x": torch.randn(50, 4, generator=torch.Generator().manual_seed(0))}
    >>> print(audit(net, net, data).sentences[0])
    Yes, it is the same computation: all 50 answers are equal to the last bit, and so is what every part computes.
    """
    (original, compressed), seed = apart([original, compressed], (ORIGINAL, COMPRESSED)), seed_of(seed)
    _check(original, compressed, examples, pairs)
    if output_dir is not None:
        refuse_used(Path(output_dir))
    rows, show, columns = _rows(data, original, compressed)
    sliced = sliced_by(slices, rows, columns)
    with ExitStack() as stack:
        stack.enter_context(answered((original, compressed), answers))
        stack.enter_context(translated())
        reading = reading_of(original, compressed, rows, chosen=answers is not None)
        settings = {"pairs": pairs, "seed": seed, "batch_size": batch_size}

        def search() -> Mapping[Any, Any]:
            found = search_mapping(original, compressed, rows, controls=(), **settings).mapping
            return found or layer_mapping(original, compressed)

        layers = layers_of(original, compressed, mapping, None if reading.kind == "embeddings" else search)
        models = Models(original, compressed, reading, batch_size, layers)
        found = compare(models, rows)
        behaviour = behaviour_of(found)
        naming = Naming(_names(original, reading) or rows.classes, show)
        differences = differences_of(found, rows, naming, sliced)
        few = rows.take(_drawn(len(rows), examples, seed))
        parts, depths, notes = _parts(models, few)
        wanted = KINDS if kinds is None else kinds_of(kinds)
        interchange, more = interchanges_of(models, rows, wanted, settings) if wanted else ({}, [])
        first = {name: wanted[name] for name in list(interchange)[:1]}
        controls = _controls(models, rows, few, settings, first)
    used = {
        "rows": len(rows), "examples": len(few), "pairs": pairs, "seed": seed,
        "mapping": {each.stack or "blocks": dict(each.pairs) for each in models.layers},
    }  # fmt: skip
    result = Audit(behaviour, differences, parts, depths, interchange, controls, used, (*notes, *more))
    if output_dir is not None:
        save_page(result, Path(output_dir), f"{type(compressed).__name__} against {type(original).__name__}")
    return result


def _check(original: nn.Module, compressed: nn.Module, examples: int, pairs: int) -> None:
    """Raise DistillError for models of other classes or vocabularies, or without values, and for no examples."""
    check_pairs(pairs)
    if examples < 1:
        raise DistillError(f"examples={examples} exchanges no part on any row; use e.g. examples=256.")
    for model in (original, compressed):
        refuse_valueless(model, "audit")
    known = [vocabulary_of(model) for model in (original, compressed)]
    if None not in known and known[0] != known[1]:
        raise DistillError(
            f"{ORIGINAL} knows {known[0]} tokens and {COMPRESSED} {known[1]}: they read different vocabularies; audit "
            "a model that reads the same tokens."
        )
    check_alike(original, compressed, (ORIGINAL, COMPRESSED))
    words = [None if each is None else each.get_vocab() for each in map(tokenizer_of, (original, compressed))]
    if None not in words and words[0] != words[1]:
        raise DistillError(
            f"the tokenizers saved with {ORIGINAL} and {COMPRESSED} number their {len(words[0] or ())} tokens "
            "otherwise, so the same ids are other texts; audit a model that reads with the original's tokenizer."
        )


def _rows(data: Any, original: nn.Module, compressed: nn.Module) -> tuple[Rows, Any, Any]:
    """Return the rows, what turns one into text, and what reads other columns of their file (both may be None)."""
    tokenizer = tokenizer_of(original)

    def text(row: Mapping[str, Tensor]) -> str:
        return str(tokenizer.decode(row["input_ids"], skip_special_tokens=True))

    if isinstance(data, Path) or (isinstance(data, str) and Path(data).suffix):
        rows = numbered_as(rows_of(data, tokenizer, length_for(original)), original, compressed)
        table = read(data)

        def column(name: str) -> list[str]:
            if name not in table[0]:
                raise DistillError(
                    f"slices={name!r} is no column of {data}, which has {', '.join(table[0])}; name one."
                )
            return [str(row.get(name)) for row in table]

        return rows, text, column
    task = task_of(data, original) if isinstance(data, str | Task) else None
    rows = held_out(data if task is None else task, original, compressed)
    shown = text if tokenizer is not None and "input_ids" in rows.columns else None
    return rows, shown if task is None or task.show is None else task.show, None


def _names(original: nn.Module, reading: Reading) -> Sequence[str] | None:
    """Return the names of the classes, of a language model its tokens; None where they are not known."""
    names = real_names(original)
    tokenizer = tokenizer_of(original) if reading.at_tokens and names is None else None
    if tokenizer is None or vocabulary_of(original) != len(tokenizer):
        return names
    return [shown(tokenizer.decode([number])) for number in range(len(tokenizer))]


def _drawn(rows: int, examples: int, seed: int) -> Tensor:
    """Return the numbers of the rows that parts are exchanged on, ascending."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    return order[:examples].sort().values


def _parts(models: Models, rows: Rows) -> tuple[tuple[Part, ...], tuple[Depth, ...], list[str]]:
    """Return the parts exchanged one by one and the depths, or why there are none."""
    try:
        return *measure_parts(models, rows), []
    except (DistillError, InterventionError) as why:
        return (), (), [f"no part was exchanged: {why}"]


def _controls(models: Models, rows: Rows, few: Rows, settings: dict[str, Any], kinds: Mapping[str, Kind]) -> Controls:
    """Return what the measurement gives for the original itself, and for an untrained network of its architecture.

    Args:
        models: both models.
        rows: the data.
        few: the rows that parts are exchanged on; those of the controls on the first batch of them.
        settings: of the interchange accuracy.
        kinds: the kind of interchange that is measured; none where there is none.
    """
    original, seed = models.original, settings["seed"]
    layers = tuple(Layers(e.stack, tuple((i, i) for i, _ in e.pairs), (e.depths[0],) * 2) for e in models.layers)
    first = few.take(torch.arange(min(models.batch_size, len(few))))
    same = replace(models, compressed=original, layers=layers)
    itself = compare(same, first).divergence.tolist()
    itself += [each.divergence for each in _parts(same, first)[0]]
    new = reinitialized(original, seed + ANOTHER)
    with same_answers(new, original):
        another = replace(same, compressed=new)
        untrained = behaviour_of(compare(another, few))
        parts = measure_parts(another, first, whole=True)[0] if layers else ()
        accuracy = interchanges_of(another, rows, kinds, settings)[0] if kinds else {}
    return Controls(max(itself), untrained, parts, next(iter(accuracy.values()), None))
