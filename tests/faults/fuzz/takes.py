"""What a parameter takes, by kind: of the wrong values those that are right there. All others are refused."""

from tests.faults.fuzz.values import NETWORKS, TENSORS, WRONG

KINDS: dict[str, str] = {
    "flag": "True|False",
    "whole": "0|1|-1|7|numpy int",
    "count": "1|7|numpy int",  # at least 1
    "counter": "0|1|7|numpy int",  # at least 0
    "seed": "0|1|-1|7|numpy int",
    "number": "0|1|-1|7|0.5|1.0|2.5|-0.5|numpy int|numpy float",
    "positive": "1|7|0.5|1.0|2.5|numpy int|numpy float",
    "not negative": "0|1|7|0.5|1.0|2.5|numpy int|numpy float",
    "share": "0|1|0.5|1.0|numpy int|numpy float",
    "share above 0": "1|0.5|1.0|numpy int|numpy float",
    "name": "text|digits|control text|empty text",
    "text": "text|digits|control text|empty text",
    "anything": "|".join(WRONG),
    "tensor": "|".join(TENSORS),
    "network": "|".join(NETWORKS),
    "choice": "",
    "function": "function|raising function|type",
    "draws": "draws",
    "written": "scalar tensor|floats|inf tensor|whole tensor|huge whole tensor|bool tensor|bytes tensor|half tensor",
}
"""Each kind, and the values that it takes, divided by bars."""


def accepted(kind: str) -> set[str]:
    """Return the names of the values that are right for a kind: kinds and values, joined by `|`; `-value` is none."""
    found: set[str] = set()
    for part in kind.split("|"):
        if part in KINDS:
            found |= set(KINDS[part].split("|"))
        elif part.startswith("!"):
            found.discard(part[1:])
        else:
            found.add(part)
    unknown = found - set(WRONG) - {""}
    assert not unknown, unknown
    return found
