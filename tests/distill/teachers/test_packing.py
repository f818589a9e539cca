import pytest
import torch

from distill.errors import DistillError
from distill.teachers.packing import DTYPES, packed, unpacked
from distill.teachers.top_k import TopK


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors are alike bit for bit, NaN and −0 too."""
    return one.dtype == other.dtype and one.shape == other.shape and packed({"x": one}) == packed({"x": other})


def random_logits(*shape, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)


@pytest.mark.parametrize("name", ["values", "indices", "level"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tensor_comes_back_bit_for_bit(dtype, name):
    draw = torch.Generator().manual_seed(1)
    for shape in [(), (0,), (1,), (7, 5), (3, 0, 2), (2, 3, 50)]:
        size = torch.Size(shape).numel() * dtype.itemsize
        bits = torch.randint(256, (size,), dtype=torch.uint8, generator=draw)
        if dtype == torch.bool:
            bits %= 2
        value = bits.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
        found = unpacked(packed({name: value, "other": torch.tensor(3)}))
        assert list(found) == [name, "other"]
        assert same(found[name], value)
        assert found["other"] == 3


@pytest.mark.parametrize("largest", [0, 1, 2, 255, 256, 511, 65_535, 65_536, 128_255, 2**24, 2**31 - 1, -1])
def test_whole_numbers_have_the_bits_that_the_largest_needs(largest):
    value = torch.tensor([largest, 0, largest, min(largest, 5)] * 32, dtype=torch.int32)
    content = packed({"indices": value})
    assert same(unpacked(content)["indices"], value)
    bits = 32 if largest < 0 else largest.bit_length()
    assert len(content) <= len(value) * bits / 8 + 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [512, 50_257, 128_256])
def test_fifty_logits_take_less_than_300_bytes_a_token(classes, dtype):
    kept = TopK(50, 2.0)(random_logits(8, classes, dtype=dtype))
    content = packed(kept)
    assert all(same(value, kept[name]) for name, value in unpacked(content).items())
    assert len(content) / 8 < 300
    assert len(packed({"raw": kept["values"], "raw2": kept["indices"]})) / 8 > (400 if dtype == torch.float32 else 300)


@pytest.mark.parametrize("cut", [0, 1, 5, 20, 60])
def test_what_is_no_packed_tensor_is_refused(cut):
    content = packed(TopK(3)(random_logits(2, 40)))
    with pytest.raises(ValueError, match=r"no packed tensors|buffer"):
        unpacked(content[:cut])


def test_a_precision_that_is_not_kept_is_one_line():
    with pytest.raises(DistillError, match=r"float8_e5m2 cannot be kept; .*model\.float\(\)"):
        packed({"logits": torch.zeros(2).to(torch.float8_e5m2)})
