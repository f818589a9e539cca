"""Random vectors of several widths; what is written with them is in `tests/distill/objectives/test_diito.py`."""

from unittest import mock

import torch

from distill.interchange.random_vectors import narrow


def test_the_map_between_two_widths_is_made_once():
    normal = torch.randn(5, 26, generator=torch.Generator().manual_seed(0))
    first = narrow(normal, 11)
    with mock.patch.object(torch.linalg, "qr", side_effect=AssertionError):
        assert torch.equal(narrow(normal, 11), first)
        assert narrow(normal, 26) is normal


def test_the_map_is_the_same_in_every_precision():
    normal = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert narrow(normal, 7).dtype is torch.float64
    torch.testing.assert_close(narrow(normal.float(), 7), narrow(normal, 7).float(), atol=1e-5, rtol=1e-5)


def test_a_map_made_in_inference_mode_takes_part_in_a_graph():
    with torch.inference_mode():
        narrow(torch.ones(1, 13), 3)
    vectors = torch.ones(2, 13, requires_grad=True)
    narrow(vectors, 3).sum().backward()
    assert vectors.grad is not None
