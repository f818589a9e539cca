"""Pairs of a base and a source: drawn from rows, or drawn until enough of them change the teacher's answer."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from distill.data.rows import Rows, batches
from distill.data.seeds import seed_from
from distill.errors import DistillError
from distill.evaluation.measurement import Examples, check_pairs, measuring, paired
from distill.evaluation.network_interchanges import NetworkInterchanges
from distill.interchange.sources import Shuffle, Sources
from distill.models.inputs import device_of, to_device
from distill.statistics.sharing import Sharing

TRIES = 20
"""How many times as many pairs as are wanted are tried at most, to find those that change the teacher's answer."""
LOOKED_AT = 1024
"""How many pairs, at most, show whether an interchange can be seen at an entry at all."""
STREAM = 2**31 - 2  # seeds the pairs of the second and later rounds


def examples_of_rows(rows: Rows, pairs: int, sources: Sources, vocabulary: int | None, seed: int) -> Examples:
    """Return pairs of two rows, or of a row and the source that a rule makes from it.

    Args:
        rows: each is a base in turn.
        pairs: how many.
        sources: the rule: with `Shuffle` the source is another row.
        vocabulary: the number of token ids that may be drawn.
        seed: of all draws.

    Raises:
        DistillError: fewer than two rows, no pairs, or a rule that draws other rows of a batch.
    """
    if len(rows) < 2:
        raise DistillError(f"interchange accuracy needs at least 2 rows to pair, and the data has {len(rows)}.")
    check_pairs(pairs)
    base, other = paired(len(rows), pairs, torch.Generator().manual_seed(seed))
    bases, clusters = rows.take(base), rows.clusters
    if isinstance(sources, Shuffle):
        made_of = (None, None) if clusters is None else (clusters[base], clusters[other])
        return Examples(bases, rows.take(other), Sharing(base, other, *made_of))
    drawn = [
        sources.draw(bases.batch([i]), vocabulary, torch.Generator().manual_seed(seed_from(seed, i)))
        for i in range(pairs)
    ]
    if not all(isinstance(each, dict) for each in drawn):
        raise DistillError(f"sources={sources!r} gives rows of a batch; use Shuffle() or InContext(0.3).")
    changed = [each["input_ids"][0] for each in drawn if isinstance(each, dict)]
    column = torch.stack(changed) if isinstance(bases.table["input_ids"], Tensor) else changed
    made = Rows({**bases.table, "input_ids": column}, bases.pad_id, bases.padding_side)
    made_of = (None, None) if clusters is None else (clusters[base], clusters[base])
    return Examples(bases, made, Sharing(base, len(rows) + torch.arange(pairs), *made_of))


