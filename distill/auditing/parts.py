"""The parts of a compressed model, exchanged one by one: which of them compute something else.

Each part of the compressed model runs on what the original computes before it, and what it returns takes the place of
the original's value in the original's run of the same row. So a part is exchanged alone: whatever the parts before it
have changed does not count as its own. Of part P of the compressed model, f the original,

    divergence(P) = mean KL( f(x) ‖ f(x; P's output ← P on the original's inputs) ).

It is exactly 0 for a part that computes the same, however large the differences before it: the layer sensitivity of
ZeroQ (Cai et al. 2020, arXiv:2001.00281, section 3), there for quantized layers. The compressed model's own run
patched into the original's (Meng et al. 2022, arXiv:2202.05262, section 2.1) would show a change at every place that it
reaches; at the outputs of blocks it shows how the difference grows over the depth: `Depth`.

An interchange accuracy cannot take its place: where an interchange does not change the answer of the original, which is
the rule for a single head, any model agrees.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from distill.auditing.answers import Models
from distill.auditing.exchanges import Exchange, Forced, exchanges_of
from distill.auditing.layers import Layers
from distill.auditing.reading import COMPRESSED, ORIGINAL, Reading
from distill.data.rows import Rows, batches
from distill.models.inputs import evaluating, inputs_of
from distill.models.trials import tried
from interventions import Location, Run, interchange, run


@dataclass(frozen=True)
class Part:
    """A part of the compressed model, exchanged alone.

    Attributes:
        name: the place of its output in the original, as text.
        site: what it is, as in `Exchange`.
        layer: the block of the original; None outside of blocks.
        head: the number of a head; None for other parts.
        stack: the stack; None where there is one.
        first: the first block of the original that it stands for, where it stands for several.
        divergence: the mean divergence of the original's answers with this part of the compressed model.
        changed: the share of answers that this changes to another class.
        distance: how far its output is from the original's: the norm of their difference over that of the original's.
    """

    name: str
    site: str
    layer: int | None
    head: int | None
    stack: str | None
    first: int | None
    divergence: float
    changed: float
    distance: float

    @property
    def is_whole(self) -> bool:
        """True for a whole block, or several."""
        return self.site in ("block_output", "dropped blocks")


@dataclass(frozen=True)
class Depth:
    """The divergence of two models after a block: the original continues with the compressed model's own state.

    Attributes:
        stack: the stack; None where there is one.
        layer: the block of the original; None for the answers of the compressed model itself, on the same rows.
        divergence: the mean divergence of the answers.
    """

    stack: str | None
    layer: int | None
    divergence: float


@dataclass(eq=False)
class Sums:
    """Sums of the figures of one part over the batches."""

    divergence: float = 0.0
    changed: float = 0.0
    count: int = 0
    far: float = 0.0
    size: float = 0.0


@dataclass(frozen=True, eq=False)
class Original:
    """The original's run on a batch, into which values of other runs are written.

    Attributes:
        base: the run.
        columns: the columns of the batch, on its device.
        reading: what answers are.
        counted: which answers count.
        answers: those that do.
    """

    base: Run
    columns: Mapping[str, Tensor]
    reading: Reading
    counted: Bool[Tensor, "batch ..."]
    answers: Float[Tensor, "n c"]

    def add(self, sums: Sums, written: Location | None, source: Run, read: Location | None) -> None:
        """Add the figures with the value of another run at one place; without a place, with its answers."""
        sums.count += len(self.answers)
        if written is None or read is None:
            there = self.reading.of(source, self.columns)[self.counted]
            sums.far += float((there - self.answers).double().square().sum())
            sums.size += float(self.answers.double().square().sum())
            self._compare(sums, there)
            return
        here, there = self.base.vectors(written), source.vectors(read)
        far = float((here - there).double().square().sum())
        sums.size, sums.far = sums.size + float(here.double().square().sum()), sums.far + far
        if far != 0:
            after = interchange(
                self.base.model, self.base, source, written, source_model=source.model, source_at={written: read}
            )
            self._compare(sums, self.reading.of(after, self.columns)[self.counted])

    def _compare(self, sums: Sums, answers: Float[Tensor, "n c"]) -> None:
        sums.divergence += float(self.reading.divergence(self.answers, answers).sum())
        sums.changed += float(self.reading.changed(self.answers, answers).sum())


@dataclass(eq=False)
class Runs:
    """The runs of the compressed model on a batch, each made once.

    Attributes:
        model: the compressed model.
        inputs: what it is called with.
        base: the original's run.
        exchanges: what is read in them.
    """

    model: nn.Module
    inputs: object
    base: Run
    exchanges: list[Exchange]
    _made: dict[Forced, Run] = field(default_factory=dict)

    def of(self, forced: Forced | None) -> Run:
        """Return a run with values of the original, or the original's own."""
        if forced is None:
            return self.base
        if forced not in self._made:
            reads = [each.read.whole for each in self.exchanges if each.forced is forced and each.read is not None]
            self._made[forced] = self._run(forced, list(dict.fromkeys(reads)))
        return self._made[forced]

    def _run(self, forced: Forced, reads: list[Location]) -> Run:
        with tried(COMPRESSED, self.model, self.inputs):
            if not forced.writes:
                return run(self.model, self.inputs, reads, resumable=False)
            return interchange(
                self.model, self.inputs, self.base, list(forced.writes), source_model=self.base.model,
                source_at=forced.writes, record=reads,
            )  # fmt: skip


