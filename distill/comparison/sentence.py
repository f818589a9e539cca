"""What a comparison found, as one sentence of plain English that follows from its figures.

"More" and "less" stand where an interval excludes 0. Where it holds 0 the sentence says that there is no difference
that this sample can show, with the interval, which says what may still be there.
"""

from collections.abc import Mapping, Sequence
from math import isfinite

from distill.comparison.compared_figure import (
    LABELS,
    LOWER_IS_NEARER,
    MEANS,
    OVERALL,
    TRAINED,
    UNTRAINED,
    WITHOUT,
    ComparedFigure,
    group_of,
)
from distill.statistics.intervals import Estimate

MORE, LESS, NONE, SAME = "more", "less", "none", "same"
UNSEEN = "no difference that this sample can show"
BETWEEN = "between"
MOST_DIGITS = 6


def verdict(figure: str, estimate: Estimate) -> str:
    """Return whether a difference says "more" (accurate, or like the teacher), "less", "none", or "same", exactly 0.

    Args:
        figure: its name; of some the lower one is nearer to the teacher.
        estimate: the difference.
    """
    low, high = (-estimate.high, -estimate.low) if figure in LOWER_IS_NEARER else (estimate.low, estimate.high)
    if low == high == 0:
        return SAME
    return MORE if low > 0 else LESS if high < 0 else NONE


def written(estimate: Estimate, digits: int, scale: float = 1.0) -> tuple[str, str]:
    """Return a difference and its interval as texts with signs, and with as many digits as their signs need.

    >>> written(Estimate(0.0123, 0.0004, 0.0242), 1, scale=100)
    ('+1.23', '[+0.04, +2.42]')
    """
    values = [scale * each for each in (estimate.value, estimate.low, estimate.high)]
    while digits < MOST_DIGITS and any(each and isfinite(each) and not float(f"{each:.{digits}f}") for each in values):
        digits += 1
    value, low, high = (f"{each:+.{digits}f}" if float(f"{each:.{digits}f}") else f"{0:.{digits}f}" for each in values)
    return value, f"[{low}, {high}]"


def seeds_of(first: int, second: int) -> str:
    """Return over how many runs of two students a sentence is, as its beginning; empty for one each."""
    if first == second:
        return f"Over {first} seeds, " if first > 1 else ""
    return f"Over {second} against {first} seeds, "


def sentence_of(figures: Sequence[ComparedFigure], first: str, second: str, beginning: str = "") -> str:
    """Return what was found of a student beside the first one.

    Args:
        figures: those of the comparison.
        first, second: the names of the students.
        beginning: of the sentence.
    """
    overall = [each for each in figures if each.entry == OVERALL]
    found = [each for each in overall if each.student == second and each.difference is not None]
    groups = {
        kind: group_of(each.trained for each in overall if each.kind == kind and each.student in (first, second))
        for kind in dict.fromkeys(each.kind for each in found)
    }
    answers, named = _answers(found, first, second)
    subject, link = ("", " and ") if named else (f"{second} ", "; " if answers else "")
    if not beginning and answers.startswith(BETWEEN):
        answers = BETWEEN.capitalize() + answers.removeprefix(BETWEEN)
    return f"{beginning}{answers}{link}{subject}{_computes(found, groups)}."


def _answers(found: Sequence[ComparedFigure], first: str, second: str) -> tuple[str, bool]:
    """Return the clause about the answers to rows, and whether the student is its subject."""
    rows = {each.figure: each for each in found if each.kind == WITHOUT}
    name = "accuracy" if "accuracy" in rows else "agreement"
    if name not in rows:
        return "", False
    estimate = _difference(rows[name])
    value, interval = written(estimate, 1, 100)
    said = verdict(name, estimate)
    if said == NONE:
        about = "in accuracy" if name == "accuracy" else "in agreement with the teacher"
        return f"{BETWEEN} {second} and {first} there is {UNSEEN} {about} ({value} points {interval})", False
    if said == SAME:
        as_first = "is exactly as accurate" if name == "accuracy" else "agrees with the teacher exactly as often"
        return f"{second} {as_first} as {first}", True
    points = f"{value.lstrip('+-')} points"
    if name == "accuracy":
        return f"{second} is {points} {said} accurate than {first} {interval}", True
    return f"{second} answers as the teacher does on {points} {said} of the bases than {first} {interval}", True


def _computes(found: Sequence[ComparedFigure], groups: Mapping[str, str]) -> str:
    """Return the clause about how the student computes, on kinds that were trained on before others.

    Args:
        found: the figures of the student.
        groups: whether each kind was trained on, as the name of the mean of all like it.
    """
    name = "effective" if any(each.figure == "effective" for each in found) else "error"
    kinds = [each for each in found if each.figure == name]
    means = {each.kind: each for each in kinds if each.kind in MEANS}
    if not means:
        return "cannot be said to compute more or less like the teacher, as no interchange changes the teacher's answer"
    clauses = list[str]()
    for group in (each for each in MEANS if each in means):
        own = [each for each in kinds if each.kind not in MEANS and groups[each.kind] == group]
        said, where = verdict(name, _difference(means[group])), _where(group, len(own), TRAINED in means)
        value = " ".join(written(_difference(means[group]), 3))
        clause = _first(said, where, f"{LABELS[name]} {value}") if not clauses else _next(said, where, value)
        clauses.append(clause + _exceptions(name, own, said))
    return "; ".join(clauses)


def _first(said: str, where: str, figure: str) -> str:
    """Return the clause about the first kinds."""
    if said == SAME:
        return f"computes exactly as much like the teacher {where}"
    if said == NONE:
        return f"shows {UNSEEN} in how it computes {where}: {figure}"
    return f"computes {said} like the teacher {where}: {figure}"


def _next(said: str, where: str, value: str) -> str:
    """Return the clause about further kinds."""
    return f"{where} {'exactly as much' if said == SAME else f'{UNSEEN if said == NONE else said}: {value}'}"


def _where(group: str, count: int, beside: bool) -> str:
    """Return on which kinds a mean is, as text.

    Args:
        group: the name of the mean.
        count: of how many kinds it is.
        beside: whether kinds that were trained on are there.
    """
    if group == TRAINED:
        return "on the kind that was trained" if count == 1 else f"on average over the {count} kinds that were trained"
    if group == UNTRAINED and beside:
        return "on the other kind" if count == 1 else f"on average over the {count} others"
    untrained = ", which was not trained" if count == 1 else ", none of which was trained"
    kinds = (
        "on the kind of interchange that was measured"
        if count == 1
        else f"on average over {count} kinds of interchange"
    )
    return kinds + (untrained if group == UNTRAINED else "")


def _exceptions(name: str, kinds: Sequence[ComparedFigure], said: str) -> str:
    """Return which kinds say something else than their mean, in brackets; empty if none does."""
    if len(kinds) < 2:
        return ""
    texts = {MORE: "more", LESS: "less", NONE: "no difference shown", SAME: "exactly as much"}
    parts = []
    for other, text in texts.items():
        listed = [each.kind for each in kinds if verdict(name, _difference(each)) == other != said]
        parts += [f"{text}: {', '.join(listed)}"] if listed else []
    return f" ({'; '.join(parts)})" if parts else ""


def _difference(found: ComparedFigure) -> Estimate:
    assert found.difference is not None
    return found.difference.estimate