def effective_examples(
    interchanges: NetworkInterchanges,
    rows: Rows,
    pairs: int,
    sources: Sources,
    vocabulary: int | None,
    *,
    seed: int,
    batch_size: int,
) -> tuple[Examples, Bool[Tensor, "found entries"], Int[Tensor, " entries"]]:
    """Return pairs whose interchange changes the teacher's answer, as many for each entry of the mapping.

    Pairs are tried in rounds, several at once where they are few. In each, the teacher alone runs, and no longer at an
    entry that has its pairs.

    Args:
        interchanges: the entries in both networks.
        rows, pairs, sources, vocabulary, seed: as for `examples_of_rows`; `pairs` are wanted of each entry.
        batch_size: pairs of a forward.

    Returns:
        The pairs that are effective at any entry, or one that is not where there are none; at which entries each is one
        of those wanted; how many pairs were tried at each entry: none at one where no interchange can be seen.
    """
    entries = len(interchanges.entries)
    found, tried = torch.zeros(entries, dtype=torch.long), torch.zeros(entries, dtype=torch.long)
    parts, marks = list[Examples](), list[Tensor]()
    void = _void(interchanges, examples_of_rows(rows, LOOKED_AT, sources, vocabulary, seed), batch_size)
    for numbers in rounds(max(1, batch_size // pairs)):
        open_entries = [i for i in range(entries) if found[i] < pairs and i not in void]
        if not open_entries:
            break
        drawn = (examples_of_rows(rows, pairs, sources, vocabulary, _seed_of(seed, number)) for number in numbers)
        tries = joined_examples(
            [_numbered(each, number * pairs, len(rows)) for number, each in zip(numbers, drawn, strict=True)]
        )
        changes = _changes(interchanges, tries, open_entries, batch_size)
        rank = found + changes.long().cumsum(0)
        wanted = changes & (rank <= pairs)
        for i in open_entries:
            done = (rank[:, i] == pairs).nonzero()
            tried[i] += int(done[0]) + 1 if len(done) else len(tries)
        found = found + wanted.sum(0)
        chosen = wanted.any(1).nonzero()[:, 0]
        if len(chosen):
            parts.append(tries.take(chosen))
            marks.append(wanted[chosen])
    if not parts:
        first = examples_of_rows(rows, 1, sources, vocabulary, seed)
        return first, torch.zeros(1, entries, dtype=torch.bool), tried
    return joined_examples(parts), torch.cat(marks), tried


def rounds(most: int) -> Iterator[range]:
    """Yield the numbers of the rounds that are tried at once: as many as there were before, `most` of them at most.

    >>> [len(numbers) for numbers in rounds(17)], [len(numbers) for numbers in rounds(1)] == [1] * TRIES
    ([1, 1, 2, 4, 8, 4], True)
    """
    first = 0
    while first < TRIES:
        numbers = range(first, min(TRIES, first + max(1, min(most, first))))
        yield numbers
        first = numbers.stop


def _seed_of(seed: int, number: int) -> int:
    """Return the seed of the pairs of a round."""
    return seed if number == 0 else seed_from(seed, STREAM, number)


def _void(interchanges: NetworkInterchanges, examples: Examples, batch_size: int) -> list[int]:
    """Return the entries at which no interchange of these pairs can be seen: there none need be looked for.

    Most entries are seen in the first batch, and not looked at again.
    """
    device, void = device_of(interchanges.student), list(range(len(interchanges.entries)))
    with measuring(interchanges):
        for places in batches(len(examples), batch_size):
            if not void:
                break
            base, source = (to_device(each.batch(places), device) for each in (examples.base, examples.source))
            some = replace(
                interchanges,
                entries=tuple(interchanges.entries[i] for i in void),
                draws=tuple(interchanges.draws[i] for i in void),
            )
            seen = some.count(base, source, None, examples.numbers[places]).kept.any(0).tolist()
            void = [i for i, known in zip(void, seen, strict=True) if not known]
    return void


def _changes(
    interchanges: NetworkInterchanges, examples: Examples, entries: Sequence[int], batch_size: int
) -> Bool[Tensor, "pairs entries"]:
    """Return at which entries the interchange of each pair changes the teacher's answer; False at the others."""
    device = device_of(interchanges.student)
    found = torch.zeros(len(examples), len(interchanges.entries), dtype=torch.bool)
    with measuring(interchanges):
        for places in batches(len(examples), batch_size):
            base, source = (to_device(each.batch(places), device) for each in (examples.base, examples.source))
            changed = interchanges.teacher_changes(base, source, examples.numbers[places], entries)
            found[places[:, None], torch.tensor(entries)] = changed.cpu()
    return found


def _numbered(examples: Examples, first: int, rows: int) -> Examples:
    """Return pairs with numbers from `first` on; sources that were made for a pair stay those of that pair alone."""
    sharing = examples.sharing
    made = sharing.source >= rows
    source = torch.where(made, sharing.source + first, sharing.source)
    return replace(examples, sharing=replace(sharing, source=source), numbers=examples.numbers + first)


def joined_examples(parts: Sequence[Examples]) -> Examples:
    """Return the pairs of several, in order."""
    base, source, *clusters = (torch.cat(each) for each in zip(*(_tensors(p.sharing) for p in parts), strict=True))
    sharing, numbers = Sharing(base, source, *clusters), torch.cat([each.numbers for each in parts])
    return Examples(_joined([p.base for p in parts]), _joined([p.source for p in parts]), sharing, numbers)


def _tensors(sharing: Sharing) -> list[Tensor]:
    """Return the tensors of what pairs share, two or four."""
    parts = (sharing.base, sharing.source, sharing.base_clusters, sharing.source_clusters)
    return [each for each in parts if each is not None]


def _joined(parts: Sequence[Rows]) -> Rows:
    """Return the rows of several, in order."""
    first, table = parts[0], {}
    for name in first.columns:
        columns = [part.table[name] for part in parts]
        tensors = [each for each in columns if isinstance(each, Tensor)]
        even = len(tensors) == len(columns) and len({each.shape[1:] for each in tensors}) == 1
        table[name] = torch.cat(tensors) if even else [row for column in columns for row in column]
    return Rows(table, first.pad_id, first.padding_side, first.pads, first.classes)
