"""The laws of `interventions` on a tiny random model of every model type that transformers can build offline."""

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from tests.conformance.building import CannotBuildError, quiet, subject
from tests.conformance.known_gaps import GAPS
from tests.conformance.laws import broken
from tests.conformance.not_built import NOT_BUILT


@pytest.mark.parametrize("model_type", sorted(CONFIG_MAPPING_NAMES))
def test_the_laws_hold(model_type):
    """Every law but the known gaps, and those not: a gap that closed must leave the table."""
    with quiet():
        if model_type in NOT_BUILT:
            with pytest.raises(CannotBuildError):
                subject(model_type)
            pytest.xfail(f"not built: {NOT_BUILT[model_type]}")
        known, found = GAPS.get(model_type, {}), broken(subject(model_type))
    assert {law: reason for law, reason in found.items() if law not in known} == {}
    closed = sorted(known.keys() - found.keys())
    assert not closed, f"these laws hold now; take them out of known_gaps: {closed}"
    if known:
        pytest.xfail("; ".join(f"{law}: {gap.reason}" for law, gap in known.items()))


def test_the_tables_name_model_types():
    assert not {*GAPS, *NOT_BUILT} - set(CONFIG_MAPPING_NAMES)
    assert not set(GAPS) & set(NOT_BUILT)
