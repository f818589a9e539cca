"""The causal terms whose headroom is measured: those of the objectives, or of kinds of interchange."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from distill.errors import DistillError
from distill.interchange.kinds import Kind
from distill.interchange.mapping import Entry
from distill.objectives import DIITO, Objective


@dataclass(frozen=True, eq=False)
class Causal:
    """A causal term that is measured: its name, its objective, and the site of the mapped layers, if it moves them."""

    name: str
    diito: DIITO
    kind: Kind | None = None

    @property
    def compared(self) -> list[str]:
        """The names of the terms that are compared."""
        named = [each.about.terms if each.about is not None else (type(each).__name__,) for each in self.diito.match]
        return [name for terms in named for name in terms]

    def entries(self, mapped: tuple[Entry, ...], teacher: Any, student: Any) -> tuple[Entry, ...]:
        """Return the entries of a mapping at the sites of this kind."""
        return mapped if self.kind is None else self.kind.entries(mapped, teacher, student)


def causal_terms(objectives: Sequence[Objective], kinds: Mapping[str, Kind] | None) -> list[Causal]:
    """Return the causal terms among the objectives, or of these kinds of interchange.

    Raises:
        DistillError: none of the objectives interchanges, or there are no kinds.
    """
    found = [each for each in objectives if isinstance(each, DIITO)]
    if not found:
        raise DistillError(
            f"objective={list(objectives)} interchanges nothing, so there is no causal term to measure; use "
            "objective=[KD(2.0), DIITO()]."
        )
    if kinds is None:
        texts = [_text(each) for each in found]
        return [
            Causal(text if texts.count(text) == 1 else f"{text} ({number + 1})", each)
            for number, (text, each) in enumerate(zip(texts, found, strict=True))
        ]
    if not kinds:
        raise DistillError("kinds={} names no kind of interchange; leave it out, or use kinds={'heads': Kind(site=…)}.")
    part = next((name for name, each in kinds.items() if each.dims is not None), None)
    if part is not None:
        raise DistillError(
            f"kinds={{{part!r}: {kinds[part]}}} takes a share of the dims, which headroom does not cut; map them "
            "instead: mapping={Location(2, dims=range(0, 32)): Location(1, dims=range(0, 32))}."
        )
    first = found[0]
    return [
        Causal(
            name,
            DIITO(each.sources, positions=each.positions, match=deepcopy(list(first.match)),
                  detach_source=first.detach_source),
            each,
        )
        for name, each in kinds.items()
    ]  # fmt: skip


def _text(diito: DIITO) -> str:
    """Return the kind of interchange of an objective as text: operator, sources and positions, where not the usual."""
    parts = [] if diito.op.needs_source else [_written(diito.op)]
    parts += [] if diito.sources is None else [_written(diito.sources)]
    return ", ".join([*parts, "all positions" if diito.positions is None else _written(diito.positions)])


def _written(rule: Any) -> str:
    """Return a rule as code, with its share and those other settings that are numbers or texts and not the usual.

    >>> import torch
    >>> from distill import InContext, Span
    >>> _written(Span(0.3, consecutive=False)), _written(InContext(words=torch.arange(3)))
    ('Span(0.3, consecutive=False)', 'InContext(0.3)')
    """
    if not is_dataclass(rule):
        return repr(rule)
    settings = []
    for each in fields(rule):
        value = getattr(rule, each.name)
        if each.name in ("share", "sigma", "count"):
            settings.append(str(value))
        elif isinstance(value, bool | int | float | str) and value != each.default:
            settings.append(f"{each.name}={value!r}")
    return f"{type(rule).__name__}({', '.join(settings)})"
