"""The names of classes, and which output of a model each class of a data set corresponds to.

A data set numbers its classes in one order and a model its outputs in another, which `config.id2label` states. Labels
are matched with these names exactly, else regardless of case, else as whole numbers, which are the model's indices.
"""

import re
from collections.abc import Iterable, Sequence
from unicodedata import normalize

from distill.errors import DistillError

SHOWN = 30
WHOLE = re.compile(r"([+-]?\d+)(\.0*)?")
PLACEHOLDER = re.compile(r"(?:(?:label|class)[ _-]?)?(\d+)", re.IGNORECASE)


class Ranked(tuple[str, ...]):
    """Names of classes whose numbers are only their places in sorted order, as those of the labels of a file."""

    __slots__ = ()


class Stated(tuple[str, ...]):
    """Names of classes in the order of a model's outputs, as the user stated it."""

    __slots__ = ()


def stated(classes: Sequence[str]) -> Stated:
    """Return the names that a user stated, in the order of a model's outputs, after a check.

    Raises:
        DistillError: fewer than two names, a name twice, or a text instead of a list.
    """
    found = Stated() if isinstance(classes, str) else Stated(str(each) for each in classes)
    if len(found) < 2 or len(set(found)) < len(found):
        raise DistillError(
            f"classes={classes!r} does not say which class is which; give each name once, in the order of the model's "
            "outputs, e.g. classes=('negative', 'positive'), or --classes negative,positive."
        )
    return found


def ranked(labels: Iterable[str]) -> Ranked:
    """Return the labels of a data set, each once, in sorted order.

    Whole numbers are sorted by value, also those in LABEL_0, LABEL_1, ….

    >>> ranked(["10", "9", "9"]), ranked(["b", "10", "a"]), ranked(["class 10", "class 9"])
    (('9', '10'), ('10', 'a', 'b'), ('class 9', 'class 10'))
    """
    found = sorted(set(labels))
    numbers = placeholders(found)
    return Ranked(found if numbers is None else sorted(found, key=dict(zip(found, numbers, strict=True)).__getitem__))


def are_names(names: Sequence[str]) -> bool:
    """Return whether the names of classes are more than their numbers.

    >>> are_names(["LABEL_0", "LABEL_1"]), are_names(["0", "1"]), are_names(["1", "0"]), are_names(["no", "yes"])
    (False, False, True, True)
    """
    found = [PLACEHOLDER.fullmatch(name.strip()) for name in names]
    return any(match is None or int(match[1]) != number for number, match in enumerate(found))


def whole_numbers(labels: Sequence[str]) -> list[int] | None:
    """Return the labels as whole numbers; None if any label is not one.

    >>> whole_numbers(["01", "2.0"]), whole_numbers(["1", "one"])
    ([1, 2], None)
    """
    found = [WHOLE.fullmatch(label.strip()) for label in labels]
    return None if not all(found) else [int(match[1]) for match in found if match is not None]


def placeholders(labels: Sequence[str]) -> list[int] | None:
    """Return the numbers of labels such as "1", "LABEL_1" or "class 1"; None if any label is another text.

    >>> placeholders(["LABEL_1", "label_0"]), placeholders(["2", "-1"]), placeholders(["LABEL_0", "good"])
    ([1, 0], [2, -1], None)
    """
    numbers = whole_numbers(labels)
    if numbers is not None:
        return numbers
    found = [PLACEHOLDER.fullmatch(label.strip()) for label in labels]
    return None if not all(found) else [int(match[1]) for match in found if match is not None]


