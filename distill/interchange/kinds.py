"""Kinds of interchange: at which site of the mapped layers, at which positions, from which sources.

A student that was trained on one kind of interchange may follow its teacher there and nowhere else. So a measurement is
over several kinds, and says which of them were trained on.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from distill.errors import DistillError, checked
from distill.interchange.answer import Answer
from distill.interchange.mapping import Entry
from distill.interchange.positions import Scattered, Span, refuse_no_rule
from distill.interchange.sources import InContext, Shuffle, Sources
from distill.models.inputs import network_of
from interventions import InterventionError, Location, architecture, shown

SIDES = ("teacher", "student")


@checked
@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of interchange: at which site of the mapped layers, at which positions, from which sources.

    Args:
        positions: the rule that draws positions, e.g. `Span(0.3)`; None is all of them.
        site: the site of the mapped layers that is interchanged, e.g. `"attention_heads"`; None keeps the places of
            the mapping as they are.
        dims: the share of the dims of each place that is interchanged, above 0 and up to 1: the first of them, in both
            models. None keeps the dims of the mapping.
        sources: where sources come from: `Shuffle()` (other rows) or `InContext(share)`.

    Raises:
        DistillError: a site that does not exist or belongs to no layer, no share of dims, or what draws no sources.

    >>> Kind(site="mlp_output")
    Kind(Span(share=0.3, consecutive=True, same=None, among='real', most=None), site='mlp_output')
    """

    positions: Any = field(default_factory=lambda: Span(0.3))
    site: str | None = None
    dims: float | None = None
    sources: Sources = field(default_factory=Shuffle)

    def __post_init__(self) -> None:
        if self.site is not None:
            try:
                Location(0, self.site)
            except InterventionError as error:
                raise DistillError(f"Kind(site={self.site!r}) is no site of a layer: {error}") from None
        if self.dims is not None and not 0 < self.dims <= 1:
            raise DistillError(f"Kind(dims={self.dims}) is no share above 0 and up to 1; use e.g. Kind(dims=0.5).")
        refuse_no_rule("Kind", self.positions)
        if isinstance(self.sources, type) or not hasattr(self.sources, "aligned"):
            raise DistillError(
                f"sources={shown(self.sources)} draws no sources; use sources=Shuffle() or InContext(0.3)."
            )

    def __repr__(self) -> str:
        parts = [repr(self.positions)]
        parts += [] if self.site is None else [f"site={self.site!r}"]
        parts += [] if self.dims is None else [f"dims={self.dims}"]
        parts += [] if type(self.sources) is Shuffle else [f"sources={_written(self.sources)}"]
        return f"Kind({', '.join(parts)})"

    def entries(self, mapped: tuple[Entry, ...], teacher: Any, student: Any) -> tuple[Entry, ...]:
        """Return the entries of a mapping with their places at the site of this kind.

        Raises:
            DistillError: a place without a layer, or a side that lacks the site.
        """
        return mapped if self.site is None else at_site(mapped, self.site, teacher, student)


USUAL = "usual"


def usual_kinds() -> dict[str, Kind]:
    """Return the kinds that are measured beside the mapped one where nothing else is requested, by their names."""
    same = Span(0.3, same=True)
    return {
        "one token, same place": Kind(Scattered(1)),
        "two tokens, same places": Kind(Scattered(2)),
        "answering token": Kind(Answer()),
        "attention heads": Kind(same, site="attention_heads"),
        "mlp output": Kind(same, site="mlp_output"),
        "half of the dims": Kind(same, dims=0.5),
        "sources in context": Kind(Span(0.3), sources=InContext(0.3)),
    }


def kinds_of(kinds: Any) -> dict[str, Kind]:
    """Return kinds by their names: those of a dict, the usual ones, or of others what they print.

    Raises:
        DistillError: what is no kind, or two kinds without names that print the same.
    """
    if isinstance(kinds, str) and kinds == USUAL:
        return usual_kinds()
    listed = [] if kinds is None else [kinds] if isinstance(kinds, Kind) else kinds
    if not isinstance(listed, Mapping):
        several = list(listed) if isinstance(listed, list | tuple | set) else [listed]
        listed = {repr(each): each for each in several}
        if len(listed) < len(several):
            raise DistillError(
                f"kinds={shown(several)} holds two kinds of one name, as they print the same; name them: {{'first': "
                "distill.Kind(…), 'second': distill.Kind(…)}."
            )
    if not all(isinstance(name, str) and isinstance(each, Kind) for name, each in listed.items()):
        raise DistillError(
            f"kinds={shown(kinds)} are no kinds of interchange; use kinds='usual', or {{'heads': "
            "distill.Kind(site='attention_heads')}."
        )
    return dict(listed)


def _written(sources: Sources) -> str:
    """Return a rule of sources as text, without the words that it draws from."""
    share = getattr(sources, "share", None)
    return type(sources).__name__ + ("()" if share is None else f"({share})")


def at_site(entries: Iterable[Entry], site: str, teacher: Any, student: Any) -> tuple[Entry, ...]:
    """Return the entries of a mapping with the site of every place replaced, with all its heads and dims.

    Args:
        entries: those of a mapping between two networks, whose places name layers.
        site: one of `interventions.SITES` that layers have.
        teacher, student: the models of the two sides.

    Raises:
        DistillError: a place without a layer, or a side that lacks the site.
    """
    entries = tuple(entries)
    moved = with_site(entries, site)
    for entry, new in zip(entries, moved, strict=True):
        for name, model in zip(SIDES, (teacher, student), strict=True):
            found = architecture(network_of(model))
            for at in getattr(new, name):
                try:
                    found.place(at)
                except InterventionError as error:
                    raise DistillError(f"the {name} has no {site} at {entry}: {error}") from None
    return moved


def with_site(entries: Iterable[Entry], site: str) -> tuple[Entry, ...]:
    """Return the entries with the site of every place replaced, whether or not the models have it.

    Raises:
        DistillError: a place without a layer.
    """
    return tuple(
        replace(entry, **{side: tuple(_at(at, site, side) for at in getattr(entry, side)) for side in SIDES})
        for entry in entries
    )


def _at(at: Location, site: str, side: str) -> Location:
    """Return the location of another site of the same layer."""
    if at.layer is None or at.module is not None or at.operation is not None:
        raise DistillError(
            f"{at} of the {side} belongs to no layer, so it has no {site}; map layers: {{Location(2): Location(1)}}, "
            "or leave the site out."
        )
    return Location(at.layer, site, stack=at.stack)
