"""Hierarchical equality as a causal model: do two pairs agree in whether they are equal?

    answer = (a = b) = (c = d)

Geiger, Carstensen, Frank, Potts 2022 (arXiv:2006.07968).
"""

from functools import cache

import torch
from torch import Tensor

from distill.causal.model import CausalModel
from distill.errors import DistillError, checked


@checked
def hierarchical_equality(entities: int | None = 20, width: int = 4, seed: int = 0) -> CausalModel:
    """Return the causal model of (a = b) = (c = d), for entities that a network gets as random vectors.

    Half of the sampled pairs (a, b), and half of the pairs (c, d), are equal. The network is fed the four vectors,
    concatenated to `[batch, 4 · width]`, uniform in [−1, 1].

    Args:
        entities: the number of entities, with vectors drawn by `seed`; inputs are their numbers. None draws new vectors
            for every example, as pyvene does, and these are the inputs, `[batch, width]`.
        width: the width of each vector.
        seed: seeds the vectors of a fixed number of entities.

    Geiger, Carstensen, Frank, Potts 2022 (arXiv:2006.07968); as in the introduction of pyvene (Wu et al. 2024,
    arXiv:2403.07809), where a, b, c, d are W, X, Y, Z.

    >>> hierarchical_equality()
    CausalModel(a, b, c, d, left(a, b), right(c, d), answer(left, right))
    """
    if width < 1 or (entities is not None and entities < 1):
        raise DistillError(
            f"hierarchical_equality(entities={entities}, width={width}) compares nothing; use 1 or more of each, e.g. "
            "entities=20, width=4."
        )
    vectors = torch.rand(entities or 1, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    vectors_on = cache(vectors.to)

    def draw(n: int, generator: torch.Generator) -> Tensor:
        if entities is None:
            return torch.rand(4, n, width, generator=generator, device=generator.device) * 2 - 1
        return torch.randint(entities, (4, n), generator=generator, device=generator.device)

    def sample(n: int, generator: torch.Generator) -> dict[str, Tensor]:
        a, b, c, d = draw(n, generator)
        left, right = torch.rand(2, n, *[1] * (a.ndim - 1), generator=generator, device=generator.device) < 0.5
        return {"a": a, "b": torch.where(left, a, b), "c": c, "d": torch.where(right, c, d)}

    def encode(values: dict[str, Tensor]) -> Tensor:
        four = torch.stack([values[name] for name in "abcd"], 1)
        return (four if entities is None else vectors_on(four.device)[four]).flatten(1)

    return CausalModel(
        inputs=dict.fromkeys("abcd", None if entities is None else range(entities)),
        mechanisms={
            "left": lambda a, b: _same(a, b),
            "right": lambda c, d: _same(c, d),
            "answer": lambda left, right: left == right,
        },
        output="answer",
        encode=encode,
        sample=sample,
    )


def _same(first: Tensor, second: Tensor) -> Tensor:
    """Return whether two numbers, or two vectors, are equal, for each example."""
    return (first == second).reshape(len(first), -1).all(1)
