"""The causal terms whose headroom is measured: those of the objectives, or of kinds of interchange."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from distill.errors import DistillError
from distill.evaluation.kind_measurement import KindMeasurement
from distill.interchange.kinds import USUAL, Kind, kinds_of
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


def causal_terms(
    objectives: Sequence[Objective], mapped: tuple[Entry, ...], teacher: Any, student: Any
) -> list[Causal]:
    """Return the causal terms among the objectives; one over several kinds of interchange gives one for each.

    Args:
        objectives: all of them.
        mapped: the entries of the mapping.
        teacher, student: the networks, in which the sites of a kind are found.

    Raises:
        DistillError: none of the objectives interchanges, or a network lacks a site.
    """
    found = [each for each in objectives if isinstance(each, DIITO)]
    if not found:
        raise DistillError(
            f"objective={list(objectives)} interchanges nothing, so there is no causal term to measure; use "
            "objective=[KD(2.0), DIITO()]."
        )
    alone = [(one, kind) for each in found for one, kind in _of_one_kind(each)]
    texts = [_text(one) + ("" if kind is None or kind.site is None else f", {kind.site}") for one, kind in alone]
    return [
        Causal(
            text if texts.count(text) == 1 else f"{text} ({number + 1})",
            one,
            mapped if kind is None else kind.entries(mapped, teacher, student),
        )
        for number, (text, (one, kind)) in enumerate(zip(texts, alone, strict=True))
    ]


def _of_one_kind(diito: DIITO) -> Iterator[tuple[DIITO, Kind | None]]:
    """Yield an objective once for each of its kinds, with that kind; itself, where it has one at the mapped places."""
    if not diito.kinds or (len(diito.kinds) == 1 and diito.at is None):
        yield diito, None
        return
    for kind in diito.kinds:
        yield _with_kind(diito, kind), kind


def _with_kind(diito: DIITO, kind: Kind) -> DIITO:
    """Return an objective with the comparison of another one, over interchanges of one kind."""
    match = deepcopy(list(diito.match))
    return DIITO(kind.sources, positions=kind.positions, match=match, detach_source=diito.detach_source)


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
            found.append(Causal(name, _with_kind(own.diito, kind), placed.entries))
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
