"""Boolean trees as causal models: a formula over bits, in which each gate is a variable."""

from collections.abc import Callable, Sequence
from inspect import Parameter, Signature

import torch
from torch import Tensor

from distill.causal.model import CausalModel
from distill.errors import DistillError, checked

DEEPEST = 16
"""The most levels: 16 have 65,536 bits."""
GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "and": lambda left, right: left & right,
    "or": lambda left, right: left | right,
    "xor": lambda left, right: left ^ right,
    "nand": lambda left, right: ~(left & right),
    "nor": lambda left, right: ~(left | right),
    "equal": lambda left, right: left == right,
}


@checked
def boolean_tree(depth: int = 2, gates: Sequence[str] = ("and", "or", "xor"), seed: int = 0) -> CausalModel:
    """Return the causal model of a full binary tree of gates over the bits x0, x1, ….

    The gate at the root is `answer`, those below are `left` and `right`, below these `left_left`, `left_right` and so
    on. A network is fed the bits as −1 and 1, `[batch, 2 ** depth]`.

    Args:
        depth: the number of levels of gates.
        gates: the kinds of gates that are drawn.
        seed: seeds the draw of each gate.

    >>> boolean_tree(2)
    CausalModel(x0, x1, x2, x3, left(x0, x1), right(x2, x3), answer(left, right))

    Raises:
        DistillError: no level, or an unknown gate.
    """
    if not 1 <= depth <= DEEPEST:
        raise DistillError(f"boolean_tree(depth={depth}) has no gate, or too many; use depth=1 to depth={DEEPEST}.")
    if not len(gates):
        raise DistillError(f"boolean_tree(gates={gates!r}) has nothing to draw from; gates are {', '.join(GATES)}.")
    if unknown := [gate for gate in gates if gate not in GATES]:
        raise DistillError(f"there is no gate {unknown[0]!r}; gates are {', '.join(GATES)}.")
    generator = torch.Generator().manual_seed(seed)
    bits = tuple(f"x{i}" for i in range(2**depth))
    mechanisms = {}
    below = bits
    for level in reversed(range(depth)):
        names = tuple(_name(level, i) for i in range(2**level))
        drawn = torch.randint(len(gates), (len(names),), generator=generator).tolist()
        for i, name in enumerate(names):
            mechanisms[name] = _gate(gates[drawn[i]], below[2 * i], below[2 * i + 1])
        below = names
    return CausalModel(
        inputs=dict.fromkeys(bits, (False, True)),
        mechanisms=mechanisms,
        output="answer",
        encode=lambda values: torch.stack([values[bit] for bit in bits], 1).float() * 2 - 1,
    )


def _name(level: int, place: int) -> str:
    """Return the path from the root to a gate, by the binary digits of its place in its level."""
    turns = [("left", "right")[place >> bit & 1] for bit in reversed(range(level))]
    return "_".join(turns) or "answer"


def _gate(kind: str, first: str, second: str) -> Callable[..., Tensor]:
    def gate(**parents: Tensor) -> Tensor:
        return GATES[kind](parents[first], parents[second])

    gate.__name__ = kind
    parameters = [Parameter(name, Parameter.KEYWORD_ONLY) for name in (first, second)]
    gate.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return gate