def measure_parts(models: Models, rows: Rows, *, whole: bool = False) -> tuple[tuple[Part, ...], tuple[Depth, ...]]:
    """Measure every part of the compressed model, exchanged alone, and how far both are apart after each block.

    Args:
        models: both models.
        rows: the rows that are run.
        whole: only embeddings, whole blocks and what is after them, and no depths.

    Raises:
        DistillError: the models have other widths at a place, or no part in common.
    """
    with evaluating(models.original), evaluating(models.compressed), torch.no_grad():
        exchanges = exchanges_of(models, rows, whole=whole)
        depths = [] if whole else _depths(models.layers)
        every = [*exchanges, *depths]
        sums = [Sums() for _ in every]
        for chosen in batches(len(rows), models.batch_size):
            here, there = models.columns(rows, chosen)
            base = _run_original(models, here, every)
            runs = Runs(models.compressed, inputs_of(models.compressed, there), base.base, every)
            for total, each in zip(sums, every, strict=True):
                base.add(total, each.written, runs.of(each.forced), each.read)
    parts = tuple(_part(each, total) for each, total in zip(exchanges, sums, strict=False))
    after = zip(depths, sums[len(exchanges) :], strict=True)
    return parts, tuple(_depth(each, total) for each, total in after)


def _run_original(models: Models, columns: Mapping[str, Tensor], exchanges: list[Exchange]) -> Original:
    """Return the original's run on a batch, recorded wherever it is read or written."""
    original, reading = models.original, models.reading
    forced = {each.forced for each in exchanges if each.forced is not None}
    places = [at for each in forced for at in each.writes.values()]
    places += [each.written.whole for each in exchanges if each.written is not None]
    with tried(ORIGINAL, original):
        base = run(original, inputs_of(original, columns), list(dict.fromkeys(places)))
    answers = reading.of(base, columns)
    counted = reading.counted(original, columns, answers)
    return Original(base, columns, reading, counted, answers[counted])


def _depths(layers: tuple[Layers, ...]) -> list[Exchange]:
    """Return the exchanges of the compressed model's own states after each block."""
    plain = Forced({})
    states = (
        Exchange("block_output", Location(i, stack=each.stack), Location(j, stack=each.stack), plain)
        for each in layers
        for i, j in each.pairs
    )
    return [*states, Exchange("answers", None, None, plain)]


def _part(exchange: Exchange, sums: Sums) -> Part:
    at, count = exchange.written, max(1, sums.count)
    name = exchange.site if at is None or exchange.site == "rest of block" else str(at)
    if exchange.site == "rest of block" and at is not None:
        name = f"rest of {at}"
    if exchange.first is not None and at is not None:
        name = f"{name} (blocks {exchange.first} to {at.layer})"
    return Part(
        name, exchange.site, None if at is None else at.layer,
        None if at is None or at.heads is None else at.heads[0], None if at is None else at.stack, exchange.first,
        sums.divergence / count, sums.changed / count, (sums.far / sums.size) ** 0.5 if sums.size else 0.0,
    )  # fmt: skip


def _depth(exchange: Exchange, sums: Sums) -> Depth:
    at = exchange.written
    divergence = sums.divergence / max(1, sums.count)
    return Depth(None, None, divergence) if at is None else Depth(at.stack, at.layer, divergence)
