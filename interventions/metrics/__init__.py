"""Metrics: functions of a model's output that return one number for each example, as a sweep measures them."""

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

__getattr__ = renamed_in(
    __name__, normalised="interventions.metrics.normalized", Normalised="interventions.metrics.Normalized"
)
