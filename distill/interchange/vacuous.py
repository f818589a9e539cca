"""Vacuous interchanges, which say nothing about what a network computes.

Two kinds are vacuous. If a write replaces everything that the output depends on, the network answers as to the source,
whatever the base; if it changes nothing that the output depends on, the network answers as to the base. The first kind
is found by trial: a place is the whole state of a network if a swap of it, at every position, gives the answers to the
source. So the output of a block is the whole state, and the output of its feed-forward part is not, because the
residual stream passes it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from distill.teachers.served import ServedRun
from distill.teachers.verbs import interchanged
from distill.teachers.visible_positions import mix_logits, nonzero_positions
from interventions import Add, Location, Run, architecture, interchange, intervene, run

Places = tuple[Location, ...]
CLOSE = 1e-4
"""Two answers count as equal if they differ by less than this share of the difference between base and source."""


@dataclass(frozen=True, eq=False)
class Answers:
    """The answers of one model to a base, to its source, and after an interchange of the two.

    Attributes:
        base, source, after: the three runs.
        columns: in token models, for each token of the base the column of the source's token of the same number, −1 if
            the source has none; None with one answer an example.
        counted: which predictions are measured, `[batch]` or `[batch, token]`.
    """

    base: Run
    source: Run
    after: Run
    columns: Int[Tensor, "batch token"] | None
    counted: Bool[Tensor, "batch ..."]

    def changed(self) -> Bool[Tensor, " batch"]:
        """Return whether the interchange changed any bit of the measured predictions."""
        return _any((self.after.logits != self.base.logits).any(-1) & self.counted)

    def are_the_sources(self) -> Bool[Tensor, " batch"]:
        """Return whether all measured predictions are those to the source, and differ from those to the base."""
        after, base, source = (each.logits for each in (self.after, self.base, self.source))
        if self.columns is None:
            return arrived(after, base, source)
        known = self.columns.clamp(min=0)
        right = (after.argmax(-1) == source.argmax(-1).gather(1, known)) & (self.columns >= 0)
        found = ~_any(~right & self.counted) & _any(self.counted)
        rows = found.nonzero()[:, 0]  # few, if any: their logits may be wide
        if len(rows):
            wide = rearrange(known[rows], "row token -> row token 1").expand(-1, -1, source.shape[-1])
            counted = self.counted[rows]
            found[rows] = arrived(after[rows], base[rows], source[rows].gather(1, wide), counted)
        return found


def arrived(
    after: Float[Tensor, "batch ... classes"],
    base: Float[Tensor, "batch ... classes"],
    source: Float[Tensor, "batch ... classes"],
    counted: Bool[Tensor, "batch ..."] | None = None,
) -> Bool[Tensor, " batch"]:
    """Return whether answers equal those to the source, up to rounding, and those to the base differ."""

    def largest(values: Tensor) -> Tensor:
        values = values.abs().float().amax(-1)
        return (values if counted is None else values.masked_fill(~counted, 0)).flatten(1).amax(1)

    after, base, source = (each if each.ndim > 2 else each[:, None] for each in (after, base, source))
    way = largest(base - source)
    allowed = CLOSE * way + 4 * torch.finfo(source.dtype).eps * largest(source)
    return (largest(after - source) <= allowed) & (way > allowed)


@dataclass(eq=False)
class Whole:
    """A trial on a few examples of which places are the whole state of a model.

    Attributes:
        base, source: runs on examples without padding, so that they differ in their tokens only.
    """

    base: Run
    source: Run
    _found: dict[Places, bool] = field(default_factory=dict)

    def holds(self, places: Places) -> bool:
        """Return whether a swap of these places, at every position, gives the answers to the source."""
        if places not in self._found:
            self._found[places] = self._gives_source(places)
        return self._found[places]

    def _gives_source(self, places: Places) -> bool:
        base, source = self.base.logits, self.source.logits
        if base.shape != source.shape:
            return False
        after = interchanged(self.base, self.source, places).logits
        there, moved = arrived(after, base, source), (base != source).flatten(1).any(1)
        return bool(there.any()) and bool((there | ~moved).all())

    def replaced(
        self, places: Places, seen: Mapping[Location, Tensor], chosen: Bool[Tensor, "batch position"] | None
    ) -> Bool[Tensor, " batch"]:
        """Return whether a write replaces everything of the base that the output depends on.

        Args:
            places: the locations that are written together.
            seen: for each, the positions that the output depends on, as `visible` finds them.
            chosen: the positions written, None for all of them.
        """
        groups = self._modules(places)
        full = []
        for group in groups:
            mask = torch.stack([seen[at] for at in group]).any(0)
            full.append(~(mask & ~chosen.to(mask.device)).any(1) if chosen is not None else torch.ones_like(mask[:, 0]))
        found = torch.zeros_like(full[0])
        for group, rows in zip(groups, full, strict=True):
            if bool(rows.any()) and self.holds(group):
                found = found | rows
        together = torch.stack(full).all(0) & ~found
        if len(groups) > 1 and bool(together.any()) and self.holds(places):
            found = found | together
        return found

    def _modules(self, places: Places) -> list[Places]:
        """Return the places grouped by module, as the parts of one may cover it together."""
        groups: dict[tuple[str, str], Places] = {}
        for at in places:
            place = architecture(self.base.model).place(at)
            key = (place.path, place.io) if not place.operations else (str(at.whole), "")
            groups[key] = (*groups.get(key, ()), at)
        return list(groups.values())


def unpadded(*batches: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return the batches with their columns of tokens cut to the shortest row of all, so that none has padding."""
    names = [name for name, mask in batches[0].items() if name.endswith("attention_mask") and mask.ndim == 2]
    cut = [dict(batch) for batch in batches]
    for name in names:
        masks = [batch[name].bool() for batch in batches]
        length, prefix = min(int(mask.sum(1).min()) for mask in masks), name.removesuffix("attention_mask")
        if not length or all(bool(mask.all()) and mask.shape[1] == length for mask in masks):
            continue
        if all(bool(mask[:, :length].all()) for mask in masks):
            part = slice(0, length)
        elif all(bool(mask[:, -length:].all()) for mask in masks):
            part = slice(-length, None)
        else:
            continue
        for batch, columns, mask in zip(batches, cut, masks, strict=True):
            same = (each for each, column in batch.items() if column.shape[:2] == mask.shape)
            columns |= {each: batch[each][:, part] for each in same if _side(each, names) == prefix}
    return cut


