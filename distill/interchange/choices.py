"""What a step of DIITO draws: a kind of interchange and an entry of the mapping, at the site of the kind."""

from collections.abc import Iterable, Sequence
from typing import Any

from distill.errors import DistillError
from distill.interchange.kinds import Kind, with_site
from distill.interchange.mapping import Entry
from distill.interchange.positions import refuse_no_rule
from distill.interchange.sources import Sources

Choice = tuple[Kind, Entry]
"""A kind, which draws the positions, and an entry of the mapping at the site of the kind."""


def kinds_of(owner: str, positions: Any, at: str | Sequence[str] | None, sources: Sources) -> tuple[Kind, ...]:
    """Return the kinds of one or several rules of positions at one or several sites, each rule at each site.

    Args:
        owner: takes these settings, for errors.
        positions: a rule, or None for all positions; or a list of them.
        at: a site of layers, or a list of them; None keeps the places of the mapping.
        sources: where sources come from.

    Raises:
        DistillError: an empty list, what is no rule, or a site that layers lack.
    """
    rules = positions if isinstance(positions, list | tuple) else [positions]
    sites = [at] if at is None or isinstance(at, str) else at
    if not rules or not sites:
        empty, way_out = (
            ("at=[]", "at=None for the places of the mapping") if rules else ("positions=[]", "[Span(0.3)]")
        )
        raise DistillError(f"{owner}({empty}) interchanges nothing; use {way_out}.")
    for rule in rules:
        refuse_no_rule(owner, rule)
    return tuple(Kind(rule, site, sources=sources) for rule in rules for site in sites)


def choices_of(kinds: Iterable[Kind], mapping: Sequence[Entry]) -> list[Choice]:
    """Return the kinds, each with every entry of the mapping at its site; whether models have it is not looked at."""
    return [
        (kind, entry) for kind in kinds for entry in (mapping if kind.site is None else with_site(mapping, kind.site))
    ]
