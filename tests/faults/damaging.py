"""Ways to damage a file: flipped bits, lost ends, edited JSON, other content, nothing at all."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

Damage = Callable[[Path], None]


def flips(file: Path, count: int, draw: random.Random) -> Iterator[tuple[str, Damage]]:
    """One bit at each of so many places."""
    size = file.stat().st_size
    for place in sorted(draw.sample(range(size), min(count, size))):
        bit = draw.randrange(8)

        def flip(path: Path, place: int = place, bit: int = bit) -> None:
            content = bytearray(path.read_bytes())
            content[place] ^= 1 << bit
            path.write_bytes(bytes(content))

        yield f"bit {bit} of byte {place}", flip


def ends(file: Path) -> Iterator[tuple[str, Damage]]:
    """The end of a file is lost, or all of it, or something else is there."""
    size = file.stat().st_size
    for kept in sorted({0, 1, 7, size // 2, size - 1}):
        yield f"{kept} of {size} bytes", lambda path, kept=kept: path.write_bytes(path.read_bytes()[:kept])
    yield "zeros", lambda path: path.write_bytes(bytes(path.stat().st_size))
    yield "another text", lambda path: path.write_text("nothing of that kind\n")
    yield "more at its end", lambda path: path.write_bytes(path.read_bytes() + b"\0")


def edits(file: Path) -> Iterator[tuple[str, Damage]]:
    """JSON of another content, as a hand leaves it."""
    if file.suffix != ".json":
        return
    yield "an empty object", lambda path: path.write_text("{}")
    yield "a list", lambda path: path.write_text("[]")
    yield "null", lambda path: path.write_text("null")
    told = json.loads(file.read_text())
    for name in told:
        for what, value in (("removed", None), ("a number", 7), ("a text", "seven"), ("a list", [7])):
            if told[name] != value:
                yield f"{name} {what}", lambda path, name=name, value=value: _edit(path, name, value)


def _edit(path: Path, name: str, value: object) -> None:
    told = json.loads(path.read_text())
    if value is None:
        del told[name]
    else:
        told[name] = value
    path.write_text(json.dumps(told))


def damages(file: Path, count: int, draw: random.Random) -> list[tuple[str, Damage]]:
    """All of these."""
    return [*flips(file, count, draw), *ends(file), *edits(file), ("gone", lambda path: path.unlink())]
