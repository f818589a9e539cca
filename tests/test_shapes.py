"""The shapes in annotations are enforced while tests run."""

import jaxtyping
import pytest
import torch

from interventions.subspaces.subspace import difference


def test_a_wrong_shape_raises():
    with pytest.raises(jaxtyping.TypeCheckError, match=r"old"):
        difference(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(jaxtyping.TypeCheckError, match=r"new"):
        difference("3", torch.zeros(2, 3))


def test_integers_pass_for_floats():
    from distill.statistics.intervals import wilson

    assert wilson(1, 2, z=2).value == 0.5
