"""What a user sees of the packages under the tab key."""

import pytest

import distill
import interventions


@pytest.mark.parametrize("package", [distill, interventions])
def test_the_public_names_alone_are_listed(package):
    listed = dir(package)
    assert listed == sorted(package.__all__)
    assert not [name for name in listed if not hasattr(package, name)]
