"""The shapes in annotations are enforced in every test process."""

import jaxtyping
import pytest
import torch

from distill.losses import kd


def test_a_wrong_shape_raises():
    with pytest.raises(jaxtyping.TypeCheckError, match=r"reduction"):
        kd(torch.zeros(2, 3), torch.zeros(2, 3), reduction=3)
    with pytest.raises(jaxtyping.TypeCheckError, match=r"student_logits"):
        kd(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3))


def test_integers_pass_for_floats():
    assert kd(torch.zeros(2, 3), torch.zeros(2, 3), temperature=2) == 0
