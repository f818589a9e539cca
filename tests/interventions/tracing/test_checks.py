"""Traces of the user's own inside a block: nothing stays behind, and what else is on the model keeps working."""

import pytest

from tests.interventions.tracing.checks import CHECKS


@pytest.mark.parametrize("check", CHECKS)
def test_check(check, nnsight_side):
    fault = nnsight_side[check]
    assert not fault, fault
