"""The tokens that a metric reads, against the metric of all tokens."""

from dataclasses import replace

import pytest
import torch

from interventions.analysis.readings import reading_of
from interventions.metrics import normalized
from interventions.positions import select
from tests.interventions.test_metrics import EVERY, LEFT, LOGITS, RIGHT


@pytest.mark.parametrize("mask", [None, LEFT, RIGHT], ids=["no mask", "left", "right"])
@pytest.mark.parametrize("name", EVERY)
def test_a_reading_measures_the_logits_that_a_metric_reads(name, mask):
    """The value of these tokens is that of all tokens, bit for bit, and no other token is kept."""
    real = torch.ones(3, 5, dtype=torch.bool) if mask is None else mask.bool()
    for position in (-1, 0, 1):
        metric = replace(EVERY[name], position=position, mask=mask)
        other = LOGITS.flip(0) * 2
        distinct = bool((metric(LOGITS).mean() - metric(other).mean()).abs() > 0)
        for given in [metric, *([normalized(metric, LOGITS, other)] if distinct else [])]:
            reading = reading_of(given, 3, 5)
            kept = torch.cat([LOGITS, other, LOGITS])[:, reading.columns]
            each = [given(logits) for logits in (LOGITS, other, LOGITS)]
            assert all(map(torch.equal, reading.each({"logits": kept}, 3), each))
            assert reading.columns.tolist() == sorted(set(select(position, real).columns.tolist()))


def test_what_reads_the_whole_output_is_no_reading():
    assert reading_of(lambda output: output.logits[:, -1, 0], 3, 5) is None
    assert reading_of(normalized(lambda output: output[:, -1, 0], LOGITS, 2 * LOGITS), 3, 5) is None
    assert reading_of(replace(EVERY["probability"], mask=LEFT), 3, 4) is None
