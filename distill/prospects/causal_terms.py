"""The causal terms whose headroom is measured: those of the objectives, or of kinds of interchange."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from distill.errors import DistillError
from distill.evaluation.kind_measurement import KindMeasurement
from distill.interchange.kinds import USUAL, kinds_of
from distill.interchange.mapping import Entry
from distill.objectives import DIITO, Objective
from interventions import InterventionError


@dataclass(frozen=True, eq=False)
class Causal:
    """A causal term that is measured.

    Attributes:
        name: the kind of its interchanges.
        diito: its objective.
        entries: those of the mapping, at the places of this kind.
    """

    name: str
    diito: DIITO
    entries: tuple[Entry, ...]

    @property
    def compared(self) -> list[str]:
        """The names of the terms that are compared."""
        named = [each.about.terms if each.about is not None else (type(each).__name__,) for each in self.diito.match]
        return [name for terms in named for name in terms]


def causal_terms(objectives: Sequence[Objective], mapped: tuple[Entry, ...]) -> list[Causal]:
    """Return the causal terms among the objectives.

    Raises:
        DistillError: none of the objectives interchanges.
    """
    found = [each for each in objectives if isinstance(each, DIITO)]
    if not found:
        raise DistillError(
            f"objective={list(objectives)} interchanges nothing, so there is no causal term to measure; use "
            "objective=[KD(2.0), DIITO()]."
        )
    texts = [_text(each) for each in found]
    return [
        Causal(text if texts.count(text) == 1 else f"{text} ({number + 1})", each, mapped)
        for number, (text, each) in enumerate(zip(texts, found, strict=True))
    ]


def terms_beside(own: Causal, kinds: Any, measurement: KindMeasurement) -> tuple[list[Causal], dict[str, str]]:
    """Return the causal terms of other kinds of interchange, and why some of the usual ones are not there.

    Args:
        own: a causal term, whose comparison they take.
        kinds: as `interchange_accuracy` takes them.
        measurement: finds their places in the two networks.

    Raises:
        DistillError: kinds that are none, or one of the user's that these networks do not have.
    """
    found, missing = list[Causal](), dict[str, str]()
    for name, kind in kinds_of(kinds).items():
        try:
            placed = measurement.place(name, kind)
            reason = measurement.why_not(placed)
        except (DistillError, InterventionError) as error:
            reason = str(error)
        if not reason:
            match = deepcopy(list(own.diito.match))
            diito = DIITO(kind.sources, positions=kind.positions, match=match, detach_source=own.diito.detach_source)
            found.append(Causal(name, diito, placed.entries))
        elif kinds == USUAL:
            missing[name] = reason
        else:
            raise DistillError(f"kind {name!r}: {reason}")
    return found, missing


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
