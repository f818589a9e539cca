"""Fixtures of the tests of what happens around the steps."""

import pytest

from tests.forked_groups import Groups


@pytest.fixture(scope="session")
def groups():
    """The program whose groups of processes train the cases of `several.py`."""
    with Groups("tests.distill.training.several") as found:
        yield found