def matched(labels: Sequence[str], names: Sequence[str], whose: str = "the model") -> tuple[int, ...]:
    """Return the number of each label among the names: by its exact text, regardless of case, or as a whole number.

    Args:
        labels: the labels of a data set, each once.
        names: the names of the classes of a model, in the order of its outputs.
        whose: the owner of the names, for errors.

    Raises:
        DistillError: a label that matches no name, or several.

    >>> matched(["positive", "negative"], ["NEGATIVE", "POSITIVE"]), matched(["2", "0"], ["a", "b", "c"])
    ((1, 0), (2, 0))
    """
    known: set[str] = set()
    for form in (str, folded, _number):
        places: dict[str, list[int]] = {}
        for number, name in enumerate(names):
            places.setdefault(form(name), []).append(number)
        found = [places.get(form(label), []) for label in labels]
        if all(found):
            _refuse_several(labels, names, found, whose)
            return tuple(each[0] for each in found)
        known |= {label for label, each in zip(labels, found, strict=True) if each}
    numbers = whole_numbers(labels)
    if numbers is None or known:
        lost = [label for label in labels if label not in known]
        raise DistillError(_describe_mismatch(labels, names, whose, f"{listed(lost)} {_is(lost)} none of them"))
    outside = [number for number in numbers if not 0 <= number < len(names)]
    if outside:
        why = f"{outside[0]} is neither a name nor an index (0 to {len(names) - 1})"
        raise DistillError(_describe_mismatch(labels, names, whose, why))
    if _are_numbered_otherwise(names):
        why = "as indices they are not the numbers in the names"
        raise DistillError(_describe_mismatch(labels, names, whose, why))
    return tuple(numbers)


def check_stated(classes: Stated, names: Sequence[str]) -> None:
    """Raise DistillError if the order that a user stated contradicts the names of a model.

    Raises:
        DistillError: another number of classes, or a name that the model has at another place.
    """
    number_of = {folded(name): number for number, name in enumerate(names)}
    moved = [each for i, each in enumerate(classes) if are_names(names) and number_of.get(folded(each), i) != i]
    if len(classes) != len(names) or moved:
        why = f"{moved[0]!r} has another number there" if moved else f"{len(classes)} and {len(names)} classes"
        raise DistillError(
            f"classes={listed(classes)} was given and the classes of the model are {listed(names)}: {why}; leave "
            "classes out, or name them in the order of the model's outputs."
        )


def folded(name: str) -> str:
    """Return a name in lower case and without surrounding spaces, for comparisons."""
    return normalize("NFKC", name).strip().casefold()


def _number(name: str) -> str:
    """Return a whole number in one spelling, so that "01" and "1" are one class; any other text folded."""
    numbers = whole_numbers([name])
    return folded(name) if numbers is None else str(numbers[0])


def _are_numbered_otherwise(names: Sequence[str]) -> bool:
    """Return whether the names hold numbers that are not their places, as "1 star", "2 stars" and so on."""
    found = [re.findall(r"\d+", name) for name in names]
    numbers = [int(each[0]) for each in found if len(each) == 1]
    return len(set(numbers)) == len(names) and numbers != list(range(len(names)))


def _refuse_several(labels: Sequence[str], names: Sequence[str], found: Sequence[Sequence[int]], whose: str) -> None:
    several = next(((label, each) for label, each in zip(labels, found, strict=True) if len(each) > 1), None)
    if several is not None:
        label, places = several
        why = f"{label!r} may be each of {' and '.join(map(str, places))}"
        raise DistillError(_describe_mismatch(labels, names, whose, why))


def _describe_mismatch(labels: Sequence[str], names: Sequence[str], whose: str, why: str) -> str:
    return (
        f"the labels of the data are {listed(labels)} and the classes of {whose} {listed(names)}: {why}; rename one "
        "side (model.config.id2label), or name the labels in the order of the model's outputs: "
        "distill.tasks.load(…, classes=[…]), Rows.of(…, classes=[…]) or --classes a,b."
    )


def listed(names: Sequence[str]) -> str:
    """Return the names with commas between, at most the first 30."""
    more = f", … ({len(names)})" if len(names) > SHOWN else ""
    return ", ".join(map(str, names[:SHOWN])) + more


def _is(labels: Sequence[str]) -> str:
    return "is" if len(labels) == 1 else "are"
