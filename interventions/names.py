"""Text for terminals and pages, with control characters escaped.

Names of classes, files, columns and modules come from outside. They may hold escape sequences that clear the screen or
set its title, marks that reverse the direction of the text, and lone surrogates that cannot be encoded. All of these
are printed as Python writes them in a string literal.
"""

import re
from collections.abc import Callable
from functools import wraps
from typing import Any

LONGEST = 60  # name in a picture [characters]
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    r"""Return a text with control characters, direction marks and lone surrogates escaped; newlines and tabs stay.

    >>> print(printable("positive\x1b[2J"))
    positive\x1b[2J
    """
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def printed(method: Callable[[Any], str]) -> Callable[[Any], str]:
    r"""Return a `__str__` or `__repr__` whose text is printable.

    >>> class Name(str):
    ...     __repr__ = printed(str.__str__)
    >>> Name("positive\x1b[2J")
    positive\x1b[2J
    """

    @wraps(method)
    def text_of(self: Any) -> str:
        return printable(method(self))

    return text_of


def in_one_line(method: Callable[[Any], str]) -> Callable[[Any], str]:
    r"""Return a `__str__` whose text is printable and on one line, for messages that quote texts of several lines.

    >>> class Message(str):
    ...     __str__ = in_one_line(str.__str__)
    >>> print(Message("a tensor\n   of NaN"))
    a tensor of NaN
    """

    @wraps(method)
    def text_of(self: Any) -> str:
        return printable(re.sub(r"\s*\n\s*", " ", method(self)))

    return text_of


def shown(value: object) -> str:
    """Return a value as an error quotes it, in at most 80 characters; a tensor by dtype and shape, a network by class.

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
    r"""Return a name as a picture shows it: one printable line of at most 60 characters, dollars not read as formulas.

    >>> print(label("$x$"))
    \$x\$
    """
    line = printable(" ".join(str(text).splitlines()))
    return (line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…").replace("$", r"\$")


def token_label(token: object) -> str:
    """Return a token as a picture shows it: the marks of tokenizers for spaces and line ends as these, in one line.

    "▁" of SentencePiece and "Ġ" of byte-level BPE are a space, "Ċ" and a line end are "↵".

    >>> token_label("▁cat"), token_label("Ġcat"), token_label("cat")
    (' cat', ' cat', 'cat')
    """
    return label(str(token).replace("▁", " ").replace("Ġ", " ").replace("Ċ", "↵").replace("\n", "↵"))
