"""Hierarchical equality: is the answer to two questions of equality the same?"""

from functools import cache

import torch
from torch import Tensor

from distill.causal_models import CausalModel


def hierarchical_equality(entities: int = 20, width: int = 4, seed: int = 0) -> CausalModel:
    """(a = b) = (c = d), for entities that a network sees as random vectors.

    Half of the sampled pairs (a, b), and half of the (c, d), are equal. The network is fed the four vectors in one,
    `[batch, 4 · width]`, uniform in [−1, 1] and drawn by `seed`.

    Geiger, Carstensen, Frank, Potts 2022 (arXiv:2006.07968); as in the introduction of pyvene (Wu et al. 2024,
    arXiv:2403.07809), where a, b, c, d are W, X, Y, Z.

    >>> hierarchical_equality()
    CausalModel(a, b, c, d, left(a, b), right(c, d), answer(left, right))
    """
    vectors = torch.rand(entities, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    vectors_on = cache(vectors.to)

    def sample(n: int, generator: torch.Generator) -> dict[str, Tensor]:
        device = generator.device
        a, b, c, d = torch.randint(entities, (4, n), generator=generator, device=device)
        left, right = torch.rand(2, n, generator=generator, device=device) < 0.5
        return {"a": a, "b": torch.where(left, a, b), "c": c, "d": torch.where(right, c, d)}

    return CausalModel(
        inputs=dict.fromkeys("abcd", range(entities)),
        mechanisms={
            "left": lambda a, b: a == b,
            "right": lambda c, d: c == d,
            "answer": lambda left, right: left == right,
        },
        output="answer",
        encode=lambda values: vectors_on(values["a"].device)[torch.stack([values[k] for k in "abcd"], 1)].flatten(1),
        sample=sample,
    )
