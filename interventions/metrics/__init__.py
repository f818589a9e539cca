"""Metrics: functions of a model's output that return one number for each example, as a sweep measures them."""

from typing import TYPE_CHECKING

from interventions.metrics.metrics import (
    Metric,
    Normalized,
    accuracy,
    agreement,
    kl,
    log_probability,
    logit_difference,
    name_of,
    normalized,
    probability,
)
from interventions.renames import renamed_in

__all__ = [
    "Metric",
    "Normalized",
    "accuracy",
    "agreement",
    "kl",
    "log_probability",
    "logit_difference",
    "name_of",
    "normalized",
    "probability",
]

if not TYPE_CHECKING:  # type checkers take any name from a module that has one
    __getattr__ = renamed_in(
        __name__, normalised="interventions.metrics.normalized", Normalised="interventions.metrics.Normalized"
    )
