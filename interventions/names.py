"""Text that goes out to terminals and pages, without what they would obey instead of show.

Names of classes, files, columns and modules come from elsewhere, and may hold escape sequences that clear the screen,
set its title or write elsewhere on it, marks that turn the direction of the text around, and halves of characters that
cannot be encoded. Each is shown as Python writes it.
"""

import re
from collections.abc import Callable
from functools import wraps
from typing import Any

LONGEST = 60  # name in a picture [characters]
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    r"""A text with control characters, marks of direction and lone surrogates escaped; newlines and tabs stay.

    >>> print(printable("positive\x1b[2J"))
    positive\x1b[2J
    """
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def printed(method: Callable[[Any], str]) -> Callable[[Any], str]:
    """A `__str__` or `__repr__` whose text is printable."""

    @wraps(method)
    def told(self: Any) -> str:
        return printable(method(self))

    return told


def in_one_line(method: Callable[[Any], str]) -> Callable[[Any], str]:
    """A `__str__` whose text is printable and one line: what is printed in it may be many."""

    @wraps(method)
    def told(self: Any) -> str:
        return printable(re.sub(r"\s*\n\s*", " ", method(self)))

    return told


def shown(value: object) -> str:
    """A value as a message names it, in at most 80 characters: tensors and networks by what they are.

    >>> shown("3"), shown(list(range(100)))
    ("'3'", '[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, …')
    """
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is not None and dtype is not None and not isinstance(value, type):
        return f"{type(value).__name__} of {str(dtype).removeprefix('torch.')} {list(shape)}"
    kind = type(value)
    if any(each.__name__ == "Module" for each in kind.__mro__) or kind.__repr__ is object.__repr__:
        return f"<{kind.__name__}>"
    line = printable(" ".join(repr(value).split()))
    return line if len(line) <= 80 else f"{line[:79]}…"


def label(text: object) -> str:
    r"""A name in a picture: printable, on one line that leaves room for the rest, no formula between its dollars.

    >>> print(label("$x$"))
    \$x\$
    """
    line = printable(" ".join(str(text).splitlines()))
    return (line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…").replace("$", r"\$")