def _side(column: str, masks: Sequence[str]) -> str:
    """Return the prefix of the mask that a column belongs to, by the beginning of its name."""
    sides = [mask.removesuffix("attention_mask") for mask in masks]
    return max((side for side in sides if column.startswith(side)), key=len, default="")


def visible(base: Run, places: Sequence[Location], weights: Tensor) -> dict[Location, Bool[Tensor, "batch _"]]:
    """Return which positions of each place the output depends on, `[batch, position]` (`[batch, 1]` without positions).

    A position that the output does not depend on has a gradient of exactly 0. Through quantized modules of torch no
    gradient flows: of their networks all real positions count as visible.

    Args:
        base: the run.
        places: the locations.
        weights: the weight of each prediction, `[batch]` or `[batch, token]`; 0 leaves it out.
    """
    if isinstance(base, ServedRun) and base.teacher is not None:
        return dict(zip(places, base.teacher.seen(base, places, weights), strict=True))
    if _is_quantized(base.model):
        return {at: _real_positions(base, at) for at in places}
    probes = {at: torch.zeros_like(base.vectors(at)).requires_grad_() for at in places}
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
        writes = {at: Add(probe) for at, probe in probes.items()}
        if base.recording is None:
            with intervene(base.model, writes):
                logits = run(base.model, base.inputs, resumable=False).logits
        else:  # no block before the first place runs again
            logits = interchange(base.model, base, None, writes).logits
        gradients = torch.autograd.grad(mix_logits(logits, weights), list(probes.values()), allow_unused=True)
    return {
        at: nonzero_positions(probe, gradient) for (at, probe), gradient in zip(probes.items(), gradients, strict=True)
    }


def _is_quantized(network: nn.Module) -> bool:
    """Return whether a network has a quantized module of torch, whose kernels have no derivative."""
    return any(type(each).__module__.startswith("torch.ao.nn.quantized") for each in network.modules())


def _real_positions(base: Run, at: Location) -> Bool[Tensor, "batch _"]:
    """Return which positions of a place are no padding, `[batch, position]` (`[batch, 1]` without positions)."""
    vectors = base.vectors(at)
    rows, width = len(vectors), vectors.shape[1] if vectors.ndim > 2 else 1
    every = torch.ones(rows, width, dtype=torch.bool, device=vectors.device)
    if vectors.ndim < 3 or not isinstance(base.inputs, Mapping):
        return every
    real = architecture(base.model).place(at).real(base.inputs, rows, width)
    return every if real is None else real.to(vectors.device)


def touched(
    places: Places, seen: Mapping[Location, Tensor], chosen: Bool[Tensor, "batch position"] | None
) -> Bool[Tensor, " batch"]:
    """Return whether a write reaches a position that the output depends on."""
    masks = [seen[at] if chosen is None else seen[at] & chosen.to(seen[at].device) for at in places]
    return torch.stack([mask.any(1) for mask in masks]).any(0)


def _any(mask: Bool[Tensor, "batch ..."]) -> Bool[Tensor, " batch"]:
    return mask if mask.ndim == 1 else mask.flatten(1).any(1)
