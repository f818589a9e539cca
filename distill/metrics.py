"""What a model is measured by, under the name that users import: `from distill.metrics import accuracy`."""

from distill.evaluation.metrics import (
    Calibration,
    Share,
    accuracy,
    batches,
    bootstrap,
    calibration,
    cka,
    evaluating,
    expected_calibration_error,
    has_classes,
    perplexity,
    preferences,
    representational_similarity,
    wilson,
)

__all__ = [
    "Calibration",
    "Share",
    "accuracy",
    "batches",
    "bootstrap",
    "calibration",
    "cka",
    "evaluating",
    "expected_calibration_error",
    "has_classes",
    "perplexity",
    "preferences",
    "representational_similarity",
    "wilson",
]
