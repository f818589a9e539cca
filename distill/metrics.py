"""The figures of a model, under the name that users import: `from distill.metrics import accuracy`."""

from distill.evaluation.metrics import *  # noqa: F403
from distill.evaluation.metrics import __all__ as __all__
