"""What models of nnsight compute, in a process of its own."""

import pytest

from tests.other_process import Answers


@pytest.fixture(scope="session")
def nnsight_side():
    """{case: its answer} and {check: what went wrong}."""
    with Answers("tests.interventions.tracing.nnsight_side") as answers:
        yield answers
