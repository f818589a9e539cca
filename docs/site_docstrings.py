"""Show the examples of docstrings as Python: an extension of griffe, which reads the sources for the reference."""

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"(?:^>>> .*\n?(?:^(?!>>> )\S.*\n?|^\.\.\. .*\n?|^ +.*\n?)*)+", re.MULTILINE)


class Doctests(griffe.Extension):
    """Fences around the examples, which Markdown takes for quotations otherwise."""

    def on_instance(self, *, obj: griffe.Object | griffe.Alias, **kwargs: Any) -> None:
        """Put fences around every example of a docstring."""
        if obj.docstring:
            obj.docstring.value = DOCTEST.sub(
                lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", obj.docstring.value
            )
