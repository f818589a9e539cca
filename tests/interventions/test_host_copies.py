import gc

import pytest
import torch

from interventions import host_copies, keep_on_host, on_host


def test_a_tensor_of_the_cpu_is_its_own_copy():
    tensor = torch.arange(3)
    assert on_host(tensor) is tensor


def test_a_kept_copy_is_returned_until_the_tensor_is_written():
    tensor, copy = torch.arange(3), torch.tensor([7, 8, 9])
    assert keep_on_host(tensor, copy) is tensor
    assert on_host(tensor) is copy
    assert on_host(tensor.clone()).tolist() == [0, 1, 2]
    tensor += 1
    assert on_host(tensor) is tensor


def test_a_copy_is_made_when_it_is_first_read_and_once():
    made = []
    tensor = torch.arange(3)
    keep_on_host(tensor, lambda: made.append(1) or torch.ones(3))
    assert not made
    assert on_host(tensor) is on_host(tensor)
    assert made == [1]


def test_a_copy_lives_as_long_as_its_tensor():
    tensor, before = torch.arange(3), len(host_copies._copies)
    keep_on_host(tensor, torch.arange(3))
    assert len(host_copies._copies) == before + 1
    del tensor
    gc.collect()
    assert len(host_copies._copies) == before


def test_inference_tensors_have_no_versions_and_so_no_copies():
    with torch.inference_mode():
        tensor = torch.arange(3)
    keep_on_host(tensor, torch.ones(3))
    assert on_host(tensor) is tensor


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a device")
def test_a_tensor_elsewhere_is_fetched_once():
    tensor = torch.arange(3, device="cuda")
    assert on_host(tensor) is on_host(tensor)
    assert on_host(tensor).tolist() == [0, 1, 2]
