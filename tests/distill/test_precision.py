"""The precision of computations whose inputs may be of half precision."""

import pytest
import torch

from distill.precision import at_least_single, widen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.bool])
def test_what_is_narrower_is_computed_with_in_single_precision(dtype: torch.dtype) -> None:
    assert at_least_single(dtype) == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_what_is_wider_stays(dtype: torch.dtype) -> None:
    assert at_least_single(dtype) == dtype


def test_values_of_half_precision_become_single() -> None:
    assert widen(torch.ones(2, dtype=torch.float16)).dtype == torch.float32


def test_values_of_double_precision_are_the_same_tensor() -> None:
    values = torch.ones(2, dtype=torch.float64)
    assert widen(values) is values
