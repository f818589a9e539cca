"""Which token pads: the padding token, else the end token, else token 0."""

from types import SimpleNamespace

import pytest

from distill.data.pad_ids import pad_id_of


@pytest.mark.parametrize(("pad", "end", "expected"), [(3, 2, 3), (0, 2, 0), (None, 2, 2), (None, None, 0)])
def test_the_token_that_pads(pad, end, expected):
    assert pad_id_of(SimpleNamespace(pad_token_id=pad, eos_token_id=end)) == expected
